"""sample.py: pictures, the record, errors in one line, a policy dropped in."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import adacorr
import pipeline
import sample
from adacorr import make_policy, policies
from runtime import Progress

ROOT = Path(__file__).resolve().parents[1]
RECORD = {
    *("options", "environment", "checkpoint", "model", "method", "labels", "images", "trace", "warm"),
    *(
        "compute",
        "hit_rate",
        "evaluations",
        "psnr",
        "ssim",
        "seconds",
        "seconds_uncached",
        "speedup",
        "cache_bytes",
    ),
}


def command(*argv):
    return subprocess.run([sys.executable, *map(str, argv)], cwd=ROOT, capture_output=True, text=True)


def main(*argv):
    """Exit code of `sample.main`, argparse's own included."""
    try:
        return sample.main([str(a) for a in argv])
    except SystemExit as stop:
        return stop.code


def run(tmp_path, *argv):
    """An in-process run on few steps and two classes -> (picture, record)."""
    out, record = tmp_path / "x.png", tmp_path / "x.json"
    few = ["--num-sampling-steps", 6, "--class-labels", "3,0", "--device", "cpu"]
    assert main(*few, "--out", out, "--record", record, *argv) == 0
    with Image.open(out) as picture:
        picture.load()
    return picture, json.loads(record.read_text())


# -------------------------------------------------------------------------------------------------- commands


def test_plain_command(tmp_path):
    out = tmp_path / "new" / "folder" / "grid.png"
    result = command("sample.py", "--num-sampling-steps", 3, "--device", "cpu", "--out", out)
    assert (result.returncode, result.stderr) == (0, "")
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        assert picture.size == (
            5 * 64 + 4 * 2,
            2 * 64 + 2,
        )  # ten images of 32 px, twice enlarged, in two rows
    assert list(out.parent.iterdir()) == [out]
    assert "0 airplane, 1 automobile" in result.stdout
    assert "speed-up" not in result.stdout
    assert "compute" not in result.stdout


def test_compare_command(tmp_path):
    out, record = tmp_path / "demo.png", tmp_path / "demo.json"
    flags = ["--adacorr", "--compare", "--num-sampling-steps", 8, "--class-labels", "0,3", "--device", "cpu"]
    result = command("sample.py", *flags, "--out", out, "--record", record)
    assert (result.returncode, result.stderr) == (0, "")
    content = json.loads(record.read_text())
    assert set(content) >= RECORD
    assert 0 < content["compute"] < 1
    assert 0 < content["hit_rate"] < 1
    assert content["evaluations"] == pytest.approx(8 * content["compute"])
    assert 15 < content["psnr"]["mean"] < 100
    assert content["psnr"]["min"] <= content["psnr"]["p5"] <= content["psnr"]["mean"]
    assert 0.5 < content["ssim"]["p5"] <= content["ssim"]["mean"] <= 1
    assert content["speedup"] == pytest.approx(content["seconds_uncached"] / content["seconds"])
    assert content["speedup"] > 0
    assert content["cache_bytes"] > 0
    assert content["labels"] == [0, 3]
    assert content["warm"] is True
    assert content["options"]["num_sampling_steps"] == 8
    assert content["options"]["ckpt"] == "dit-ti-2-cifar10"
    assert content["options"]["image_size"] == 32
    assert content["method"] == {"correction": {"name": "AdaCorrection", **vars(adacorr.AdaCorrection())}}
    assert content["checkpoint"]["name"] == "dit-ti-2-cifar10.safetensors"
    assert len(content["checkpoint"]["sha256"]) == 64
    assert content["checkpoint"]["source_key"] == "flat"
    assert content["model"]["num_classes"] == 10
    assert content["environment"]["argv"][1:4] == ["--adacorr", "--compare", "--num-sampling-steps"]
    for key in ("score", "weight"):
        assert np.shape(content["trace"][key]) == (8, 12)
    with Image.open(out) as picture:
        left = 2 * 64 + 2
        assert picture.width == 2 * max(left, (picture.width - 8) // 2) + 8
        assert 64 < picture.height < 100
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert " ".join(lines) == "saved labels time speed-up compute evaluations hit cache PSNR SSIM"
    assert f"{content['psnr']['p5']:.2f}" in lines["PSNR"]


def test_error_command():
    result = command("sample.py", "--num-sampling-steps", 0)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("sample.py: error: ")
    assert result.stderr.count("\n") == 1


# ---------------------------------------------------------------------------------------------------- errors


def one_line(capsys, *words):
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sample.py: error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert all(word in err for word in words), err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--class-labels", "0,cat"], ["--class-labels", "'cat'"]),
        (["--num-sampling-steps", "0"], ["0", "1000"]),
        (["--num-sampling-steps", "1001"], ["1001"]),
        (["--num-sampling-steps", "ten"], ["--num-sampling-steps", "ten"]),
        (["--sampler", "dimm"], ["dimm", "ddim"]),
        (["--model", "DiT-XL/2", "--image-size", "250"], ["250", "256"]),
        (["--model", "DiT-M/2"], ["DiT-M/2"]),
        (["--cache", "teacash"], ["teacash", "teacache"]),
        (["--cache", "interval:evry=2"], ["evry", "every"]),
        (["--cache", "interval:every=0"], ["every=0"]),
        (["--adacorr", "gama=1"], ["gama", "gamma"]),
        (["--adacorr", "gamma=-1"], ["gamma=-1"]),
        (["--adacorr", "budget=8,gamma=2"], ["budget=8", "gamma=2"]),
        (["--cache", "teacache:profile=nowhere.json"], ["nowhere.json", "calibrate.py"]),
        (["--compare"], ["--compare", "--adacorr"]),
        (["--out", "picture.jpg"], ["picture.jpg", ".png"]),
        (["--out", f"{__file__}/x.png"], ["--out", "test_sample.py"]),
        (["--record", str(ROOT)], ["--record", str(ROOT)]),
        (["--repeats", "0"], ["--repeats", "0"]),
        (["--num-images", "0"], ["--num-images", "0"]),
        (["--cfg-scale", "nan"], ["--cfg-scale", "nan"]),
        (["--seed", "-1"], ["--seed", "-1", "0.."]),
        (["--colour"], ["--colour"]),
        (["--adacor"], ["--adacor"]),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_before_any_weights_are_read(monkeypatch, capsys, argv, words):
    monkeypatch.setattr(pipeline, "load_checkpoint", lambda *_, **__: pytest.fail("read a checkpoint"))
    assert main(*argv) == 2
    one_line(capsys, *words)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--class-labels", "3,10"], ["10", "0..9"]),
        (["--class-labels", "-1"], ["-1", "0..9"]),
        (["--image-size", "250"], ["250", "32"]),
        (["--num-classes", "1000"], ["1000", "10"]),
        (["--ckpt", "nowhere.pt"], ["nowhere.pt"]),
        (["--model", "DiT-XL/2", "--ckpt", "dit-ti-2-cifar10"], ["DiT-XL/2", "DiT-Ti/2"]),
        (["--cfg-channels", "3", "--vae", "nowhere"], ["nowhere"]),
    ],
)
def test_mistakes_are_one_line_before_any_sampling(monkeypatch, capsys, argv, words):
    monkeypatch.setattr(pipeline.Pipeline, "sample", lambda *_, **__: pytest.fail("sampled"))
    assert main("--offline", *(["--class-labels=-1"] if argv[1] == "-1" else argv)) == 2
    one_line(capsys, *words)


