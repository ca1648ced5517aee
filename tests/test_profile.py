"""Profiles: round trips of both formats, files that cannot be read, and which profile serves which run."""

import copy
import json
import math
import stat

import numpy as np
import pytest
import safetensors.numpy
import torch
import toy
from toy import make_view, tiny_dit

from adacorr import profile as profiles
from adacorr.calibration import Calibration
from adacorr.policy import RunInfo
from adacorr.profile import Profile, find_profile, load_profile, save_profile

SHA = "0123456789abcdef" * 4
OTHER = "fedcba9876543210" * 4
AWKWARD = [0.1 + 0.2, 1 / 3, math.pi * 1e-300, 5e-324, -0.0, float(np.nextafter(1.0, 2.0)), 1.7976931348623157e308]
SUFFIXES = ["json", "safetensors"]


def make(method="rule", arrays=None, **fields):
    arrays = {"table": np.arange(3.0)} if arrays is None else arrays
    made = {"model_id": SHA, "sampler": "ddim", "num_sampling_steps": 10, "cfg_scale": 1.5, **fields}
    return Profile(method, arrays, **made)


def make_run(**fields):
    steps = fields.pop("steps", 10)
    made = {"cfg_scale": 1.5, "model_id": SHA, "sampler": "ddim", **fields}
    return RunInfo(1, 2, np.arange(steps)[::-1], [], 16, 32, torch.device("cpu"), (400, 600), **made)


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """An empty folder in place of the one of shipped profiles."""
    folder = tmp_path / "shipped"
    folder.mkdir()
    monkeypatch.setattr(profiles, "FOLDER", folder)
    return folder


def test_its_arrays_do_not_fill_the_screen():
    assert repr(make(arrays={"table": np.arange(3.0)})) == repr(make(arrays={"table": np.arange(5000.0)}))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_round_trip(tmp_path, suffix):
    path = tmp_path / "new" / "folder" / f"p.{suffix}"
    arrays = {
        "awkward": np.array(AWKWARD),
        "turned": np.arange(6.0).reshape(2, 3).T,  # not contiguous
        "one": np.array(2.5),
        "deep": np.arange(24.0).reshape(2, 3, 4),
        "none": np.zeros((0, 3)),
        **{str(dtype): np.array([[0, 1], [3, 2]]).astype(dtype) for dtype in ("f2", "f4", "i8", "?")},
    }
    notes = {"text": "ä → b", "list": [1, 2.5, None], "inner": {"a": True}}
    before = make(arrays=arrays, sampler="ddim:eta=0.5", notes=notes)
    save_profile(path, before)
    after = load_profile(path)
    assert after.header == before.header
    assert type(after.num_sampling_steps) is int
    assert sorted(after.arrays) == sorted(arrays)
    for name in set(arrays) - ({"none"} if suffix == "json" else set()):
        expected = arrays[name].astype(np.float64) if suffix == "json" else arrays[name]  # which keeps types
        found = after.arrays[name]
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.tobytes() == expected.tobytes()  # every bit, the sign of -0.0 included
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert stat.S_IMODE(path.stat().st_mode) & 0o044 == 0o044  # others can read it
    if suffix == "json":
        json.loads(path.read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize("name", ["p", "p.npz", "p.JSON", "json"])
def test_other_suffixes_are_refused(tmp_path, name):
    for call in (lambda path: save_profile(path, make()), load_profile):
        with pytest.raises(ValueError, match=r"must end in \.json or \.safetensors"):
            call(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def good(**changes):
    header = {**make().header, "arrays": {"table": [0.0]}, **changes}
    return json.dumps({key: value for key, value in header.items() if value != "left out"})


def is_one_clear_line(path, *words):
    with pytest.raises(ValueError, match="cannot be read|is no file") as caught:
        load_profile(path)
    text = str(caught.value)
    assert text.isprintable()  # so it is one line
    assert len(text) < 600 + len(str(path))
    assert all(word in text for word in (str(path), "python calibrate.py", *words)), text


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("", "JSON"),
        (b"\x80\x04\x95\x00", "utf-8"),  # a pickle is not even text
        ("{}", "arrays"),
        ("[" * 100_000, ""),
        (good(arrays=[1, 2]), ""),
        (good(arrays={"table": "abc"}), "abc"),
        (good(arrays={"table": [[1], [2, 3]]}), ""),
        (good(arrays={"table": [10**400]}), ""),
        (good(extra=1), "extra"),
        (good(**{"two\nlines \x1b[2J" + "x" * 10_000: 1}), ""),
        (good(method="left out"), "method"),
        (good(method=5), "method is 5"),
        (good(sampler="ddim\nrm -rf"), "sampler"),
        (good(num_sampling_steps="10"), "num_sampling_steps is '10'"),
        (good(notes="text"), "notes"),
    ],
)
def test_unreadable_json_is_one_line(tmp_path, content, word):
    path = tmp_path / "bad.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    is_one_clear_line(path, word)


