"""`python -m adacorr methods`: every method and both forms of AdaCorrection, with what a cache of them holds."""

import argparse
import re
import sys

import numpy as np
import pytest
import torch
from toy import tiny_dit

import calibrate
import pipeline
from adacorr import AdaCorrection, Algorithm1, CacheManager, available, make_policy, profile
from adacorr.__main__ import Method, main, methods, show
from adacorr.policies import calibrated, load_file
from checkpoint import save_checkpoint

FORMS = ("--adacorr", "--adacorr literal")


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    model, path = tiny_dit(), tmp_path_factory.mktemp("methods") / "tiny.safetensors"
    save_checkpoint(path, model.state_dict(), model.config)
    return path


@pytest.fixture
def nothing_shipped(tmp_path, monkeypatch):
    """An empty folder in place of the one of shipped profiles."""
    monkeypatch.setattr(profile, "FOLDER", tmp_path)
    return tmp_path


def flags(ckpt, steps=6):
    return ["--ckpt", str(ckpt), "--num-sampling-steps", str(steps), "--device", "cpu"]


def code(*argv):
    """Exit code of `main`, argparse's own included."""
    try:
        return main([str(a) for a in argv])
    except SystemExit as stop:
        return stop.code


def listing(capsys, *argv):
    """Name -> (granularity, calibration, MB, text) of what is printed."""
    assert code("methods", *argv) == 0
    out, err = capsys.readouterr()
    assert err == ""
    head, *lines = [re.split(r"  +", line, maxsplit=4) for line in out.splitlines()]
    assert head == ["method", "granularity", "calibration", "MB/image"]
    return {name: rest for name, *rest in lines}


def test_every_method_has_a_line(ckpt, capsys, nothing_shipped):
    found = listing(capsys, *flags(ckpt))
    assert list(found) == [*available(), *FORMS]
    for name, (granularity, calibration, held, text) in found.items():
        assert calibration == ("profile" if name in calibrated() else "none")
        if name in available():
            assert granularity == make_policy(name).granularity
        if held == "-":
            assert name in calibrated()
            assert "no profile for this run" in text
            assert f"python calibrate.py --cache {name} --out FILE" in text
        else:
            assert re.fullmatch(r"\d+\.\d\d", held)
            assert name not in available() or text == available()[name]
    assert found["never"][2] == "0.00"
    assert float(found["--adacorr"][2]) > 0
    assert float(found["--adacorr literal"][2]) > 0


def test_a_profile_that_fits_turns_the_reason_into_a_number(ckpt, capsys, nothing_shipped):
    out = nothing_shipped / "magcache.json"
    assert calibrate.main(["--cache", "magcache", "--out", str(out), "--num-images", "2", *flags(ckpt)]) == 0
    capsys.readouterr()
    fits = listing(capsys, *flags(ckpt))["magcache"]
    assert re.fullmatch(r"\d+\.\d\d", fits[2])
    assert fits[3] == available()["magcache"]
    assert listing(capsys, *flags(ckpt, steps=5))["magcache"][2] == "-"


def test_bytes_are_those_of_one_image(ckpt, nothing_shipped):
    parser = argparse.ArgumentParser()
    pipeline.add_model_flags(parser)
    pipe, _ = pipeline.load(argparse.Namespace(**vars(parser.parse_args(flags(ckpt))), cache=None, adacorr=None))
    found = {row.name: row for row in methods(pipe)}
    managers = {
        "teacache": CacheManager(make_policy("teacache:profile=none")),
        "first_block": CacheManager(make_policy("first_block")),
        "interval": CacheManager(make_policy("interval")),
        "--adacorr": CacheManager(correction=AdaCorrection()),
        "--adacorr literal": CacheManager(correction=Algorithm1()),
    }
    for name, manager in managers.items():
        pipe.sample(3, np.array([5]), torch.tensor([2]), manager)  # another image, and another label
        assert found[name].bytes == (None if name == "teacache" else manager.bytes)
        assert manager.bytes > 0
    assert found["teacache"].note
    assert not found["interval"].note
    assert pipe.model.cache is None


def test_an_unconditional_model(tmp_path, capsys, nothing_shipped):
    model = tiny_dit(num_classes=0)
    save_checkpoint(tmp_path / "free.safetensors", model.state_dict(), model.config)
    found = listing(capsys, *flags(tmp_path / "free.safetensors"), "--cfg-scale", 1)
    assert list(found) == [*available(), *FORMS]
    assert float(found["interval"][2]) > 0


def test_a_new_file_is_listed_with_its_reason(ckpt, capsys, tmp_path, monkeypatch, nothing_shipped):
    from adacorr import policies

    monkeypatch.setattr(policies, "_POLICIES", dict(policies._POLICIES))
    (tmp_path / "picky.py").write_text(
        "from dataclasses import dataclass\n"
        "from adacorr.policies import register\n"
        "from adacorr.policy import Policy\n"
        "@register\n"
        "@dataclass\n"
        "class Picky(Policy):\n"
        "    'Takes no model.'\n"
        "    granularity = 'whim'\n"
        "    def begin(self, run):\n"
        "        raise ValueError('picky: not this model')\n"
    )
    load_file(tmp_path / "picky.py")
    assert listing(capsys, *flags(ckpt))["picky"] == ["whim", "none", "-", "picky: not this model"]


def test_columns_line_up():
    rows = [
        Method("a", "step", False, 3 * 2**20 // 2, "First."),
        Method("longer", "token, block", True, None, "Second.", "why not"),
    ]
    assert show(rows) == (
        "method  granularity   calibration  MB/image\n"
        "a       step          none         1.50      First.\n"
        "longer  token, block  profile      -         why not"
    )


# --------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["command"]),
        (["method"], ["method", "methods"]),
        (["methods", "--colour"], ["--colour"]),
        (["methods", "--num-sampling-steps", "ten"], ["--num-sampling-steps", "ten"]),
        (["methods", "--num-sampling-steps", "0"], ["0", "1000"]),
        (["methods", "--sampler", "dimm"], ["dimm", "ddim"]),
        (["methods", "--ckpt", "nowhere.pt"], ["nowhere.pt"]),
    ],
)
def test_mistakes_are_one_line(monkeypatch, capsys, argv, words):
    monkeypatch.setattr(pipeline.Pipeline, "sample", lambda *_, **__: pytest.fail("sampled"))
    assert code(*argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("adacorr")
    assert ": error: " in err
    assert err.count("\n") == 1
    assert all(word in err for word in words), err


def test_an_interrupt_is_quiet(ckpt, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline.Pipeline, "sample", interrupted)
    assert code("methods", *flags(ckpt)) == 130
    assert capsys.readouterr() == ("", "")


def test_outside_of_a_clone(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pipeline", None)
    assert code("methods") == 2
    assert "root of a clone" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--help"], ["methods", "--help"]])
def test_help(capsys, argv):
    assert code(*argv) == 0
    assert "methods" in capsys.readouterr().out