def test_debug_shows_where(monkeypatch):
    with pytest.raises(ValueError, match="'cat'"):
        main("--class-labels", "cat", "--debug")


def test_interrupt_is_quiet(monkeypatch, capsys, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline.Pipeline, "sample", interrupted)
    assert main("--device", "cpu", "--out", tmp_path / "x.png") == 130
    assert capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_overflow_is_an_error_that_names_the_image(monkeypatch, capsys, tmp_path):
    broken = torch.zeros(2, 3, 32, 32)
    broken[1, 0, 0, 0] = float("nan")
    monkeypatch.setattr(pipeline.Pipeline, "sample", lambda *_, **__: broken)
    assert main("--class-labels", "0,1", "--device", "cpu", "--out", tmp_path / "x.png") == 2
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


def test_record_without_compare_has_no_numbers_that_were_not_measured(tmp_path):
    _, plain = run(tmp_path)
    missing = {
        "method",
        "compute",
        "hit_rate",
        "psnr",
        "ssim",
        "seconds_uncached",
        "speedup",
        "cache_bytes",
        "trace",
    }
    assert not missing & set(plain)
    assert plain["warm"] is False
    _, cached = run(tmp_path, "--cache", "interval:every=3")
    assert {"compute", "hit_rate", "cache_bytes", "trace"} <= set(cached)
    assert not {"psnr", "ssim", "seconds_uncached", "speedup"} & set(cached)
    assert cached["method"]["policy"] == {"name": "Interval", "every": 3, "order": 0, "warmup": 0, "align": "end"}
    assert cached["hit_rate"] == pytest.approx(3 / 6)  # steps 0, 2 and 5 are computed


def test_warning_when_nothing_was_skipped(tmp_path, capsys):
    _, record = run(tmp_path, "--cache", "never", "--compare")
    err = capsys.readouterr().err
    assert err.startswith("sample.py: warning: nothing was skipped: never ")
    assert err.count("\n") == 1
    assert record["hit_rate"] == 0
    assert record["psnr"]["mean"] == "inf"  # never is the plain model, bit for bit


def test_num_images_goes_through_the_labels_in_turn(tmp_path):
    picture, record = run(tmp_path, "--num-images", 3)
    assert record["labels"] == [3, 0, 3]
    again, _ = run(tmp_path)
    assert picture.crop((0, 0, 130, 64)).tobytes() == again.crop((0, 0, 130, 64)).tobytes()


