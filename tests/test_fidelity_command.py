"""`python -m evaluate fidelity` and `evaluate drift`: what is measured, what is refused; LPIPS on random backbones."""

import json
import shutil
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import torchvision
from commands import code, one_line, printed
from images import pictures
from PIL import Image

import pipeline
from adacorr import CacheManager
from diffusion import make_sampler
from evaluate import fidelity_command
from evaluate.__main__ import main
from evaluate.fidelity import fidelity
from evaluate.imagesets import open_images
from evaluate.perceptual import Perceptual

STEPS, COUNT = 12, 6
needs_lpips = pytest.mark.skipif(not find_spec("lpips"), reason="needs lpips")


def images_of(path):
    return torch.from_numpy(np.concatenate([*open_images(path).batches(100)]))


def npz_of(folder):
    return folder.with_name(f"{folder.name}.npz")


def test_sets_are_scored_as_their_images(sampled, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(fidelity_command, "BATCH", 4)
    reference, out = npz_of(sampled("uncached")), tmp_path / "result.json"
    paths = sampled("cached"), npz_of(sampled("cached")), sampled("fewer"), sampled("uncached")
    assert code(main, "fidelity", reference, *paths, "--out", out) == 0
    result, lines = json.loads(out.read_text()), printed(capsys)
    expected = [fidelity(images_of(sampled("uncached")), images_of(path)) for path in paths]
    assert expected[0] != expected[2]
    for path, own, found in zip(paths, expected, result["sets"], strict=True):
        assert found == {"path": str(path), "protocol": open_images(path).protocol, **own}
    assert lines == [result["table"]["columns"], *result["table"]["rows"]]
    psnr, ssim = (
        [f"{expected[2][name][key]:.{digits}f}" for key in ("mean", "p5", "min")]
        for name, digits in (("psnr", 2), ("ssim", 4))
    )
    assert lines[3] == [f"`{sampled('fewer')}`", str(COUNT), "0", " / ".join(psnr), " / ".join(ssim)]
    assert lines[4][1:4] == [str(COUNT), str(COUNT), "inf / inf / inf"]  # identical images are counted


def plain(path, count=4, size=16, first=0, **arrays):
    """A folder of images 0.png, 1.png, ..., or with labels an .npz."""
    images = pictures(count, size)
    if arrays:
        np.savez(path.with_suffix(".npz"), arr_0=images, **arrays)
        return path.with_suffix(".npz")
    path.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(path / f"{first + i}.png")
    return path


def test_unlike_sets_are_refused(sampled, capsys, tmp_path):
    a, make = plain(tmp_path / "a"), lambda name, **options: plain(tmp_path / name, **options)
    cases = [
        (a, make("shifted", first=2), "shifted lacks 2 of the 4 images", ": 0, 1"),
        (a, make("long", count=9), "a lacks 5 of the 9 images", ": 4, 5, 6, ..."),
        (a, make("pack", count=3, arr_1=np.zeros(3, int)), "a has 4 images", "pack.npz has 3"),
        (a, make("large", size=20), "16 x 16", "20 x 20"),
        (make("x", arr_1=np.arange(4)), make("y", arr_1=np.array([0, 1, 0, 0])), "image 2 has label 2", "0 in"),
        (sampled("uncached"), sampled("seed"), "another seed:", "alike"),
        (make("small", size=8), tmp_path / "small", "SSIM", "11 x 11"),
        (a, tmp_path / "none", "none does not exist"),
    ]
    for reference, other, *words in cases:
        assert code(main, "fidelity", reference, other) == 2
        one_line(capsys, *words)
    shutil.copytree(sampled("seed") / "images", tmp_path / "images")  # without a protocol nothing speaks against it
    assert code(main, "fidelity", sampled("uncached"), tmp_path / "images") == 0


def test_what_was_compared_is_kept_where_a_later_set_is_damaged(capsys, tmp_path):
    a, b, out = plain(tmp_path / "a"), plain(tmp_path / "b"), tmp_path / "result.json"
    (b / "3.png").write_bytes((b / "3.png").read_bytes()[:-40])
    assert code(main, "fidelity", a, a, b, "--out", out) == 2
    assert [own["path"] for own in json.loads(out.read_text())["sets"]] == [str(a)]
    assert "3.png cannot be read" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- LPIPS


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("lpips") / "alexnet.pth"
    state = torchvision.models.alexnet(weights=None).state_dict()  # without the matrices that LPIPS does not take
    torch.save({key: value for key, value in state.items() if key.startswith("features") or value.ndim == 1}, path)
    return path


@needs_lpips
@pytest.mark.filterwarnings("ignore::UserWarning")  # of torchvision, for how lpips calls it
def test_lpips(backbone, capsys, tmp_path):
    a = plain(tmp_path / "a", size=32)
    images = images_of(a)
    network = Perceptual("alex", backbone)
    assert network(images, images).tolist() == [0.0] * 4
    b = images.flip(0)
    there, back = network(images, b), network(b, images)
    assert there.min() > 0
    assert there.tolist() == pytest.approx(back.tolist(), rel=1e-6)
    import lpips

    own, stock = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False), torchvision.models.alexnet()
    stock.load_state_dict(torch.load(backbone, weights_only=True), strict=False)
    for part in own.net.children():
        for i, layer in part.named_children():
            layer.load_state_dict(stock.features[int(i)].state_dict())
    x, y = (z.permute(0, 3, 1, 2) / 255 for z in (images, b))
    with torch.no_grad():  # its own way to [-1, 1]
        assert there.tolist() == pytest.approx(own(x, y, normalize=True).flatten().tolist(), rel=1e-5)
    np.savez(tmp_path / "b.npz", arr_0=b.numpy())
    words = ["fidelity", a, tmp_path / "b.npz", "--lpips", "alex", "--lpips-weights", backbone]
    assert code(main, *words, "--out", tmp_path / "result.json") == 0
    found = json.loads((tmp_path / "result.json").read_text())
    each = there.tolist()
    summary = {"mean": np.mean(each), "p95": np.percentile(each, 95), "max": max(each)}
    assert found["sets"][0]["lpips"].pop("per_image") == pytest.approx(each, rel=1e-6)
    assert found["sets"][0]["lpips"] == pytest.approx(summary, rel=1e-6)
    assert found["lpips_sha256"] == network.sha256
    assert printed(capsys)[1][-1] == f"{summary['mean']:.4f} / {summary['p95']:.4f} / {summary['max']:.4f}"


