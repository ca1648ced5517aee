"""python -m benchmarks.phases: the parts of a run add up, and what it does not know is refused."""

import re

import pytest
from toy import save_tiny

from benchmarks.phases import PARTS, main


def test_the_parts_are_shares_of_the_run(tmp_path, capsys):
    before = {name: getattr(*part) for name, part in PARTS.items()}
    options = ["--ckpt", str(save_tiny(tmp_path / "tiny.safetensors")), "--num-sampling-steps", "12", "--device", "cpu"]
    options += ["--adacorr", "budget=4", "--calibrate", "off", "--batch-size", "2", "--repeats", "1"]
    assert main(options) == 0
    head, *parts, last = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"batch 2, compute 0\.\d{3}: speed-up .* of 1 / compute", head)
    shares = [float(line.partition("%")[0]) for line in parts]
    assert len(shares) == len(PARTS)
    assert all(share > 0 for name, share in zip(PARTS, shares, strict=True) if name != "what they leave")
    assert 50 < sum(shares) <= 100.5
    assert last.startswith("the blocks took")
    assert before == {name: getattr(*part) for name, part in PARTS.items()}


@pytest.mark.parametrize("options", [[], ["--adacorr", "literal"], ["--cache", "never", "--adacorr"]], ids=str)
def test_another_method_is_refused(options, capsys):
    assert main(options) == 2
    assert "give --adacorr, and no --cache" in capsys.readouterr().err


def test_another_sampler_is_refused(tmp_path, capsys):
    checkpoint = str(save_tiny(tmp_path / "tiny.safetensors"))
    assert main(["--ckpt", checkpoint, "--adacorr", "--sampler", "ddpm", "--device", "cpu"]) == 2
    assert "give ddim" in capsys.readouterr().err
