"""The benchmarks run on a small model and print what they write: benchmarks/tables.py."""

import json

import pytest
from commands import code, printed
from toy import save_tiny

from adacorr import available
from benchmarks import tables


@pytest.fixture
def ckpt(tmp_path):
    return save_tiny(tmp_path / "tiny.safetensors", input_size=16, patch_size=4, depth=3)  # SSIM needs 11 pixels


def run(out, *words):
    """The records of the JSON file that a command writes."""
    assert code(tables.main, *words, "--out", out) == 0
    return json.loads(out.read_text())["rows"]


def test_bytes_of_every_method(ckpt, tmp_path, capsys):
    records = run(tmp_path / "x.json", "memory --num-sampling-steps 6 --device cpu --ckpt", ckpt)
    cells = printed(capsys)[1:]
    assert [name.strip("`") for name, _, _ in cells] == [*available(), "--adacorr", "--adacorr literal"]
    held = {record["method"]: record["bytes"] for record in records}
    assert held["never"] == 0
    assert held["interval"] == 3 * 2 * 2 * 16 * 32 * 4  # blocks, branches, halves, tokens, width, float32
    assert held["teacache"] is None  # a table cannot stop at a method that needs a profile of this model
    assert dict((name.strip("`"), text) for name, _, text in cells)["teacache"].startswith("refused: teacache has no")
    for (_, granularity, text), record in zip(cells, records, strict=True):
        assert granularity == record["granularity"]
        assert record["bytes"] is None or text == f"{record['bytes'] / 1e6:.2f}"


def test_the_codebook_of_adacache(ckpt, tmp_path, capsys):
    common = "codebook --images 3 --num-sampling-steps 6 --device cpu --ckpt", ckpt
    (record,) = run(tmp_path / "x.json", *common)
    _, (images, changes, codebook) = printed(capsys)
    assert (images, changes) == ("3", "15")  # of every step but the first
    rates = [rate for _, rate in (pair.split(":") for pair in codebook.strip("`").split("/"))]
    assert rates == ["6", "5", "4", "3", "2", "1"]
    assert record["keys"] == sorted(record["keys"])
    assert record["keys"][0] > 0


def test_compared_tables(ckpt, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tables, "GAMMA", ("gamma=1", "budget=3"))
    changes = {"5 steps": {"steps": 5}, "batch 1": {"images": 1}, "guidance 1": {"cfg_scale": 1.0}}
    monkeypatch.setattr(tables, "PROTOCOLS", changes)
    common = "--images 2 --num-sampling-steps 8 --device cpu --ckpt", ckpt
    records = run(tmp_path / "x.json", "gamma", *common)
    assert [row[0] for row in printed(capsys)[1:]] == ["`--adacorr gamma=1`", "`--adacorr budget=3`"]
    assert records[1]["compute"] <= 3 / 8 + 0.02  # and the gates
    records += run(tmp_path / "x.json", "protocol", *common)
    assert [row[0] for row in printed(capsys)[1:]] == [f"`--adacorr, {what}`" for what in changes]
    assert [record["images"] for record in records] == [2, 2, 2, 1, 2]
    for record in records:
        assert record["speedup"] > 0
        assert 0 < record["compute"] < 1.1
        assert float(record["psnr"]["min"]) <= float(record["psnr"]["mean"])


def test_distances_to_the_solution(ckpt, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tables, "SOLUTION_STEPS", 40)
    monkeypatch.setattr(tables, "DDIM_STEPS", (16,))
    monkeypatch.setattr(tables, "EVALUATIONS", (8, 15))
    records = run(tmp_path / "x.json", "exact --images 1 --num-sampling-steps 6 --device cpu --ckpt", ckpt)
    by_label = {record["what"]: record for record in records}
    assert [row[0].strip("`") for row in printed(capsys)[1:]] == list(by_label)
    assert by_label["uncached DDIM-50"]["evaluations"] == pytest.approx(50)
    assert by_label["uncached unipc:solver_order=2, 8 steps"]["evaluations"] == pytest.approx(8)
    assert by_label["--adacorr budget=6, DDIM-16"]["evaluations"] == pytest.approx(5, abs=1)
    few, more = (by_label[f"uncached unipc:grid=optimized,solver_order=3, {n} steps"]["psnr"] for n in (8, 15))
    assert more > few
