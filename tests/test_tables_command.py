"""`python -m evaluate table1` to `table4`: rows by hand, a sweep that was stopped, published values, several models."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import result_file
from PIL import Image
from toy import save_tiny

import pipeline
from evaluate import table_figures, tables
from evaluate.__main__ import main
from evaluate.bench import Bench, Setting
from evaluate.features import extract
from evaluate.fidelity import fidelity
from evaluate.frechet import Moments, frechet_distance
from evaluate.motion import difference_distance, frame_features, trajectory_frames
from evaluate.networks import load_network
from evaluate.published import TABLE_1, TABLE_4
from evaluate.study import UNCACHED, Row, Study
from evaluate.tables import cells, plan, tabulate, unlike
from runtime import Progress

STEPS = 8
BIG = {"input_size": 32, "patch_size": 8}  # the features are of 32 x 32 pixels
EVERY_2, CORRECTED = Setting("interval:every=2"), Setting("interval:every=2", "")
ROWS = [UNCACHED, EVERY_2, CORRECTED, Setting(None, ""), Setting(None, "literal")]
needs_matplotlib = pytest.mark.skipif(not find_spec("matplotlib"), reason="needs matplotlib")


@pytest.fixture
def references(tmp_path_factory):
    """Sets of images that are all of one level, but for noise, by the level: path and moments."""
    found, folder = {}, tmp_path_factory.mktemp("references")
    for level in (30, 90, 200):
        images = np.random.default_rng(level).integers(level, level + 40, (20, 32, 32, 3), dtype=np.uint8)
        np.savez(folder / f"{level}.npz", images)
        found[level] = folder / f"{level}.npz", Moments.of(extract(torch.from_numpy(images))[0])
    return found


def run(command, ckpt, *more, images=3, batch=2, repeats=0):
    """Exit code of a command on the toy model, without a profile."""
    given = f"{command} --num-sampling-steps {STEPS} --device cpu --calibrate off --num-images {images}"
    given += f" --batch-size {batch} --repeats {repeats}"
    return main([*given.split(), "--ckpt", *map(str, ckpt if isinstance(ckpt, list) else [ckpt]), *map(str, more)])


def table1(ckpt, out, *more, **counts):
    return run("table1", ckpt, "--methods", "interval:every=2", "--out", out, *more, **counts)


def content(path):
    return json.loads(path.read_text(), parse_constant=pytest.fail)


def settings(rows):
    return [Setting(**row["setting"]) for row in rows]


# ----------------------------------------------------------------------------------------------------------- rows


def test_rows_by_hand(tiny32, tmp_path, capsys, references):
    assert table1(tiny32, tmp_path / "x.json", "--reference", references[90][0]) == 0
    result = content(tmp_path / "x.json")
    pipe = pipeline.load(pipeline.ModelOptions(ckpt=str(tiny32), num_sampling_steps=STEPS, device="cpu"))
    bench = Bench(pipe, 4242, 3, calibrate="off")

    def sampled(setting):
        parts = [bench.sample(setting, 2), bench.sample(setting, 1, first=2)]
        return torch.cat([pipe.decode(x) for x, _, _ in parts]), [cache for _, cache, _ in parts]

    def trajectories(setting):
        parts = [np.arange(2), np.arange(2, 3)]
        parts = [(p, pipe.labels_in_turn(p), bench.cache(setting)) for p in parts]
        frames = torch.cat([trajectory_frames(pipe, 4242, *part, every=5) for part in parts])
        return frame_features(load_network("cifar10"), frames)

    images, _ = sampled(UNCACHED)
    uncached, reference = Moments.of(extract(images)[0]), references[90][1]
    assert settings(result["rows"]) == ROWS
    first, *others = result["rows"]
    assert first["distance"] == pytest.approx(frechet_distance(uncached, reference))
    assert [first[key] for key in ("uncached_distance", "tfid", "psnr", "identical", "ssim")] == [0, 0, "inf", 3, 1]
    assert [first[key] for key in ("compute", "hit_rate", "cache_bytes_per_image", "latency")] == [1, 0, 0, None]
    for row, setting in zip(others, ROWS[1:], strict=True):
        found, (a, b) = sampled(setting)
        own, near = Moments.of(extract(found)[0]), fidelity(images, found)
        assert row["distance"] == pytest.approx(frechet_distance(own, reference))
        near_zero = pytest.approx(frechet_distance(own, uncached), rel=1e-3, abs=1e-9)
        assert row["uncached_distance"] == near_zero
        tfid = difference_distance(trajectories(setting), trajectories(UNCACHED))
        assert row["tfid"] == pytest.approx(tfid, rel=1e-3, abs=1e-9)
        assert (row["psnr"], row["identical"]) == (pytest.approx(near["psnr"]["mean"]), near["psnr"]["identical"])
        assert row["ssim"] == pytest.approx(near["ssim"]["mean"])
        assert row["compute"] == pytest.approx((2 * a.trace.compute + b.trace.compute) / 3)  # two weigh more
        assert row["hit_rate"] == pytest.approx((2 * a.trace.hit_rate + b.trace.hit_rate) / 3)
        assert row["cache_bytes_per_image"] == max(a.bytes // 2, b.bytes)
    assert (others[0]["method"], others[0]["hit_rate"]) == ("interval", pytest.approx(3 / 8))  # and the last step
    assert (others[1]["gamma"], others[1]["lambda"]) == (1, 1)
    out, err = capsys.readouterr()
    assert [line.split("|")[1].strip(" `") for line in out.splitlines()[2:7]] == [str(s) or "uncached" for s in ROWS]
    assert "released DiT-XL/2 at 256 px, DDIM of 50 steps, 50,000 images" in out
    assert "30 of 30 images, " in err  # five rows of 3, each with its trajectories
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_latency_is_the_median_of_whole_batches(tiny32, tmp_path, monkeypatch):
    seconds, sample = iter([3.0, 9.0, 5.0]), Bench.sample

    def timed(self, setting, count=None, stop=None, first=0):
        x, cache, _ = sample(self, setting, count, stop, first)
        return x, cache, 99.0 if stop or count == 1 else next(seconds)  # neither the warm-up nor the last image

    monkeypatch.setattr(Bench, "sample", timed)
    pipe = pipeline.load(pipeline.ModelOptions(ckpt=str(tiny32), num_sampling_steps=STEPS, device="cpu"))
    study = Study(Bench(pipe, 1, 5), load_network("cifar10"), None, 2, 3, 0, tmp_path / "spool.npy")
    progress = Progress(7, "image")
    row = study.measure(UNCACHED, progress)
    assert (row.latency, row.images_per_second) == (5.0, 2 / 5)
    assert progress.done == study.units([UNCACHED]) == 5 + 2


# --------------------------------------------------------------------------------------------- stopped, gone on with


def test_a_sweep_that_was_stopped_goes_on(tiny32, tmp_path, monkeypatch):
    assert table1(tiny32, tmp_path / "whole.json") == 0
    measure, measured = Study.measure, []

    def stopped(study, setting, progress):
        measured.append(setting)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return measure(study, setting, progress)

    monkeypatch.setattr(Study, "measure", stopped)
    out = tmp_path / "stopped.json"
    assert table1(tiny32, out) == 130
    assert settings(content(out)["rows"]) == ROWS[:2]
    assert len(content(out)["table"]["rows"]) == 2
    (spool,) = tmp_path.glob("*.npy")  # the uncached images wait
    monkeypatch.setattr(Study, "_keep", lambda *_: pytest.fail("sampled again"))
    assert table1(tiny32, out) == 0
    assert measured == [*ROWS[:3], *ROWS[2:]]
    whole, again = content(tmp_path / "whole.json"), content(out)
    assert again["rows"] == whole["rows"]
    assert again["table"] == whole["table"]
    assert not spool.exists()
    measured.clear()
    assert table1(tiny32, out) == 0
    assert measured == []  # nothing is left to do
    monkeypatch.setattr(tables, "digest", lambda profile: "of another profile")
    assert table1(tiny32, out) == 2
    monkeypatch.undo()
    assert run("table1", tiny32, "--methods", "never", "--out", out) == 0  # the uncached images are sampled anew
    assert {*settings(content(out)["rows"])} == {*ROWS, Setting("never"), Setting("never", "")}
    assert len(content(out)["table"]["rows"]) == 5  # rows that were not asked for stay in the file alone


def test_rows_of_another_run_are_refused(tiny32, tmp_path, capsys, monkeypatch, references):
    out = tmp_path / "x.json"
    sweep = ("table4", tiny32, "--gammas", "1", "--lambdas", "1", "--out", out)
    assert run(*sweep) == 0
    kept = out.read_text()
    monkeypatch.setattr(Study, "measure", lambda *_: pytest.fail("measured"))
    capsys.readouterr()
    for more, counts, words in (
        (["--seed", "7"], {"images": 5}, ["seed 4242 there, 7 here", "num_images 3 there, 5 here", "--overwrite"]),
        (["--reference", references[90][0]], {}, ["reference_sha256 [] there, ['"]),
        (["--cfg-scale", "2"], {}, ["guidance [1.5] there, [2.0] here"]),
    ):
        assert run(*sweep, *more, **counts) == 2
        err = capsys.readouterr().err
        lines = [line for line in err.splitlines() if "error" in line]
        assert (len(lines), [word for word in words if word not in err]) == (1, []), err
    assert table1(tiny32, out) == 2
    assert "is a result of `evaluate table4`" in capsys.readouterr().err
    assert out.read_text() == kept
    monkeypatch.undo()
    assert run(*sweep, "--seed", "7", "--overwrite") == 0
    assert content(out)["identity"]["seed"] == 7


# ------------------------------------------------------------------------------------------------- published values


def study_of_the_paper(
    name="DiT-XL-2-256x256.pt", spec="ddim", steps=50, cfg=1.5, count=50_000, network="inception", reference=()
):
    """What `unlike` looks at."""
    checkpoint, sampler = SimpleNamespace(path=Path(name)), SimpleNamespace(spec=spec, num_steps=steps)
    pipe = SimpleNamespace(checkpoint=checkpoint, sampler=sampler, cfg_scale=cfg)
    return Study(SimpleNamespace(pipe=pipe, count=count), SimpleNamespace(name=network), reference, 1, 0, 0, None)


def test_published_values_stand_beside_the_same_setting_only():
    assert unlike(study_of_the_paper(), 256) == []
    for change in (
        {"name": "DiT-XL-2-512x512.pt"},
        {"spec": "ddpm"},
        {"steps": 250},
        {"cfg": 4.0},
        {"count": 10_000},
        {"network": "dinov2"},
        {"reference": None},
    ):
        assert len(unlike(study_of_the_paper(**change), 256)) == 1, change
    near = {"psnr": "inf", "identical": 1, "ssim": 0.9071, "compute": 0.3}
    row = Row("x", "0", Setting("teacache:threshold=0.2", ""), 1, 4.5678, 0.1, 13.0, **near, hit_rate=0.7791,
                     cache_bytes_per_image=0, memory=12 * 10**9, latency=0.7139, images_per_second=15.66)  # fmt: skip
    text = cells(row, TABLE_1[Setting("teacache", "")], "inception")
    assert text["FID"] == "4.568 (4.54)"
    assert text["FID to uncached"] == "0.1"
    assert text["t-FID"] == "13 (13.22)"
    assert [text[key] for key in ("hit rate (%)", "latency (ms)")] == ["77.9 (77.9)", "714 (714)"]
    assert [text[key] for key in ("memory (GB)", "images/s", "SSIM")] == ["12.0 (12.8)", "15.7 (15.7)", "0.9071 (.907)"]
    assert not any("(" in value for value in cells(row, {}, "inception").values())
    assert "FD-cifar10" in cells(row, {}, "cifar10")
    known = {column for values in TABLE_1.values() for column in values}
    assert known <= text.keys()  # a title that changes would lose the published value
    pair = [replace(row, setting=Setting("teacache"), distance=5.0), row]
    table = tabulate("table3", pair, [{}, {"FID": "4.49"}], "inception")
    assert [*table[0]] == ["method", "FID", "FID to uncached", "images/s", "hit rate (%)"]
    assert [*table[0].values()][:2] == ["`teacache:threshold=0.2`", "5 → 4.568 (4.49)"]


# ----------------------------------------------------------------------------------------------------- other tables


def test_models_without_classes_and_references_of_their_own(tiny32, tmp_path, capsys, references):
    unconditional = save_tiny(tmp_path / "faces.safetensors", num_classes=0, class_dropout_prob=0.0, **BIG)
    out, flags = tmp_path / "x.json", ["--cache", "interval:every=2"]
    models = [tiny32, unconditional]
    assert run("table2", models, "--reference", references[30][0], references[200][0], "--out", out, *flags) == 0
    result = content(out)
    assert result["identity"]["guidance"] == [1.5, 1.0]
    assert len(set(result["identity"]["reference_sha256"])) == 2
    assert [row["checkpoint"] for row in result["rows"]] == ["tiny.safetensors"] * 3 + ["faces.safetensors"] * 3
    assert settings(result["rows"]) == [UNCACHED, EVERY_2, CORRECTED] * 2
    pipe = pipeline.load(pipeline.ModelOptions(ckpt=str(unconditional), cfg_scale=1.0, num_sampling_steps=STEPS))
    images = pipe.decode(torch.cat([pipe.sample(4242, np.arange(*part), None) for part in ((0, 2), (2, 3))]))
    expected = frechet_distance(Moments.of(extract(images)[0]), references[200][1])
    assert result["rows"][3]["distance"] == pytest.approx(expected)
    assert "PixArt-alpha on ImageNet-256 7.20 and 6.85" in capsys.readouterr().out
    for argv, words in (
        ([*models, "--reference", references[30][0]], "1 given for 2 --ckpt"),
        ([tiny32, tiny32], "the same weights"),
    ):
        assert run("table2", argv, *flags) == 2
        assert words in capsys.readouterr().err


def test_methods_that_refuse_the_model_are_named(tiny32, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tables, "parse_methods", lambda text: ["interval", "teacache"])
    assert run("table3", tiny32, "--out", tmp_path / "x.json") == 0
    result = content(tmp_path / "x.json")
    assert [line[0] for line in result["table"]["rows"]] == ["`uncached`", "`interval`"]
    assert " → " in result["table"]["rows"][1][1]
    assert "teacache does not run here: teacache has no profile" in result["notes"][-1]
    assert all(row["tfid"] is None for row in result["rows"])
    capsys.readouterr()
    assert run("table1", tiny32, "--methods", "interval,teacache") == 2  # asked for by name, so it is a mistake
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), "teacache has no profile" in err) == ("", 1, True)


def test_lambda_changes_nothing_under_a_profile(tiny32, tmp_path, capsys):
    for calibrate, said in (("auto", True), ("off", False)):
        out = tmp_path / f"{calibrate}.json"
        flags = ["--gammas", "1", "--lambdas", "0,1", "--cache", "interval:every=2", "--calibrate", calibrate]
        assert run("table4", tiny32, "--out", out, *flags, images=2) == 0
        assert ("whatever lambda is" in capsys.readouterr().out) == said
        one, none = ({**row, "setting": None, "lambda": None} for row in content(out)["rows"][1:])
        assert not said or one == none


def test_plans():
    def settings_of(command, **given):
        return [str(setting) for setting in plan(SimpleNamespace(command=command, **given))]

    table = settings_of("table1", methods=["interval,never", "interval:every=3,order=1"])
    assert table[1::2][:3] == ["--cache interval", "--cache never", "--cache interval:every=3,order=1"]
    assert table[-3:] == ["--cache interval:every=3,order=1 --adacorr", "--adacorr", "--adacorr literal"]
    table = settings_of("table4", cache=None, gammas=[1, 0.5], lambdas=[1, 2])
    forms = ["--adacorr gamma=0.5", "--adacorr", "--adacorr lambda=2"]
    assert table == ["", *forms, *(form.replace("--adacorr ", "--adacorr literal:") for form in forms[:1]),
                     "--adacorr literal", "--adacorr literal:lambda=2"]  # fmt: skip
    table = settings_of("table4", cache="fastcache", gammas=[0.5, 1, 2], lambdas=[0.5, 2])
    paper = [Setting("fastcache", key) for key in ("gamma=0.5", "", "gamma=2", "lambda=0.5", "lambda=2")]
    assert table == ["", *map(str, paper)]
    assert list(TABLE_4) == paper


# ---------------------------------------------------------------------------------------------------------- figures


def result_of(kind, path, *rows, timed=True):
    """A result of table1 or table4 by hand; rows are (cache, adacorr, distance, images/s, gamma, lambda)."""
    plain = [
        {
            "checkpoint": "x.pt",
            "setting": {"cache": cache, "adacorr": adacorr},
            "distance": None,
            "uncached_distance": distance,
            "images_per_second": speed if timed else None,
            "compute": 1 / speed,
            "hit_rate": 0.5,
            **({} if adacorr is None else {"gamma": gamma, "lambda": factor}),
        }
        for cache, adacorr, distance, speed, gamma, factor in rows
    ]
    same = {"features": "cifar10", "sampler": "ddim", "num_sampling_steps": 50, "guidance": [1.5], "num_images": 4}
    result_file(path, kind, identity=same, rows=plain)
    return path


@needs_matplotlib
@pytest.mark.parametrize("timed", [True, False])
def test_figure_3_leads_from_alone_to_corrected(tmp_path, timed):
    rows = [(None, None, 0.0, 1.0, 1, 1), ("a", None, 3.0, 5.0, 1, 1), ("a", "", 1.0, 4.0, 1, 1)]
    rows += [(None, "", 0.5, 6.0, 1, 1), (None, "literal", 0.2, 0.8, 1, 1)]
    axes = table_figures.figure3(content(result_of("table1", tmp_path / "x.json", *rows, timed=timed))).axes[0]
    points = {(*line.get_xydata()[0],) for line in axes.lines}
    assert points == {(speed, distance) for _, _, distance, speed, _, _ in rows}
    (arrow,) = axes.texts
    assert (arrow.xyann, arrow.xy) == ((5.0, 3.0), (4.0, 1.0))
    assert axes.get_xlabel() == ("images/s" if timed else "1 / compute")
    assert axes.get_ylabel() == "FD-cifar10 to the uncached images"


@needs_matplotlib
@pytest.mark.filterwarnings("error")
def test_figure_4_varies_one_at_a_time(tmp_path, capsys):
    rows = [(None, None, 0.0, 1.0, 1, 1), (None, "gamma=2", 1.0, 5.0, 2, 1), (None, "", 3.0, 5.0, 1, 1)]
    rows += [(None, "lambda=0.5", 4.0, 5.0, 1, 0.5), (None, "literal", 0.2, 0.8, 1, 1)]
    source = result_of("table4", tmp_path / "x.json", *rows)
    axes = table_figures.figure4(content(source)).axes
    assert [line.get_xydata().tolist() for line in axes[0].lines] == [[[1, 3], [2, 1]], [[1, 0.2]]]
    assert [line.get_xydata().tolist() for line in axes[1].lines] == [[[0.5, 4], [1, 3]], [[1, 0.2]]]
    assert axes[2].lines[0].get_ydata().tolist() == [50, 50]
    assert main(["figure4", "--from", str(source), "--out", f"{tmp_path}/x.png"]) == 0
    with Image.open(tmp_path / "x.png") as picture:
        assert min(picture.size) > 400
    assert main(["figure3", "--from", str(source), "--out", f"{tmp_path}/x.png"]) == 2
    assert "expected `evaluate table1`" in capsys.readouterr().err
