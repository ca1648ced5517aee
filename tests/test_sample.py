"""sample.py: pictures, the record, errors in one line, a policy dropped in."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import code, one_line
from PIL import Image
from toy import save_tiny

import adacorr
import diffusion
import pipeline
import sample
from runtime import Progress

ROOT = Path(__file__).resolve().parents[1]
RECORD = {"options", "environment", "checkpoint", "model", "images", "labels", "seconds", "warm"}
CACHED = {"method", "profile", "compute", "hit_rate", "evaluations", "fallbacks", "cache_bytes", "trace"}
COMPARED = {"seconds_uncached", "speedup", "psnr", "ssim"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A checkpoint of 16 x 16 pixels and 5 classes."""
    return save_tiny(tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors", input_size=16, num_classes=5)


def command(*argv):
    return subprocess.run([sys.executable, *map(str, argv)], cwd=ROOT, capture_output=True, text=True)


def run(tmp_path, ckpt, *argv):
    """An in-process run on few steps and two classes -> (picture, record)."""
    out, record = tmp_path / "x.png", tmp_path / "x.json"
    few = ["--num-sampling-steps", 6, "--class-labels", "3,0", "--device", "cpu"]
    few += [] if ckpt is None else ["--ckpt", ckpt]
    assert code(sample.main, *few, "--out", out, "--record", record, *argv) == 0
    with Image.open(out) as picture:
        picture.load()
    return picture, json.loads(record.read_text())


# -------------------------------------------------------------------------------------------------- commands


def test_plain_command(tmp_path):
    out = tmp_path / "new" / "folder" / "grid.png"
    result = command("sample.py", "--num-sampling-steps", 1, "--device", "cpu", "--out", out)
    assert (result.returncode, result.stderr) == (0, "")
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        assert picture.size == (5 * 64 + 4 * 2, 2 * 64 + 2)  # ten images of 32 px, twice enlarged, in two rows
    assert list(out.parent.iterdir()) == [out]
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert " ".join(lines) == "saved labels time"
    assert lines["labels"].startswith("0 airplane, 1 automobile")


def test_compare(tmp_path, capsys):
    """On the bundled checkpoint, whose images are worth comparing."""
    picture, content = run(tmp_path, None, "--adacorr", "--compare", "--num-sampling-steps", 8)
    assert set(content) == RECORD | CACHED | COMPARED
    assert 0 < content["compute"] < 1
    assert 0 < content["hit_rate"] < 1
    assert content["evaluations"] == pytest.approx(8 * content["compute"])
    assert 15 < content["psnr"]["min"] <= content["psnr"]["p5"] <= content["psnr"]["mean"] < 100
    assert 0.5 < content["ssim"]["p5"] <= content["ssim"]["mean"] <= 1
    assert content["speedup"] == pytest.approx(content["seconds_uncached"] / content["seconds"])
    assert content["speedup"] > 0
    assert content["cache_bytes"] > 0
    assert content["labels"] == [3, 0]
    assert content["warm"] is True
    options = {"num_sampling_steps": 8, "ckpt": "dit-ti-2-cifar10", "image_size": 32, "num_classes": 10, "vae": "none"}
    assert options.items() <= content["options"].items()
    assert content["method"] == {"correction": {"name": "AdaCorrection", **vars(adacorr.AdaCorrection())}}
    checkpoint = content["checkpoint"]
    assert (checkpoint["name"], checkpoint["source_key"]) == ("dit-ti-2-cifar10.safetensors", "flat")
    assert len(checkpoint["sha256"]) == 64
    assert content["model"]["num_classes"] == 10
    for key in ("score", "weight"):
        assert np.shape(content["trace"][key]) == (8, 12)
    assert picture.width == 2 * max(2 * 64 + 2, (picture.width - 8) // 2) + 8
    assert 64 < picture.height < 100
    out, err = capsys.readouterr()
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert " ".join(lines) == "saved labels time speed-up compute evaluations hit cache PSNR SSIM"
    assert f"{content['psnr']['p5']:.2f}" in lines["PSNR"]
    assert err == ""


# ---------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--class-labels 3,10", "10 is outside 0..9"),
        ("--class-labels=-1", "-1 is outside 0..9"),
        ("--image-size 250", "is for 32 px, --image-size 250"),
        ("--num-classes 1000", "is for 10 classes"),
        ("--ckpt nowhere.pt", "nowhere.pt"),
        ("--model DiT-XL/2 --ckpt dit-ti-2-cifar10", "is DiT-Ti/2, --model DiT-XL/2"),
        ("--cfg-channels 3 --vae nowhere", "no VAE 'nowhere'"),
        ("--cache teacache --num-sampling-steps 6", "steps 50 there, 6 here"),
    ],
)
def test_what_does_not_fit_the_model_is_one_line(monkeypatch, capsys, argv, words, tmp_path):
    monkeypatch.setattr(diffusion.DDIM, "step", lambda *_: pytest.fail("sampled"))
    assert code(sample.main, "--offline --device cpu", argv, "--out", tmp_path / "x.png") == 2
    one_line(capsys, words)


