"""`python calibrate.py`: the profile it writes is the one that its method takes, on this model and run only."""

import argparse
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from toy import tiny_dit

import calibrate
import pipeline
from adacorr import CacheManager, make_policy
from adacorr.policies import calibrated
from adacorr.profile import load_profile
from diffusion import make_sampler
from download import load_checkpoint, save_checkpoint

STEPS, IMAGES, CLASSES = 10, 6, 5
NAMES = sorted(calibrated())
JSON = ("teacache", "magcache")  # small arrays; the others are written as safetensors
ROUNDING = {"fastcache": 0.3}  # it weighs pairs of steps by their mean change over the batch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("calibrate")


@pytest.fixture(scope="module")
def ckpt(folder):
    model = tiny_dit(num_classes=CLASSES)
    save_checkpoint(folder / "tiny.safetensors", model.state_dict(), model.config)
    return folder / "tiny.safetensors"


@pytest.fixture
def pipe(ckpt):
    parser = argparse.ArgumentParser()
    pipeline.add_model_flags(parser)
    args = parser.parse_args(["--ckpt", str(ckpt), "--num-sampling-steps", str(STEPS), "--device", "cpu"])
    return pipeline.load(argparse.Namespace(**vars(args), cache=None, adacorr=None))[0]


def main(*argv):
    """Exit code of `calibrate.main`, argparse's own included."""
    try:
        return calibrate.main([str(a) for a in argv])
    except SystemExit as stop:
        return stop.code


def measure(ckpt, name, out, *flags, images=IMAGES):
    """The profile that the command writes."""
    given = ["--ckpt", ckpt, "--num-sampling-steps", STEPS, "--num-images", images, "--device", "cpu"]
    assert main("--cache", name, "--out", out, *given, *flags) == 0
    return load_profile(out)


@pytest.fixture(scope="module")
def made(ckpt, folder):
    """Name -> the file that the command wrote for it, measured once."""

    def make(name):
        path = folder / f"{name}.{'json' if name in JSON else 'safetensors'}"
        if not path.exists():
            measure(ckpt, name, path)
        return path

    return make


def labels(count):
    return torch.arange(count) % CLASSES


# ----------------------------------------------------------------------------------------------- what is written


def test_the_report_and_the_header(ckpt, tmp_path, capsys):
    out = tmp_path / "new" / "p.json"
    profile = measure(ckpt, "teacache", out, "--seed", 5, "--cfg-scale", 4)
    assert profile.method == "teacache"
    assert profile.model_id == load_checkpoint(ckpt).sha256
    assert (profile.sampler, profile.num_sampling_steps, profile.cfg_scale) == ("ddim", STEPS, 4.0)
    notes = profile.notes
    assert (notes["checkpoint"], notes["seed"], notes["images"]) == ("tiny.safetensors", 2**31 + 5, IMAGES)
    assert notes["pairs"] == (STEPS - 1) * IMAGES
    assert notes["made_with"][:5] == ["python", "-m", "calibrate", "--cache", "teacache"]
    assert [p.name for p in out.parent.iterdir()] == ["p.json"]
    text, errors = capsys.readouterr()
    assert errors == ""
    assert text.startswith(f"{out}: {out.stat().st_size} bytes; ")
    assert f"pairs {(STEPS - 1) * IMAGES}" in text
    assert text.count("\n") == 1


@pytest.mark.parametrize("name", NAMES)
def test_arrays_and_notes_are_finite_and_plain(made, name):
    profile = load_profile(made(name))
    assert profile.arrays
    assert all(np.isfinite(array).all() for array in profile.arrays.values())
    json.dumps(profile.notes, allow_nan=False)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_of_the_same_kind_takes_the_profile(made, pipe, name):
    manager = CacheManager(make_policy(f"{name}:profile={made(name)}"))
    found = pipe.sample(7, np.arange(3), labels(3), manager)
    assert bool(found.isfinite().all())
    assert manager.trace.done == STEPS
    assert pipe.model.cache is None