@pytest.mark.parametrize(
    "metadata",
    [None, {"other": "x"}, {"profile": "[1]"}, {"profile": good()}, b"", b"{", (10**9).to_bytes(8, "little")],
)
def test_unreadable_safetensors_is_one_line(tmp_path, metadata):
    path = tmp_path / "bad.safetensors"
    if isinstance(metadata, bytes):
        path.write_bytes(metadata)
    else:
        safetensors.numpy.save_file({"table": np.zeros(2)}, path, metadata=metadata)
    is_one_clear_line(path)


def test_a_missing_file_is_one_line_and_notes_may_be_missing(tmp_path):
    (tmp_path / "p.json").write_text(good(notes="left out"))
    assert load_profile(tmp_path / "p.json").notes == {}
    is_one_clear_line(tmp_path / "nowhere.json")
    with pytest.raises(ValueError, match=r"nowhere.json is no file: .*python calibrate.py"):
        find_profile("rule", str(tmp_path / "nowhere.json"), make_run())


@pytest.mark.parametrize(
    ("run", "method", "text"),
    [
        ({}, "other", "method rule there, other here"),
        ({"model_id": OTHER}, "rule", f"checkpoint {SHA[:12]} there, {OTHER[:12]} here"),
        ({"sampler": "ddim:eta=0.5"}, "rule", "sampler ddim there, ddim:eta=0.5 here"),
        ({"sampler": None}, "rule", "sampler ddim there, unknown here"),
        ({"steps": 50}, "rule", "steps 10 there, 50 here"),
        ({"cfg_scale": 4.0}, "rule", "guidance 1.5 there, 4.0 here"),
    ],
)
def test_every_field_that_differs_is_named(tmp_path, run, method, text):
    path = tmp_path / "p.json"
    save_profile(path, make())
    with pytest.raises(ValueError, match="does not fit this run") as caught:
        find_profile(method, str(path), make_run(**run))
    assert f"profile={path}" in str(caught.value)
    assert f"({text})" in str(caught.value)  # and no other field
    assert f"python calibrate.py --cache {method} --out FILE" in str(caught.value)


def test_auto_takes_the_one_that_fits(shipped):
    made = {
        "rule-10.json": make(arrays={"table": np.array([1.0])}),
        "rule-50.safetensors": make(arrays={"table": np.array([2.0], np.float16)}, num_sampling_steps=50),
        "rule-ddpm.json": make(arrays={"table": np.array([3.0])}, sampler="ddpm"),
        "rule-other.json": make(arrays={"table": np.array([4.0])}, model_id=OTHER),
        "ruler.json": make("ruler", arrays={"table": np.array([5.0])}),  # another method, whose name begins alike
    }
    for name, profile in made.items():
        save_profile(shipped / name, profile)
    (shipped / "rule.txt").write_text("a note, no profile")

    def found(method="rule", **run):
        return find_profile(method, "auto", make_run(**run)).arrays["table"].item()

    assert found() == 1
    assert found(steps=50) == 2
    assert found(sampler="ddpm") == 3
    assert found(model_id=OTHER) == 4
    assert found("ruler") == 5
    with pytest.raises(ValueError, match="rule has no profile for this run") as caught:
        found(cfg_scale=4.0)
    text = str(caught.value)
    assert "rule-10.json: guidance 1.5 there, 4.0 here; rule-50.safetensors: steps 50 there, 10 here, guidance" in text
    assert all(name in text for name in made)
    assert "rule.txt" not in text
    assert "python calibrate.py --cache rule --out FILE and the flags of this run for model and sampler" in text


def test_auto_without_any_profile(shipped, monkeypatch):
    save_profile(shipped / "other.json", make("other"))
    with pytest.raises(ValueError, match=r"rule has no profile for this run \(none is shipped\)"):
        find_profile("rule", "auto", make_run())
    monkeypatch.setattr(profiles, "FOLDER", shipped / "nowhere")  # an install that ships none at all
    with pytest.raises(ValueError, match="none is shipped"):
        find_profile("rule", "auto", make_run())


def test_a_calibration_computes_everything_and_is_shared_by_its_runs():
    observer, model = Calibration(), tiny_dit()
    assert observer.decide(make_view(toy.make_run(model, 3), 0, torch.zeros(1, 3, 16, 32))).tolist() == [True] * 3
    assert copy.deepcopy(observer) is observer
    assert observer.predictor is None