@needs_lpips
def test_lpips_is_refused_what_it_cannot_use(backbone, tiny32, capsys, tmp_path, monkeypatch):
    small, large = plain(tmp_path / "small", size=30), plain(tmp_path / "large", size=32)
    for folder, words, part in (
        (small, ["--lpips", "alex", "--lpips-weights", backbone], "31 x 31"),
        (large, ["--lpips", "alex", "--lpips-weights", tiny32], "not torchvision's backbone of --lpips alex"),
        (large, ["--lpips", "alex", "--lpips-weights", tmp_path / "none.pth"], "none.pth does not exist"),
        (large, ["--lpips-weights", backbone], "needs --lpips"),
    ):
        assert code(main, "fidelity", folder, folder, *words) == 2
        one_line(capsys, part)
    monkeypatch.setattr("evaluate.perceptual.find_spec", lambda name: None)
    assert code(main, "fidelity", large, large, "--lpips alex") == 2
    one_line(capsys, "pip install lpips")


# -------------------------------------------------------------------------------------------------------- drift


def test_drift_is_the_relative_error_of_each_state(tiny32, capsys, tmp_path):
    words = ["drift", "--ckpt", tiny32, "--num-sampling-steps", STEPS, "--device", "cpu", "--num-images", 3]
    assert code(main, *words, "--cache interval:every=3 --seed 7 --out", tmp_path / "drift.json") == 0
    result = json.loads((tmp_path / "drift.json").read_text())
    errors = np.array(result["relative_error"])
    pipe = pipeline.load(pipeline.ModelOptions(ckpt=str(tiny32), num_sampling_steps=STEPS, device="cpu"))
    for step in (0, 1, 5, STEPS - 1):
        x, y = (
            pipe.sample(7, np.arange(3), torch.arange(3) % 4, cache, stop=step + 1).double().numpy()
            for cache in (CacheManager.of("interval:every=3"), None)
        )
        expected = [np.sqrt(((a - b) ** 2).sum() / (b**2).sum()) for a, b in zip(x, y, strict=True)]
        assert errors[step] == pytest.approx(expected, abs=1e-12)
    assert (errors[0] == 0).all()
    assert (errors[1:] > 0).all()
    cache = CacheManager.of("interval:every=3")
    pipe.sample(7, np.arange(3), torch.arange(3) % 4, cache)
    assert np.flatnonzero(result["executed_per_step"]).tolist() == cache.trace.computed_steps(0)
    timestep = make_sampler("ddim", STEPS).timesteps[1]
    assert printed(capsys)[2] == ["1", f"{timestep}", "0.000", f"{errors[1].mean():.5f}", f"{errors[1].max():.5f}"]