def test_images_that_are_too_small_to_compare(monkeypatch, capsys, tmp_path):
    ckpt, out = save_tiny(tmp_path / "small.safetensors"), tmp_path / "x.png"
    monkeypatch.setattr(diffusion.DDIM, "step", lambda *_: pytest.fail("sampled"))
    assert code(sample.main, "--device cpu --cache interval --compare --ckpt", ckpt, "--out", out) == 2
    one_line(capsys, "at least 11 x 11 pixels, these have 8 x 8")


def test_debug_shows_where(monkeypatch):
    with pytest.raises(ValueError, match="'cat'"):
        code(sample.main, "--class-labels", "cat", "--debug")


def test_overflow_is_an_error_that_names_the_image(monkeypatch, capsys, tmp_path):
    broken = torch.zeros(2, 3, 32, 32)
    broken[1, 0, 0, 0] = float("nan")
    monkeypatch.setattr(pipeline.Pipeline, "sample", lambda *_, **__: broken)
    assert code(sample.main, "--class-labels", "0,1", "--device", "cpu", "--out", tmp_path / "x.png") == 2
    one_line(capsys, "image 1")
    assert list(tmp_path.iterdir()) == []


def test_labels():
    model = SimpleNamespace(num_classes=4)
    assert sample.parse_labels("0, 3,0", model).tolist() == [0, 3, 0]
    assert sample.parse_labels(None, model).tolist() == [0, 1, 2, 3]
    assert len(sample.parse_labels(None, SimpleNamespace(num_classes=1000))) == 16
    assert sample.parse_labels(None, SimpleNamespace(num_classes=0)) is None
    for text, words in {
        "0,4": "4 is outside 0..3",
        "-1": "-1 is outside 0..3",
        "0,cat": "'cat'",
        "": "''",
    }.items():
        with pytest.raises(ValueError, match=words):
            sample.parse_labels(text, model)
    with pytest.raises(ValueError, match="unconditional"):
        sample.parse_labels("0", SimpleNamespace(num_classes=0))


# -------------------------------------------------------------------------------------------------- one run


def test_record_without_compare_has_no_numbers_that_were_not_measured(tmp_path, tiny):
    _, plain = run(tmp_path, tiny)
    assert set(plain) == RECORD
    assert plain["warm"] is False
    assert plain["checkpoint"]["name"] == "tiny.safetensors"
    _, cached = run(tmp_path, tiny, "--cache", "interval:every=3")
    assert set(cached) == RECORD | CACHED
    assert cached["method"]["policy"] == {"name": "Interval", "every": 3, "order": 0, "warmup": 0, "align": "end"}
    assert cached["hit_rate"] == pytest.approx(3 / 6)  # steps 0, 2 and 5 are computed


def test_warning_when_nothing_was_skipped(tmp_path, tiny, capsys):
    _, record = run(tmp_path, tiny, "--cache", "never", "--compare")
    err = capsys.readouterr().err
    assert err.startswith("sample.py: warning: nothing was skipped: never ")
    assert err.count("\n") == 1
    assert record["hit_rate"] == 0
    assert record["psnr"]["mean"] == "inf"  # never is the plain model, bit for bit