@pytest.mark.parametrize("name", NAMES)
def test_other_runs_refuse_it(made, pipe, name):
    others = {
        f"steps {STEPS} there, 12 here": replace(pipe, sampler=make_sampler("ddim", 12)),
        "sampler ddim there, ddim:eta=0.5 here": replace(pipe, sampler=make_sampler("ddim:eta=0.5", STEPS)),
        "guidance 1.5 there, 4.0 here": replace(pipe, cfg_scale=4.0),
        "0123 here": replace(pipe, checkpoint=replace(pipe.checkpoint, sha256="0123" * 16)),
    }
    manager = CacheManager(make_policy(f"{name}:profile={made(name)}"))
    for words, other in others.items():
        with pytest.raises(ValueError, match="does not fit this run") as caught:
            other.sample(7, np.arange(1), labels(1), manager)
        assert words in str(caught.value)
        assert other.model.cache is None


def test_another_method_refuses_it(made, pipe):
    manager = CacheManager(make_policy(f"teacache:profile={made('magcache')}"))
    with pytest.raises(ValueError, match="method magcache there, teacache here"):
        pipe.sample(7, np.arange(1), labels(1), manager)


@pytest.mark.parametrize("name", NAMES)
def test_batches_do_not_matter(made, ckpt, tmp_path, name):
    whole, close = load_profile(made(name)).arrays, ROUNDING.get(name, 2e-3)
    for size in (1, 4):  # 4 leaves a batch of 2
        parts = measure(ckpt, name, tmp_path / f"{size}.safetensors", "--batch-size", size).arrays
        assert sorted(parts) == sorted(whole)
        for key, array in whole.items():
            assert_allclose(parts[key], array, rtol=close, atol=close * max(np.abs(array).max(), 1e-9), err_msg=key)


def test_the_same_command_gives_the_same_profile_and_another_seed_another(made, ckpt, tmp_path):
    first = load_profile(made("magcache")).arrays["ratio"]
    assert np.array_equal(measure(ckpt, "magcache", tmp_path / "a.json").arrays["ratio"], first)
    assert not np.allclose(measure(ckpt, "magcache", tmp_path / "b.json", "--seed", 1).arrays["ratio"], first)


def test_an_unconditional_model_without_guidance(tmp_path):
    model = tiny_dit(num_classes=0)
    save_checkpoint(tmp_path / "free.safetensors", model.state_dict(), model.config)
    profile = measure(tmp_path / "free.safetensors", "magcache", tmp_path / "p.json", "--cfg-scale", 1)
    assert profile.cfg_scale == 1.0
    assert profile.arrays["ratio"].shape == (STEPS,)


# ------------------------------------------------------------------------------------------------- what is observed


@pytest.mark.parametrize(
    ("images", "batch", "expected"),
    [
        (5, 8, [([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])]),
        (2, 8, [([0, 1], [0, 2])]),  # spread over the classes, not the first two
        (10, 4, [([0, 1, 2, 3], [0, 0, 1, 1]), ([4, 5, 6, 7], [2, 2, 3, 3]), ([8, 9], [4, 4])]),
        (3, 1, [([0], [0]), ([1], [1]), ([2], [3])]),
    ],
)
def test_images_labels_and_the_seed_that_is_no_seed_to_evaluate_on(
    ckpt, tmp_path, monkeypatch, images, batch, expected
):
    seen, sample = [], pipeline.Pipeline.sample

    def spy(self, seed, indices, labels, cache):
        seen.append((seed, indices.tolist(), labels.tolist()))
        return sample(self, seed, indices, labels, cache)

    monkeypatch.setattr(pipeline.Pipeline, "sample", spy)
    measure(ckpt, "magcache", tmp_path / "p.json", "--seed", 3, "--batch-size", batch, images=images)
    assert seen == [(2**31 + 3, *part) for part in expected]


@pytest.mark.parametrize("name", NAMES)
def test_calibration_changes_nothing_and_leaves_no_cache(pipe, name):
    manager = CacheManager(calibrated()[name].calibration())
    watched = pipe.sample(7, np.arange(3), labels(3), manager)
    assert pipe.model.cache is None
    assert manager.trace.hit_rate == 0
    torch.testing.assert_close(watched, pipe.sample(7, np.arange(3), labels(3)), rtol=1e-4, atol=1e-5)


