"""`python -m evaluate figure2 | figure5`: maps by hand, drawn again without a model, mistakes."""

import base64
import io
import json
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image
from toy import save_tiny

import pipeline
from adacorr import CacheManager, spatial_variation
from evaluate import figures
from evaluate.__main__ import main
from runtime import Progress

STEPS = 6
needs_matplotlib = pytest.mark.skipif(not find_spec("matplotlib"), reason="needs matplotlib")


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("figures") / "tiny.safetensors", input_size=16, patch_size=4)


@pytest.fixture(scope="module", params=["ddim", "unipc"])
def pipe(ckpt, request):
    options = pipeline.ModelOptions(ckpt=str(ckpt), sampler=request.param, num_sampling_steps=STEPS, device="cpu")
    return pipeline.load(options)


@torch.no_grad()
def states_by_hand(pipe, cache=None, seed=3, count=2):
    """(steps, layers + 1, rows [conditional; unconditional], T, D): the uncached stack on the states of a run."""
    entered, labels = [pipe.sampler.prepare(pipeline.gaussian(seed, np.arange(count), pipe.noise_shape))], [0, 1]
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
    here, there = states_by_hand(pipe, again), states_by_hand(pipe)
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


def code(*argv):
    try:
        return main([*" ".join(map(str, argv)).split(), "--device", "cpu"])
    except SystemExit as stop:
        return stop.code


@needs_matplotlib
@pytest.mark.parametrize("options", ["figure2 --layer 0 --steps 5 1", "figure5 --setting never", "figure5"])
def test_figures_are_drawn_again_without_a_model(options, ckpt, tmp_path, monkeypatch, capsys):
    out, png = tmp_path / "x.json", tmp_path / "x.png"
    assert code(options, "--num-images 2 --num-sampling-steps", STEPS, "--ckpt", ckpt, "--out", out) == 0
    content, drawn = json.loads(out.read_text()), png.read_bytes()
    assert content["kind"] == options.split()[0]
    assert content["images"] == ["x.png"]
    assert "tiny.safetensors" in content["protocol"]
    if content["kind"] == "figure2":
        assert (content["layer"], content["steps"], np.shape(content["variation"])) == (0, [1, 5], (2, 2, 4, 4))
        assert content["timesteps"] == [799, 0]
        image = Image.open(io.BytesIO(base64.b64decode(content["final_png"][1])))
        assert image.size == (16, 16)
    else:
        assert content["setting"] == ("never" if "never" in options else "adacorr")
        assert content["offset"][0] == [None, None]
    png.unlink()
    monkeypatch.setattr(pipeline, "load_checkpoint", lambda *_, **__: pytest.fail("read a checkpoint"))
    assert code(content["kind"], "--from", out) == 0
    assert png.read_bytes() == drawn
    assert capsys.readouterr().out == f"{png}\n{png}\n"
    other = {"figure2": "figure5", "figure5": "figure2"}[content["kind"]]
    assert code(other, "--from", out) == 2
    assert f"is a result of `evaluate {content['kind']}`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("figure2", "--out"),
        ("figure2 --out x.json --from y.json", "not allowed"),
        ("figure2 --out x.json --steps 50", "--steps 50 is outside 0..49"),
        ("figure2 --out x.json --num-images 65", "--num-images 65"),
        ("figure2 --out x.json --setting adacorr", "--setting"),
        ("figure5 --out x.json --setting intervall", "did you mean interval"),
        ("figure5 --from missing.json", "missing.json"),
        ("figure5 --out x.json --without matplotlib", "figure5 needs matplotlib"),
    ],
)
def test_mistakes_are_one_line_before_any_weights_are_read(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "load_checkpoint", lambda *_, **__: pytest.fail("read a checkpoint"))
    monkeypatch.chdir(tmp_path)
    if "--without" in argv:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert code(argv.partition(" --without")[0]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert words in err
    assert list(tmp_path.iterdir()) == []