def test_every_image_of_the_grid_is_the_decoded_one_and_the_labels_go_in_turn(tmp_path, tiny):
    picture, record = run(tmp_path, tiny, "--num-images", 3)
    assert record["labels"] == [3, 0, 3]
    pipe = pipeline.load(pipeline.ModelOptions(ckpt=str(tiny), num_sampling_steps=6, device="cpu"))
    images = pipe.decode(pipe.sample(0, np.arange(3), torch.tensor([3, 0, 3])))
    pixels = torch.from_numpy(np.array(picture))  # 16 px, four times enlarged
    for i, image in enumerate(images):
        tile = pixels[:, 66 * i : 66 * i + 64]
        assert all(torch.equal(tile[dy::4, dx::4], image) for dy in range(4) for dx in range(4))
    assert (pixels[:, 64:66] == 255).all()


def test_bar_shows_the_live_hit_rate(tmp_path, tiny, monkeypatch):
    shown = []

    class Drawn(Progress):
        def __init__(self, total, unit, title):
            super().__init__(total, unit, title)
            shown.append((title, total, []))

        def update(self, count, text):
            super().update(count, text)
            shown[-1][2].append(text and text())

    monkeypatch.setattr(sample, "Progress", Drawn)
    run(tmp_path, tiny, "--cache", "interval:every=3", "--compare", "--repeats", 2)
    titles = ["warm-up, uncached", "warm-up, interval", *["uncached", "interval"] * 2]
    rates = [f"hit rate {rate}%" for rate in (0, 50, 33, 50, 60, 50)]
    assert shown == [(title, 6, rates if "interval" in title else [""] * 6) for title in titles]


# --------------------------------------------------------------------------------------------------- picture


@pytest.mark.parametrize(
    ("n", "columns", "rows"),
    [(1, 1, 1), (2, 2, 1), (3, 3, 1), (4, 2, 2), (7, 3, 3), (10, 5, 2), (12, 4, 3), (16, 4, 4)],
)
def test_grid_sizes(n, columns, rows):
    images = torch.arange(n * 80 * 80 * 3).remainder(251).to(torch.uint8).view(n, 80, 80, 3)  # shown as large as it is
    sheet = sample.grid(images)
    assert sheet.size == (columns * 82 - 2, rows * 82 - 2)
    pixels = torch.from_numpy(np.array(sheet))
    assert torch.equal(pixels[:80, :80], images[0])
    assert torch.equal(pixels[-80:, -80:], images[-1]) == (n == columns * rows)


def test_captions_fit_and_leave_the_pictures_alone():
    left, right = (Image.new("RGB", (20, 30), colour) for colour in ("red", "blue"))
    sheet = sample.side_by_side(left, right, ("uncached 7.2 s", "a longer caption 1.3 s, 5.5x"))
    pixels = np.array(sheet)
    half = (sheet.width - 8) // 2
    assert half > 20
    assert (pixels[-30:, :20] == (255, 0, 0)).all()
    assert (pixels[-30:, half + 8 : half + 28] == (0, 0, 255)).all()
    assert (pixels[-30:, 20 : half + 8] == 255).all()
    assert (pixels[:-30] < 128).any()  # there is writing
    assert (pixels[:-30, half : half + 8] == 255).all()  # which does not run from one half into the other


# ----------------------------------------------------------------------------------------- policies, profiles


def test_a_calibrated_method_with_its_shipped_profile(tmp_path):
    """The profile is held to all 50 steps, the warm-up included, which runs the first few of them."""
    _, record = run(tmp_path, None, "--cache", "teacache:threshold=0.5", "--num-sampling-steps", 50, "--num-images", 1)
    assert 0 < record["hit_rate"] < 1


def test_images_that_do_not_fit_into_memory_name_the_way_out(tiny, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(pipeline.Pipeline, "sample", full)
    assert code(sample.main, "--ckpt", tiny, "--device", "cpu", "--out", tmp_path / "x.png") == 1
    one_line(capsys, "do not fit into memory", "lower --num-images")