def test_no_cache_is_left_after_an_interrupt(pipe):
    class Stops(calibrated()["teacache"].calibration):
        def computed(self, view, ran):
            if view.step == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate.observe(Stops(), pipe, 0, 2, 2)
    assert pipe.model.cache is None


# --------------------------------------------------------------------------------------------------------- errors


def one_line(capsys, *words):
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("calibrate: error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert all(word in err for word in words), err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--cache", "teacash"], ["teacash", "magcache", "did you mean teacache?"]),
        (["--cache", "interval"], ["interval", "measured"]),  # there is one of that name, without a calibration
        (["--cache", "teacache:threshold=0.1"], ["teacache:threshold=0.1", "did you mean teacache?"]),
        (["--out", "p.npz"], ["p.npz", ".json", ".safetensors"]),
        (["--out", "p"], [".json", ".safetensors"]),
        (["--out", f"{__file__}/p.json"], ["--out", "test_calibrate.py", "not a folder"]),
        (["--num-images", "0"], ["--num-images", "0"]),
        (["--num-images", "many"], ["--num-images", "many"]),
        (["--batch-size", "0"], ["--batch-size", "0"]),
        (["--seed", "-1"], ["--seed", "-1"]),
        (["--seed", str(2**31)], ["--seed", str(2**31)]),
        (["--num-sampling-steps", "0"], ["0", "1000"]),
        (["--num-sampling-steps", "1001"], ["1001"]),
        (["--cfg-scale", "nan"], ["--cfg-scale", "nan"]),
        (["--sampler", "dimm"], ["dimm", "ddim"]),
        (["--colour"], ["--colour"]),
    ],
)
def test_mistakes_are_one_line_before_any_weights_are_read(tmp_path, monkeypatch, capsys, argv, words):
    monkeypatch.setattr(pipeline, "load_checkpoint", lambda *_, **__: pytest.fail("read a checkpoint"))
    monkeypatch.chdir(tmp_path)
    assert main("--cache", "teacache", "--out", "p.json", *argv) == 2
    one_line(capsys, *words)
    assert list(tmp_path.iterdir()) == []


def test_what_is_required(capsys):
    assert main() == 2
    one_line(capsys, "--cache", "--out")


def test_a_folder_that_is_not_writable(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("os.access", lambda *_: False)  # tests may run as root, who may write anywhere
    assert main("--cache", "teacache", "--out", tmp_path / "p.json") == 2
    one_line(capsys, "--out", "not writable")


def test_a_missing_checkpoint(tmp_path, capsys):
    assert main("--cache", "teacache", "--out", tmp_path / "p.json", "--ckpt", "nowhere.pt", "--offline") == 2
    one_line(capsys, "nowhere.pt")


@pytest.mark.parametrize("name", NAMES)
def test_too_little_to_fit_is_one_line_and_no_file(ckpt, tmp_path, capsys, name):
    flags = ["--ckpt", ckpt, "--device", "cpu", "--num-sampling-steps", 1, "--num-images", 2]
    assert main("--cache", name, "--out", tmp_path / "p.json", *flags) == 2
    one_line(capsys)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_is_quiet_and_leaves_the_old_profile(ckpt, tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    out = tmp_path / "p.json"
    out.write_text("old")
    monkeypatch.setattr(pipeline.Pipeline, "sample", interrupted)
    assert main("--cache", "teacache", "--out", out, "--ckpt", ckpt) == 130
    assert capsys.readouterr() == ("", "")
    assert out.read_text() == "old"


def test_outside_of_a_clone(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "pipeline", None)
    assert main("--cache", "teacache", "--out", tmp_path / "p.json") == 2
    one_line(capsys, "root of a clone")


def test_help_names_every_method(capsys):
    assert main("--help") == 0
    text = capsys.readouterr().out
    assert all(name in text for name in NAMES)


def test_labels_of_a_model_without_classes():
    seen = []

    def sample(seed, indices, labels, cache):
        seen.append((indices.tolist(), labels))

    fake = SimpleNamespace(model=SimpleNamespace(num_classes=0), sample=sample)
    calibrate.observe(calibrated()["teacache"].calibration(), fake, 0, 3, 2)
    assert seen == [([0, 1], None), ([2], None)]
