"""The benchmarks run on a small model and print what they write: benchmarks/tables.py."""

import json

import pytest
from commands import code, printed

from adacorr import available
from benchmarks import tables


@pytest.fixture
def run(tiny32, tmp_path):
    """The records of the JSON file that a command writes, by its words."""

    def call(words):
        assert code(tables.main, words, "--device cpu --ckpt", tiny32, "--out", tmp_path / "x.json") == 0
        return json.loads((tmp_path / "x.json").read_text())["rows"]

    return call


def test_bytes_of_every_method(run, capsys):
    records = run("memory --num-sampling-steps 6")
    cells = printed(capsys)[1:]
    assert [name.strip("`") for name, _, _ in cells] == [*available(), "--adacorr", "--adacorr literal"]
    held = {record["method"]: record["bytes"] for record in records}
    assert held["never"] == 0
    assert held["interval"] == 6 * 2 * 16 * 32 * 4  # sums under the basis of the gates, halves, tokens, width, float32
    assert held["teacache"] is None  # a table cannot stop at a method that needs a profile of this model
    assert dict((name.strip("`"), text) for name, _, text in cells)["teacache"].startswith("refused: teacache has no")
    for (_, granularity, text), record in zip(cells, records, strict=True):
        assert granularity == record["granularity"]
        assert record["bytes"] is None or text == f"{record['bytes'] / 1e6:.2f}"


def test_the_codebook_of_adacache(run, capsys):
    (record,) = run("codebook --images 3 --num-sampling-steps 6")
    _, (images, changes, codebook) = printed(capsys)
    assert (images, changes) == ("3", "15")  # of every step but the first
    rates = [rate for _, rate in (pair.split(":") for pair in codebook.strip("`").split("/"))]
    assert rates == ["6", "5", "4", "3", "2", "1"]
    assert record["keys"] == sorted(record["keys"])
    assert record["keys"][0] > 0


def test_compared_tables(run, capsys, monkeypatch):
    monkeypatch.setattr(tables, "GAMMA", ("gamma=1", "budget=3"))
    changes = {"5 steps": {"steps": 5}, "batch 1": {"images": 1}, "guidance 1": {"cfg_scale": 1.0}}
    monkeypatch.setattr(tables, "PROTOCOLS", changes)
    records = run("gamma --images 2 --num-sampling-steps 8")
    assert [row[0] for row in printed(capsys)[1:]] == ["`--adacorr gamma=1`", "`--adacorr budget=3`"]
    assert records[1]["compute"] <= 3 / 8 + 0.02  # and the gates
    records += run("protocol --images 2 --num-sampling-steps 8")
    assert [row[0] for row in printed(capsys)[1:]] == [f"`--adacorr, {what}`" for what in changes]
    assert [record["images"] for record in records] == [2, 2, 2, 1, 2]
    for record in records:
        assert record["speedup"] > 0
        assert 0 < record["compute"] < 1.1
        assert float(record["psnr"]["min"]) <= float(record["psnr"]["mean"])


def test_distances_to_the_solution(run, capsys, monkeypatch):
    monkeypatch.setattr(tables, "SOLUTION_STEPS", 40)
    monkeypatch.setattr(tables, "CACHED", (("unipc", 16),))
    monkeypatch.setattr(tables, "EVALUATIONS", (8, 15))
    by_label = {record["what"]: record for record in run("exact --images 1 --num-sampling-steps 6")}
    assert [row[0].strip("`") for row in printed(capsys)[1:]] == list(by_label)
    assert by_label["uncached DDIM-50"]["evaluations"] == pytest.approx(50)
    assert by_label["uncached unipc:solver_order=2, 8 steps"]["evaluations"] == pytest.approx(8)
    assert by_label["--adacorr budget=6, unipc, 16 steps"]["evaluations"] == pytest.approx(5, abs=1)
    few, more = (by_label[f"uncached unipc:grid=optimized,solver_order=3, {n} steps"]["psnr"] for n in (8, 15))
    assert more > few