def test_every_image_of_the_grid_is_the_decoded_one(tmp_path):
    picture, _ = run(tmp_path)
    pipe = pipeline.load(pipeline.ModelOptions(num_sampling_steps=6, device="cpu"))
    images = pipe.decode(pipe.sample(0, np.arange(2), torch.tensor([3, 0])))
    pixels = torch.from_numpy(np.array(picture))
    assert torch.equal(pixels[::2, :64:2], images[0])
    assert torch.equal(pixels[1::2, 66::2], images[1])
    assert (pixels[:, 64:66] == 255).all()


def test_bar_shows_the_live_hit_rate(tmp_path, monkeypatch):
    shown = []

    class Drawn(Progress):
        def __init__(self, total, unit, title):
            super().__init__(total, unit, title)
            shown.append((title, total, []))

        def update(self, count, text):
            super().update(count, text)
            shown[-1][2].append(text and text())

    monkeypatch.setattr(sample, "Progress", Drawn)
    run(tmp_path, "--cache", "interval:every=3", "--compare", "--repeats", 2)
    assert [desc for desc, _, _ in shown] == [
        "warm-up, uncached",
        "warm-up, interval",
        *["uncached", "interval"] * 2,
    ]
    assert [total for _, total, _ in shown] == [6] * 6
    for desc, _, texts in shown:
        rates = [f"hit rate {rate}%" for rate in (0, 50, 33, 50, 60, 50)]
        assert texts == (rates if "interval" in desc else [""] * 6)


# --------------------------------------------------------------------------------------------------- picture


@pytest.mark.parametrize(
    ("n", "columns", "rows"),
    [(1, 1, 1), (2, 2, 1), (3, 3, 1), (4, 2, 2), (7, 3, 3), (10, 5, 2), (12, 4, 3), (16, 4, 4)],
)
def test_grid_sizes(n, columns, rows):
    assert sample.grid(torch.zeros(n, 64, 64, 3, dtype=torch.uint8)).size == (columns * 66 - 2, rows * 66 - 2)


def test_large_images_are_not_enlarged():
    images = torch.arange(2 * 80 * 80 * 3).remainder(251).to(torch.uint8).view(2, 80, 80, 3)
    pixels = torch.from_numpy(np.array(sample.grid(images)))
    assert torch.equal(pixels[:, :80], images[0])
    assert torch.equal(pixels[:, 82:], images[1])


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


def test_picture_appears_whole_or_not_at_all(tmp_path):
    class Torn:
        def save(self, path, **_):
            Path(path).write_text("half")
            raise OSError("disk full")

    path = tmp_path / "x.png"
    path.write_text("old")
    with pytest.raises(OSError, match="disk full"):
        sample.save_png(path, Torn())
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# ----------------------------------------------------------------------------------------- policies, profiles

POLICY = '''
"""Compute the first steps, then every second one."""

from dataclasses import dataclass

import numpy as np

from adacorr.policies import register
from adacorr.policy import Policy


@register
@dataclass
class EveryOther(Policy):
    """Every second step, after `start` steps."""

    start: int = 1

    def decide(self, view):
        return np.full(view.images, view.step < self.start or view.step % 2 == 0)
'''


def test_policy_dropped_in_as_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr(policies, "_POLICIES", dict(policies._POLICIES))
    file = tmp_path / "every_other.py"
    file.write_text(POLICY)
    assert len(POLICY.splitlines()) < 80
    with pytest.raises(ValueError, match="every_other"):
        make_policy("every_other")
    policies.load_file(file)
    assert make_policy("every_other:start=3").start == 3
    assert "every_other" in adacorr.available()
    assert "every_other" in sample.make_parser().format_help()
    _, record = run(tmp_path, "--cache", "every_other:start=3", "--compare")
    assert record["trace"]["executed_per_step"] == [1, 1, 1, 0, 1, 0]
    assert record["psnr"]["mean"] > 15
    _, record = run(tmp_path, "--cache", "every_other", "--adacorr")  # and corrected
    assert set(record["method"]) == {"policy", "correction"}
    with pytest.raises(ValueError, match="strat"):
        make_policy("every_other:strat=3")


def test_a_calibrated_method_with_its_shipped_profile(tmp_path):
    """The profile is held to all 50 steps, the warm-up included, which runs the first few of them."""
    _, record = run(tmp_path, "--cache", "teacache:threshold=0.5", "--num-sampling-steps", "50", "--num-images", "1")
    assert 0 < record["hit_rate"] < 1


def test_a_profile_for_other_steps_is_refused(tmp_path, capsys):
    flags = ["--cache", "teacache", "--num-sampling-steps", "6", "--out", str(tmp_path / "x.png"), "--device", "cpu"]
    assert sample.main(flags) == 2
    err = capsys.readouterr().err
    assert "steps 50 there, 6 here" in err
    assert "python calibrate.py --cache teacache" in err
    assert err.count("\n") == 1
