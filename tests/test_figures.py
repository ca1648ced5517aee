"""`python -m evaluate figure2 | figure5`: maps by hand, files."""

import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from commands import code
from PIL import Image

import pipeline
from adacorr import CacheManager, spatial_variation
from evaluate import figures
from evaluate.__main__ import main
from runtime import Progress

STEPS = 6
needs_matplotlib = pytest.mark.skipif(not find_spec("matplotlib"), reason="needs matplotlib")


@pytest.fixture(scope="module", params=["ddim", "unipc"])
def pipe(tiny32, request):
    options = pipeline.ModelOptions(ckpt=str(tiny32), sampler=request.param, num_sampling_steps=STEPS, device="cpu")
    return pipeline.load(options)


@torch.no_grad()
def states_by_hand(pipe, cache=None, seed=3, count=2):
    """(steps, layers + 1, rows [conditional; unconditional], T, D): the uncached stack on the states of a run."""
    begun = pipe.sampler.prepare(pipeline.gaussian(seed, np.arange(count), pipe.noise_shape))
    entered, labels = [pipe.sampler.image(begun)], [0, 1]
    pipe.sample(seed, np.arange(count), torch.tensor(labels), cache, lambda step, x, cache: entered.append(x))
    rows, model = [], pipe.model
    for t, x in zip(pipe.sampler.timesteps, entered[:-1], strict=True):
        h = model.embed(torch.cat([x, x]))
        c = model.condition(t.expand(2 * count), torch.tensor([*labels, *[model.null_label] * count]))
        rows.append([h])
        for block in model.blocks:
            rows[-1].append(h := block(h, c))
    return torch.stack([torch.stack(row) for row in rows])


def test_variation_is_that_of_a_layer_at_its_tokens(pipe):
    images, maps = figures.variation_maps(pipe, 3, 2, 1, [0, 4], Progress(STEPS, "step"))
    h = states_by_hand(pipe)[[0, 4], 1, :2]  # (steps, images, T, D), conditional
    expected = torch.std(h, dim=-1, correction=0).transpose(0, 1)
    np.testing.assert_allclose(maps, expected.unflatten(2, (4, 4)), rtol=1e-4)
    np.testing.assert_allclose(maps.mean((2, 3)), torch.stack([spatial_variation(x) for x in h], dim=1), rtol=1e-4)
    assert torch.equal(images, pipe.decode(pipe.sample(3, np.arange(2), torch.tensor([0, 1]))))
    assert not pipe.model._forward_pre_hooks
    assert not pipe.model.blocks[0]._forward_pre_hooks


@pytest.mark.parametrize("spec", ["interval:every=2", None], ids=["alone", "adacorr"])
def test_drift_of_a_cached_run_by_hand(pipe, spec):
    cache, again = (CacheManager.of(spec, None if spec else "") for _ in range(2))
    maps = figures.drift_maps(pipe, 3, 2, cache, Progress(4 * STEPS, "step"))
    here, there = states_by_hand(pipe, again), states_by_hand(pipe)  # equal to rounding, as no hook is on the model
    depth = len(pipe.model.blocks)
    for step in range(STEPS):
        for layer in range(depth):
            moved = torch.stack([here[step, layer + 1, i::2] - there[step, layer + 1, i::2] for i in range(2)])
            size = torch.stack([there[step, layer + 1, i::2] for i in range(2)])
            drift = (moved.flatten(1).norm(dim=1) / size.flatten(1).norm(dim=1)).mean()
            assert maps["drift"][step, layer] == pytest.approx(drift.item(), rel=0.02, abs=1e-6)
            if step:
                change = (here[step, layer] - here[step - 1, layer]).norm(dim=-1).mean()
                score = change + torch.std(here[step, layer], dim=-1, correction=0).mean()
                assert maps["offset"][step, layer] == pytest.approx(score.item(), rel=1e-4)
    assert np.isnan(maps["offset"][0]).all()
    assert maps["drift"][-1].min() > 1e-6  # rounding is less
    assert maps["hit_rate"].shape == (STEPS, depth)
    assert maps["hit_rate"].mean() == pytest.approx(cache.trace.hit_rate)
    if spec:
        assert maps["hit_rate"].tolist() == [[hit] * depth for hit in (0, 0, 1, 0, 1, 0)]


def test_an_exact_cache_does_not_drift(pipe):
    maps = figures.drift_maps(pipe, 3, 2, CacheManager.of("never"), Progress(4 * STEPS, "step"))
    assert not maps["drift"].any()
    assert not maps["hit_rate"].any()


@needs_matplotlib
@pytest.mark.parametrize("options", ["figure2 --layer 0 --steps 5 1", "figure5 --calibrate off"])
def test_numbers_and_picture_are_written(options, tiny32, tmp_path, capsys):
    out, png = tmp_path / "x.json", tmp_path / "x.png"
    given = f"--device cpu --num-images 2 --num-sampling-steps {STEPS} --ckpt", tiny32, "--out", out
    assert code(main, options, *given) == 0
    content = json.loads(out.read_text(), parse_constant=pytest.fail)
    assert (content["kind"], content["images"]) == (options.split()[0], ["x.png"])
    assert "tiny.safetensors" in content["protocol"]
    if content["kind"] == "figure2":
        assert (content["layer"], content["steps"], np.shape(content["variation"])) == (0, [1, 5], (2, 2, 4, 4))
        assert content["timesteps"] == [799, 0]
    else:
        assert content["setting"] == "adacorr"
        assert content["offset"][0] == [None, None]
        assert np.shape(content["drift"]) == np.shape(content["hit_rate"]) == (STEPS, 2)
    assert capsys.readouterr().out == f"{png}\n"
    with Image.open(png) as picture:
        assert min(picture.size) > 300
