"""`python calibrate.py` and what all calibrated methods share: their profiles, options, and images on their own."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import code, one_line
from numpy.testing import assert_allclose
from toy import make_run, tiny_dit

import calibrate
import pipeline
import profiles
from adacorr import CacheManager, make_policy
from adacorr.policies import calibrated
from adacorr.profile import FOLDER, load_profile, save_profile
from checkpoint import load_checkpoint, save_checkpoint
from runtime import Progress

STEPS, IMAGES, CLASSES = 10, 6, 5
NAMES = sorted(calibrated())
JSON = ("teacache", "magcache")  # small arrays; the others are written as safetensors
ROUNDING = {"fastcache": 0.3}  # it weighs pairs of steps by their mean change over the batch


@pytest.fixture(scope="module")
def ckpt(folder, model):
    save_checkpoint(folder / "tiny.safetensors", model.state_dict(), model.config)
    return folder / "tiny.safetensors"


@pytest.fixture
def pipe(ckpt):
    return pipeline.load(pipeline.ModelOptions(ckpt=str(ckpt), num_sampling_steps=STEPS, device="cpu"))


def measure(ckpt, name, out, *flags, images=IMAGES):
    """The profile that the command writes."""
    given = ["--ckpt", ckpt, "--num-sampling-steps", STEPS, "--num-images", images, "--device", "cpu"]
    assert code(calibrate.main, "--cache", name, "--out", out, *given, *flags) == 0
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


@pytest.mark.parametrize("name", ["adacorr", "magcache"])
def test_progress_counts_the_steps_of_all_images(ckpt, tmp_path, monkeypatch, name):
    made = []

    class Counted(Progress):
        def __init__(self, *given):
            super().__init__(*given)
            made.append(self)

    monkeypatch.setattr(calibrate, "Progress", Counted)
    monkeypatch.setattr(profiles, "Progress", Counted)
    measure(ckpt, name, tmp_path / "p.safetensors", "--batch-size", 2, images=3)
    (progress,) = made
    assert progress.done == progress.total >= 3 * STEPS


def labels(count):
    return torch.arange(count) % CLASSES


def test_the_report_and_the_header(ckpt, tmp_path, capsys):
    out = tmp_path / "new" / "p.json"
    profile = measure(ckpt, "teacache", out, "--seed", 5, "--cfg-scale", 4)
    assert profile.method == "teacache"
    assert profile.model_id == load_checkpoint(ckpt).sha256
    assert (profile.sampler, profile.num_sampling_steps, profile.cfg_scale) == ("ddim", STEPS, 4.0)
    notes = profile.notes
    assert (notes["checkpoint"], notes["seed"], notes["images"]) == ("tiny.safetensors", 2**31 + 5, IMAGES)
    assert notes["pairs"] == (STEPS - 1) * IMAGES
    assert notes["made_with"][:4] == ["python", "calibrate.py", "--cache", "teacache"]
    assert [p.name for p in out.parent.iterdir()] == ["p.json"]
    text, errors = capsys.readouterr()
    assert errors == ""
    assert text.startswith(f"{out}: {out.stat().st_size} bytes; ")
    assert f"pairs {(STEPS - 1) * IMAGES}" in text
    assert text.count("\n") == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_run_of_the_same_kind_takes_the_profile(made, pipe, name):
    profile = load_profile(made(name))
    assert profile.arrays
    assert all(np.isfinite(array).all() for array in profile.arrays.values())
    json.dumps(profile.notes, allow_nan=False)
    manager = CacheManager(make_policy(f"{name}:profile={made(name)}"))
    found = pipe.sample(7, np.arange(3), labels(3), manager)
    assert bool(found.isfinite().all())
    assert manager.trace.done == STEPS
    assert pipe.model.cache is None


@pytest.mark.parametrize("name", NAMES)
def test_an_array_that_is_missing_or_of_another_shape_is_named(made, model, tmp_path, name):
    profile, path = load_profile(made(name)), tmp_path / "bad.safetensors"
    run = make_run(model, 1, 2, STEPS, model_id=profile.model_id, sampler="ddim", cfg_scale=1.5)
    forms = ["increment", "residual"] if name == "fastcache" else [None]
    for form in forms:
        policy = make_policy(f"{name}:profile={made(name)}" + (f",form={form}" if form else ""))
        policy.begin(run)
        policy.profile = str(path)
        for key in (key for key in profile.arrays if form is None or key.startswith(form)):
            rest = {other: array for other, array in profile.arrays.items() if other != key}
            for arrays in (rest, rest | {key: profile.arrays[key][None]}, rest | {key: profile.arrays[key][:-1]}):
                if key == "coefficients" and key in arrays and arrays[key].ndim == 1:
                    continue  # of any degree
                save_profile(path, replace(profile, arrays=arrays))
                with pytest.raises(ValueError, match=rf"{name}: the profile's \w+ must have shape .*--cache {name}"):
                    policy.begin(run)


@pytest.mark.parametrize("name", NAMES)
def test_shipped_profiles_are_read(name):
    (path,) = FOLDER.glob(f"{name}-*")
    profile = load_profile(path)
    assert (profile.method, profile.sampler, profile.num_sampling_steps, profile.cfg_scale) == (name, "ddim", 50, 1.5)


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

    def spy(self, seed, indices, labels, *more):
        seen.append((seed, indices.tolist(), labels.tolist()))
        return sample(self, seed, indices, labels, *more)

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


@pytest.mark.parametrize("name", NAMES)
def test_a_calibration_that_saw_nothing_cannot_fit(name):
    with pytest.raises(ValueError, match="nothing was observed"):
        calibrated()[name].calibration().fit()


@pytest.mark.parametrize(
    ("name", "steps", "images", "words"),
    [
        *((name, 1, 4, "at least 2 steps") for name in NAMES),
        ("fastcache", 10, 3, "is outside 4..10000"),
        ("lazydit", 3, 1, "is outside 2..10000"),
        ("teacache", 3, 2, "4 pairs cannot fit degree 4"),
    ],
)
def test_too_little_to_fit_is_one_line_and_no_file(ckpt, tmp_path, capsys, name, steps, images, words):
    flags = ["--ckpt", ckpt, "--device", "cpu", "--num-sampling-steps", steps, "--num-images", images]
    assert code(calibrate.main, "--cache", name, "--out", tmp_path / "p.json", *flags) == 2
    one_line(capsys, words)
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_method(capsys):
    assert code(calibrate.main, "--help") == 0
    text = capsys.readouterr().out
    assert all(name in text for name in NAMES)


def test_what_is_not_finite_is_no_profile(monkeypatch):
    calibration = calibrated()["magcache"].calibration()
    calibration.images, calibration.info = 4, SimpleNamespace(num_steps=5)
    calibration.fitted = lambda: ({"ratio": np.array([1.0, np.nan]), "other": np.zeros(2)}, {})
    with pytest.raises(ValueError, match="^ratio came out infinite or undefined: calibrate with --dtype fp32"):
        calibration.fit()
