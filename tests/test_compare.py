"""`python -m evaluate compare`: the search for a compute level, the bench's memory, a whole comparison, its tables."""

import json
import math
from dataclasses import replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import code, one_line
from PIL import Image

import pipeline
import profiles
from adacorr import available, make_policy, profile
from adacorr.policies import calibrated
from adacorr.policies.interval import Interval
from adacorr.policies.never import Never
from adacorr.policies.taylorseer import TaylorSeer
from adacorr.policy import Knob
from adacorr.spec import parse_spec
from evaluate import compare, leaderboard, pages
from evaluate.__main__ import main
from evaluate.bench import NEAR, Bench, Row, Setting
from evaluate.compare import CLEAR, CLOSE, LEVELS, REACHED, SOLVERS, TRIES, correct, known_rows, search, sweep, tune
from evaluate.fidelity import fidelity

STEPS, SHIPPED = 12, Path(__file__).parents[1] / "docs" / "compare.json"
KNOBS = {Interval: Knob("every", 1, STEPS, ("", "order=1")), TaylorSeer: Knob("every", 1, STEPS)}
RISING = Knob("gamma", 1e4, 1e-3)  # more of it is more compute
needs_matplotlib = pytest.mark.skipif(not find_spec("matplotlib"), reason="needs matplotlib")


@pytest.fixture(scope="module", autouse=True)
def _knobs():
    """Knobs of this file's own, whatever those of the methods are tuned to."""
    with pytest.MonkeyPatch.context() as patch:
        for kind, knob in KNOBS.items():
            patch.setattr(kind, "knob", knob)
        yield


@pytest.fixture
def bench(tiny32):
    pipe = pipeline.load(pipeline.ModelOptions(ckpt=str(tiny32), num_sampling_steps=STEPS, device="cpu"))
    return Bench(pipe, 4242, 2, few=2)


def test_an_uncached_run_that_overflows_is_no_reference(bench, monkeypatch):
    monkeypatch.setattr(pipeline.Pipeline, "sample", lambda own, seed, indices, *_, **__: torch.full(
        (len(indices), *own.noise_shape), torch.nan))  # fmt: skip
    with pytest.raises(ValueError, match="image 0 holds infinite or undefined values"):
        bench.run("interval", "alone", Setting("interval:every=2"))


@pytest.mark.parametrize("few", [1, 2])
def test_a_row_on_all_images_is_timed_whether_or_not_a_search_asks_for_it(bench, few):
    bench.few, bench.timed = few, True
    setting = Setting("interval:every=2")
    assert (bench.run("interval", "alone", setting, few=True).speedup is not None) == (few == 2)
    assert bench.run("interval", "alone", setting).speedup > 0


# --------------------------------------------------------------------------------------------------------- search


class Law:
    """A run whose compute follows a function; it remembers what it was asked for."""

    def __init__(self, compute):
        self.compute, self.asked = compute, []

    def __call__(self, value):
        self.asked.append(value)
        return SimpleNamespace(value=value, compute=self.compute(value))


def distance(row, target):
    return abs(math.log(row.compute / target))


def test_search_goes_on_from_what_is_known():
    law = Law(lambda x: 0.1 / x)  # straight on logarithmic scales, so the first guess is the answer
    tried = {0.2: SimpleNamespace(compute=0.5), 0.8: SimpleNamespace(compute=0.125)}
    row = search(law, Knob("x", 0.1, 1.0), 0.25, tried=tried)
    assert search(law, Knob("x", 0.1, 1.0), 0.25, tried=tried) is row  # the next search knows it
    assert (law.asked, row.value, row.compute) == ([0.4], 0.4, pytest.approx(0.25))
    law = Law(lambda g: 0.05 + 0.95 * g / (g + 1))
    row = search(law, RISING, 0.5, tried={1.0: law(1.0)})  # 0.525 there
    assert len(law.asked) <= 4
    assert abs(row.compute / 0.5 - 1) <= CLOSE
    law = Law(lambda x: 1 / x)
    assert search(law, Knob("every", 1, 60), 1 / 7, tried={6: law(6), 9: law(9)}).value == 7
    assert set(law.asked[2:]) <= {7, 8}


def test_search_ends_where_compute_comes_in_steps():
    law = Law(lambda x: 0.6 if x < 0.3 else 0.2)
    assert search(law, Knob("x", 0.2, 0.5), 0.4).compute == 0.6
    assert len(law.asked) < TRIES  # not the fourth digit of 0.3


def test_search_ends_where_a_row_is_hopeless():
    law = Law(lambda x: 0.1 / x)
    search(law, Knob("x", 0.1, 1.0), 0.3, hopeless=lambda row: row.compute > 0.3)
    assert law.asked[-1] < 0.1 / 0.3
    assert all(0.1 / x <= 0.3 for x in law.asked[:-1])
    tried = {0.2: SimpleNamespace(compute=0.5)}  # known to be so
    search(law := Law(lambda x: 0.1 / x), Knob("x", 0.1, 1.0), 0.3, tried, lambda row: row.compute > 0.3)
    assert law.asked == []


@pytest.mark.parametrize("target", [0.9, 0.5, 0.35, 0.15, 0.06])
@pytest.mark.parametrize(
    ("knob", "compute"),
    [
        (Knob("threshold", 1e-4, 10.0), lambda x: 0.04 + 0.96 / (1 + x)),
        (Knob("threshold", 1e-4, 10.0), lambda x: max(0.02, round(50 / (1 + 4 * x**2)) / 50)),  # in steps
        (RISING, lambda g: 0.04 + 0.96 * g / (g + 1)),  # more gamma is more compute, so its low end is the larger
        (RISING, lambda g: max(0.02, round(20 * g / (g + 1)) / 20)),
    ],
)
def test_search_of_numbers(knob, compute, target):
    law = Law(compute)
    row = search(law, knob, target)
    reachable = np.array([compute(x) for x in np.geomspace(knob.low, knob.high, 2000)])
    assert distance(row, target) <= np.abs(np.log(reachable / target)).min() + 2 * CLOSE
    assert all(abs(compute(x) / target - 1) > CLOSE for x in law.asked[:-1])  # it stops at the first that is near
    assert len(law.asked) == len(set(law.asked)) <= TRIES
    low, high = sorted((knob.low, knob.high))
    assert all(low <= x <= high and float(f"{x:g}") == x for x in law.asked)  # what is printed is what ran


def test_search_of_whole_numbers_finds_the_best_there_is():
    """Compute falls in stairs of any height and width, along a knob that rises or falls."""
    for seed in range(100):
        random = np.random.default_rng(seed)
        size, start = int(random.integers(1, 60)), int(random.integers(0, 4))
        stairs = np.sort(random.choice(random.uniform(0.05, 1.0, size), size))[::-1]
        values = list(range(start, start + size))[:: random.choice([1, -1])]
        target = random.uniform(0.05, 1.0)
        law = Law(lambda x, stairs=stairs, values=values: stairs[values.index(x)])
        row = search(law, Knob("every", values[0], values[-1]), target)
        best = np.abs(np.log(stairs / target)).min()
        assert distance(row, target) <= max(best, -math.log(1 - CLOSE)) + 1e-12, seed
    assert all(type(x) is int for x in law.asked)
    assert len(law.asked) == len(set(law.asked)) <= TRIES


@pytest.mark.parametrize("knob", [Knob("every", 1, 9), Knob("threshold", 0.01, 10.0), RISING], ids=["int", "float", ""])
def test_search_of_what_is_out_of_reach_gives_the_nearest(knob):
    falls = knob is not RISING
    law = Law(lambda x: 0.6 + (0.1 / (1 + x) if falls else 0.1 * x / (1 + x)))
    below, above = search(law, knob, 0.1), search(law, knob, 0.95)
    assert below.compute == pytest.approx(0.6, abs=0.011)
    assert above.compute > below.compute + 0.03
    assert search(Law(lambda x: 0.5), knob, 0.2).compute == 0.5  # a knob that does nothing
    assert search(Law(lambda x: 0.01), knob, 0.02).compute == 0.01  # less than what is guessed of the end


# -------------------------------------------------------------------------------------------------- specs and flags


def test_parse_methods(monkeypatch):
    assert compare.parse_methods("taylorseer, interval,taylorseer") == ["taylorseer", "interval"]
    assert {"interval", "taylorseer"} <= set(compare.parse_methods("all")) <= set(available()) - {"never"}
    for text, words in {"interval,": "''", "interval,nothing": "'nothing' .*taylorseer", "": "''"}.items():
        with pytest.raises(ValueError, match=f"--methods: {words}"):
            compare.parse_methods(text)
    monkeypatch.setattr(Never, "knob", Knob("every", 1, 2))
    assert "never" in compare.parse_methods("all")


def test_parse_levels():
    assert compare.parse_levels("0.15, 0.5,.25") == [0.5, 0.25, 0.15]
    assert compare.parse_levels("0.5,0.50") == [0.5]
    for text in ("0", "1", "1.5", "-0.1", "nan", "inf", "half", "", "true", "none"):
        with pytest.raises(ValueError, match=f"--levels: '{text}' is no number between 0 and 1"):
            compare.parse_levels(f"0.5,{text},3")


@pytest.mark.parametrize("kind", [type(make_policy(name)) for name in compare.parse_methods("all")])
def test_every_knob_and_variant_is_an_option_of_its_method(kind):
    knob = kind.knob
    assert isinstance(knob.low, int) == isinstance(knob.high, int)
    assert knob.variants
    for variant, value in product(knob.variants, (knob.low, knob.high)):
        assert isinstance(value, int) or value > 0  # the search is on a logarithmic scale
        spec = f"{kind.name}:{knob.option}={value:g}{',' if variant else ''}{variant}"
        assert getattr(make_policy(spec), knob.option) == value  # ValueError for what the method does not take
        assert len(parse_spec(spec)[1]) == 1 + len([v for v in variant.split(",") if v])


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        (Setting("interval:every=3", "gamma=0.02"), "--cache interval:every=3 --adacorr gamma=0.02"),
        (Setting(None, ""), "--adacorr"),
        (Setting(None, "literal"), "--adacorr literal"),
        (Setting(sampler="unipc", steps=5), "--sampler unipc --num-sampling-steps 5"),
        (Setting(None, "budget=6", "ddim", 5), "--adacorr budget=6 --sampler ddim --num-sampling-steps 5"),
        (Setting(), ""),
    ],
)
def test_a_setting_reads_as_flags_and_runs_as_them(setting, text, bench):
    assert str(setting) == text
    x, cache, seconds = bench.sample(setting)
    given = SimpleNamespace(cache=setting.cache, adacorr=setting.adacorr, cache_dtype="fp32")
    expected = profiles.with_profile(pipeline.make_cache(given), bench.pipe)
    assert (cache.spec if cache else None) == (expected.spec if expected else None)
    pipe = bench.pipe
    if setting.sampler:
        pipe = replace(pipe, sampler=pipeline.make_sampler(setting.sampler, 5))
    assert torch.equal(x, pipe.sample(4242, np.arange(2), torch.arange(2), expected))
    assert seconds > 0
    assert bench.pipe.sampler.num_steps == STEPS  # the bench's own is as it was


# ---------------------------------------------------------------------------------------------------- bench, sweep


def test_a_setting_runs_once_on_as_many_images(bench, monkeypatch):
    runs, sample = [], pipeline.Pipeline.sample
    bench.few, setting = 1, Setting("interval:every=3")
    assert len(bench.reference) == 2  # sampled when first asked for
    bench.cache(Setting(adacorr="gamma=1"))  # a model is measured when it is first met
    monkeypatch.setattr(pipeline.Pipeline, "sample", lambda *a, **k: runs.append(1) or sample(*a, **k))
    first = bench.run("interval", "alone", setting)
    assert bench.run("interval", "alone", setting) is first
    assert len(runs) == 1
    other = bench.run("interval", "adacorr", Setting("interval:every=3", "gamma=1"))
    few = bench.run("interval", "alone", setting, few=True)
    assert bench.run("interval", "alone", setting, few=True) is few
    assert len(runs) == 3
    assert list(bench.rows.values()) == [first, other, few]
    assert (first.images, few.images) == (2, 1)
    images = bench.pipe.decode(bench.sample(setting)[0])  # a few images are the first of all
    assert few.score == pytest.approx(fidelity(bench.reference[:1], images[:1])["psnr"]["mean"], abs=0.5)


def test_rows_hold_what_ran(bench):
    row = bench.run("interval", "alone", Setting("interval:every=3"))
    assert row.compute == pytest.approx(5 / STEPS, abs=0.02)  # steps 0, 2, 5, 8 and 11, and the gates
    assert row.hit_rate == pytest.approx(7 / STEPS)
    assert 5 < row.psnr["min"] <= row.psnr["p5"] <= row.psnr["mean"] == row.score < 100
    assert 0 < row.ssim["mean"] <= 1
    assert row.solution_psnr is None  # no solution was asked for
    assert row.bytes_per_image > 0
    assert row.weights_at_1 is None
    exact = bench.run("never", "alone", Setting("never"))
    assert (exact.compute, exact.score, exact.ssim["mean"]) == (1.0, math.inf, pytest.approx(1))
    assert json.loads(json.dumps(exact.plain(), allow_nan=False))["setting"] == {"cache": "never"}
    fewer = bench.run("ddim", "fewer steps", Setting(sampler="ddim", steps=6))
    assert (fewer.compute, fewer.hit_rate, fewer.bytes_per_image) == (0.5, 0.0, 0)
    for setting in (Setting(sampler="ddim", steps=STEPS), Setting()):
        same = bench.run("ddim", "fewer steps", setting)
        assert (same.score, same.compute) == (math.inf, 1.0)


def test_literal_reports_the_share_of_its_weights(bench):
    everything = bench.run("literal", "adacorr", Setting(None, "literal:gamma=1000000"))
    assert everything.weights_at_1 == 1.0
    nothing = bench.run("literal", "adacorr", Setting(None, "literal:gamma=0"))
    assert nothing.weights_at_1 == 0.0
    assert nothing.compute == pytest.approx(1)  # every block was computed all the same
    assert everything.score > nothing.score


def test_sweep_keeps_the_best_variant_and_corrects_it_at_no_more_compute(bench):
    alone, corrected = sweep(bench, "interval", 0.5)
    assert abs(alone.compute / 0.5 - 1) <= REACHED
    tried = [r for r in bench.rows.values() if r.setting.adacorr is None]
    assert any("order=1" in r.setting.cache for r in tried)
    near = [r for r in tried if r.compute == pytest.approx(alone.compute)]
    assert len(near) == 2  # both variants
    assert alone.score == max(r.score for r in near)
    assert corrected.setting.cache == alone.setting.cache
    assert corrected.setting.adacorr.startswith("budget=")
    assert corrected.form == "adacorr"
    assert corrected.compute <= alone.compute * (1 + NEAR)


@pytest.mark.parametrize(
    ("spent", "budget"), [(lambda b: b / 50, 7.5), (lambda b: (b - 0.5) / 50, 8), (lambda b: 0.3, 2.5)]
)
def test_the_largest_budget_that_spends_no_more(spent, budget, monkeypatch):
    def run(self, method, form, setting, few=False):
        compute = spent(float(setting.adacorr.partition("=")[2]))
        return Row(method, form, None, setting, 1 if few else 2, compute, 0.0, {"mean": 20.0}, {})

    monkeypatch.setattr(Bench, "run", run)
    alone = Row("interval", "alone", None, Setting("interval:every=7"), 2, 0.15, 0.0, {}, {})
    row = correct(Bench(SimpleNamespace(sampler=SimpleNamespace(num_steps=50)), 0, 2), "interval", alone)
    assert (row.setting, row.images) == (Setting("interval:every=7", f"budget={budget:g}"), 2)


def test_a_variant_that_is_clearly_behind_is_not_searched_further(monkeypatch):
    """At each level from the first on: what it spends is known not to help."""
    asked = []

    def run(self, method, form, setting, few=False):
        every = int(setting.cache.partition("every=")[2].partition(",")[0])
        behind = 2 * CLEAR if "order" in setting.cache else 0.0
        asked.append((every, behind > 0))
        row = Row("", form, None, setting, 1, 1 / every, 0.0, {"mean": 30 - behind}, {})
        return self.rows.setdefault((setting, 0), row)

    monkeypatch.setattr(Bench, "run", run)
    monkeypatch.setattr(compare, "correct", lambda *_: None)
    alone, _ = sweep(Bench(None, 0, 2), "interval", 1 / 8)
    assert alone.setting == Setting("interval:every=8")
    whole, given_up = ([every for every, behind in asked if behind == kind] for kind in (False, True))
    assert len(given_up) < len(whole)
    assert all(every > 8 for every in given_up[:-1])


def test_what_is_out_of_reach_is_left_out(bench, monkeypatch, capsys):
    assert sweep(bench, "interval", 0.02) is None  # 1 of 12 steps is 0.083
    assert all(setting.adacorr is None for setting, _ in bench.rows)  # nothing to correct, so nothing ran
    rows = [row for job in compare.jobs_of(["interval"], [0.02]) for row in job(bench)]
    assert [(row.method, row.form) for row in rows[:2]] == [("literal", "adacorr"), ("ddim", "fewer steps")]
    assert "--adacorr at 0.02: out of reach\ninterval at 0.02: out of reach\n" in capsys.readouterr().out
    assert [row.setting.steps for row in rows[1:]] == [1] * 4
    monkeypatch.setattr(Interval, "knob", Knob("every", 3, 4))
    assert sweep(bench, "interval", 0.9) is None


# --------------------------------------------------------------------------------------------------- a comparison


def swept(stem, ckpt, levels, images, few, solution, methods="interval"):
    """Arguments of one comparison."""
    given = f"compare --num-sampling-steps {STEPS} --device cpu --methods {methods} --levels {levels}"
    given += f" --num-images {images} --search-images {few} --solution-steps {solution} --ckpt"
    return given, ckpt, "--out", stem


@pytest.fixture(scope="module")
def result(tiny32, tmp_path_factory):
    """The files of one comparison by their suffix."""
    out = tmp_path_factory.mktemp("compare") / "new" / "compare"
    arguments = swept(out, tiny32, "0.5,0.3", 3, 2, 24, "taylorseer,interval")
    assert code(main, *arguments, "--plot" if find_spec("matplotlib") else "") == 0
    assert {path.stem for path in out.parent.iterdir()} == {"compare"}
    return {path.suffix: path for path in out.parent.iterdir()}


@pytest.fixture
def content(result):
    return json.loads(result[".json"].read_text(), parse_constant=pytest.fail)  # no NaN, no Infinity


def test_files(result):
    assert set(result) == {".json", ".md"} | ({".png"} if find_spec("matplotlib") else set())
    if ".png" in result:
        with Image.open(result[".png"]) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 400


def test_rows(content):
    by_key = {(row["method"], row["form"], row["level"]): row for row in content["rows"]}
    assert {*leaderboard.SOLVERS} <= {*SOLVERS}
    assert list(by_key) == [
        *(("adacorr", "adacorr", x) for x in (0.5, 0.3)),
        ("literal", "adacorr", None),
        *((name, form, x) for name in ("taylorseer", "interval") for x in (0.5, 0.3) for form in ("alone", "adacorr")),
        *((solver, "fewer steps", x) for solver in SOLVERS for x in (0.5, 0.3)),
    ]
    for (method, form, level), row in by_key.items():
        assert row["speedup"] > 0
        assert set(row["solution_psnr"]) == {"mean", "p5", "min"}
        if form == "alone":
            assert abs(row["compute"] / level - 1) <= REACHED
            assert row["setting"]["cache"].startswith(f"{method}:every=")
            assert by_key[method, "adacorr", level]["setting"]["cache"] == row["setting"]["cache"]
        if form == "fewer steps":
            assert row["setting"]["steps"] == round(level * STEPS)
    unipc = [by_key["unipc", "fewer steps", level]["solution_psnr"]["mean"] for level in (0.5, 0.3)]
    assert unipc[0] > unipc[1]  # more steps come nearer to the solution


def test_the_record_says_what_was_run(content, tiny32):
    assert content["made_with"][:4] == ["python", "-m", "evaluate", "compare"]
    assert content["arguments"]["seed"] == "4242"  # no seed of a calibration, nor the default of sample.py
    assert content["arguments"]["ckpt"] == str(tiny32)
    assert not {"run", "command", "made_with"} & set(content["arguments"])
    assert content["environment"]["torch"] == torch.__version__
    shipped = json.loads(SHIPPED.read_text())
    assert list(content["identity"]) == list(shipped["identity"])
    assert list(content["rows"][0]) == list(shipped["rows"][0])
    assert (content["identity"]["seed"], content["identity"]["num_images"]) == ("4242", "3")
    tried = [(json.dumps(row["setting"], sort_keys=True), row["images"]) for row in content["tried"]]
    assert len(tried) == len(set(tried))  # nothing ran twice
    assert {images for _, images in tried} == {2, 3}  # searched on a few, then run on all
    assert {(json.dumps(row["setting"], sort_keys=True), 3) for row in content["rows"]} <= set(tried)


def test_the_shipped_comparison_can_be_taken_over():
    shipped = json.loads(SHIPPED.read_text())
    rows = known_rows(SHIPPED, shipped["identity"], shipped.get("profile"))
    assert [row.plain() for row in rows.values()] == shipped["tried"]
    others = known_rows(SHIPPED, shipped["identity"], "another profile of the model")
    assert others == {key: row for key, row in rows.items() if row.setting.adacorr in (None, "literal")}
    assert 0 < len(others) < len(rows)
    with pytest.raises(ValueError, match="of another comparison: seed '4242' there, '1' here"):
        known_rows(SHIPPED, {**shipped["identity"], "seed": "1"}, None)
    count, few = (int(shipped["arguments"][key]) for key in ("num_images", "search_images"))
    bench, knob = Bench(None, 4242, count, few=few, rows=rows), Knob("threshold", 0.01, 10.0)
    for level in LEVELS:  # without a model: whatever ran would fail
        row = tune(bench, "lazydit", "lazydit:threshold={}", knob, level, None)
        assert abs(row.compute / level - 1) <= REACHED
        assert row.setting.cache.count(",") == 0  # not a row of another variant


def test_a_run_that_was_stopped_goes_on(tiny32, tmp_path, monkeypatch):
    assert code(main, *swept(tmp_path / "whole", tiny32, "0.5,0.3", 2, 1, 0)) == 0

    def stopped(bench, method, level):
        if level == 0.3:
            raise KeyboardInterrupt
        return sweep(bench, method, level)

    arguments = swept(tmp_path / "stopped", tiny32, "0.5,0.3", 2, 1, 0)
    (tmp_path / "stopped.json").write_text("of another day")
    with monkeypatch.context() as patch:
        patch.setattr(compare, "sweep", stopped)
        assert code(main, *arguments) == 130
    assert (tmp_path / "stopped.before.json").read_text() == "of another day"
    found = json.loads((tmp_path / "stopped.json").read_text())
    assert [row["method"] for row in found["rows"]] == ["adacorr", "adacorr", "literal"]
    assert any(row["method"] == "interval" for row in found["tried"])  # of the method that was stopped, too
    sample, ran = Bench.sample, []
    monkeypatch.setattr(Bench, "sample", lambda self, *a, **k: ran.append(a) or sample(self, *a, **k))
    assert code(main, *arguments, "--known", tmp_path / "stopped.json") == 0
    whole, again = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "stopped"))
    for row in (*again["rows"], *whole["rows"]):
        row.pop("speedup")
    assert again["rows"] == whole["rows"]
    assert not set(ran) & {(Setting(**row["setting"]), row["images"]) for row in found["tried"]}
    assert (tmp_path / "stopped.before.json").read_text() == "of another day"


def test_rows_of_another_comparison_are_refused(result, tiny32, tmp_path, capsys):
    arguments = swept(tmp_path / "x", tiny32, "0.5", 2, 2, 24)
    assert code(main, *arguments, "--known", result[".json"]) == 2
    assert "is of another comparison: num_images '3' there, '2' here" in capsys.readouterr().err
    for text in ("{}", "[]", "nothing", '{"tried": [], "identity": 3}'):
        (tmp_path / "broken.json").write_text(text)
        assert code(main, *arguments, "--known", tmp_path / "broken.json") == 2
        assert "is no result of a comparison" in capsys.readouterr().err


def test_the_page_shows_every_row(result, content):
    page = result[".md"].read_text()
    for row in content["rows"]:
        shown = str(Setting(**row["setting"]))
        line = f"| `{shown}` | {row['compute']:.3f} | {row['hit_rate']:.3f} | {float(row['psnr']['mean']):.1f} / "
        section = "Algorithm 1 to the letter" if row["level"] is None else f"Compute {row['level']:g}"
        own = page.partition(f"## {section}\n")[2].partition("\n## ")[0]
        assert line in own
        assert f"{row['speedup']:.2f}x" in own
    summary = page.partition("| Mean PSNR (dB) at compute | 0.5 | 0.3 |")[2].partition("\n\n")[0]
    names = {line.split("|")[2].strip() for line in summary.splitlines()[2:]}
    assert names == {row["method"] for row in content["rows"] if row["level"] is not None}
    assert summary.count("→") == 4
    assert "3 images of seed 4242" in page
    assert "nan" not in page


# ----------------------------------------------------------------------------------------------------------- tables


def row(method, form, level, score, speedup=None, compute=0.5, **setting):
    scores = {"mean": score, "p5": score, "min": score}
    solved = None if speedup is None else scores
    given = Setting(**setting)
    return Row(method, form, level, given, 2, compute, 0.25, scores, scores, solved, 1_500_000, speedup=speedup)


ROWS = [
    row("interval", "alone", 0.5, 20.0, compute=0.64, cache="interval:every=2"),
    row("interval", "alone", 0.25, 10.0, compute=0.16, cache="interval:every=6"),
    row("interval", "adacorr", 0.5, 25.0, cache="interval:every=2", adacorr="gamma=1"),
    row("never", "alone", 0.5, 20.0, compute=0.55, cache="never"),
    row("never", "adacorr", 0.5, 25.0, compute=0.52, cache="never", adacorr="gamma=1"),
    row("adacorr", "adacorr", 0.5, "inf", speedup=2.0, adacorr="gamma=1"),
    row("adacorr", "adacorr", 0.25, 30.0, compute=0.25, speedup=4.0, adacorr="gamma=0.5"),
    row("unipc", "fewer steps", 0.25, 12.0, compute=0.26, sampler="unipc", steps=2),
]


def test_a_curve_is_read_at_the_level():
    points = [(0.16, 10.0), (0.64, 20.0)]
    assert leaderboard.at(points, 0.32) == (0.32, pytest.approx(15.0))  # half way, in the logarithm
    assert leaderboard.at(points, 0.16) == (0.16, pytest.approx(10.0))
    assert leaderboard.at(points, 0.15) == (0.16, 10.0)  # the nearest end, which is less than a fifth off
    assert leaderboard.at(points, 0.13) is None
    assert leaderboard.at([(0.2, math.inf), (0.4, 30.0)], 0.25) == (0.2, math.inf)
    assert leaderboard.at([], 0.5) is None


def test_families():
    kinds = {"interval": "reuses", "taylorseer": "forecasts", "smoothcache": "by branch", "fastcache": "by token"}
    kinds |= {"adacorr": "AdaCorrection alone", "ddim": "no cache"}
    for method, kind in kinds.items():
        assert kind in leaderboard.family(method)


def test_tables():
    columns, lines = leaderboard.summary(ROWS, [0.5, 0.25], "PSNR", lambda row: row.score)
    assert columns == ["", "PSNR", "0.5", "0.25"]
    assert [line[1:] for line in lines] == [
        ["adacorr", "inf", "30.0"],
        ["unipc", "out of reach", "12.0 at 0.26"],
        ["interval", "18.2 → 25.0", "13.2 → out of reach"],
        ["never", "20.0 at 0.55 → 25.0 at 0.52", "out of reach"],
    ]
    speeds = leaderboard.summary(ROWS, [4.0], "PSNR", lambda row: row.score, leaderboard.speedup)[1]
    assert speeds[0][1:] == ["adacorr", "30.0"]
    assert speeds[2][2] == "out of reach"  # it was not timed
    lines = pages.level_table([ROWS[3], ROWS[5]]).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2] == "| `--cache never` | 0.550 | 0.250 | 20.0 / 20.0 / 20.0 |  | 20.0000 |  | 1.50 |"
    assert lines[3] == "| `--adacorr gamma=1` | 0.500 | 0.250 | inf / inf / inf | inf | inf | 2.00x | 1.50 |"


@needs_matplotlib
@pytest.mark.filterwarnings("error")
def test_the_page_is_made_again_from_the_json(tmp_path, capsys):
    identical = row("interval", "adacorr", 0.25, "inf", cache="interval:every=4", adacorr="gamma=9")
    source, page = tmp_path / "x.json", tmp_path / "page.md"
    for rows in (ROWS, [*ROWS, replace(ROWS[0], level=0.25), identical]):
        source.write_text(json.dumps({"rows": [own.plain() for own in rows], "intro": "What ran."}))
        assert code(main, f"leaderboard {source} --out {page} --plot") == 0
        assert "What ran." in page.read_text()
        assert "| reuses whole steps | interval |" in page.read_text()
        with Image.open(tmp_path / "page.png") as picture:
            assert picture.format == "PNG"
    capsys.readouterr()
    source.write_text('{"rows": [{}]}')
    assert code(main, f"leaderboard {source} --out {page}") == 2
    one_line(capsys, "x.json is no result of a comparison")


# ----------------------------------------------------------------------------------------------------------- errors


def test_a_method_without_a_profile_is_named_before_the_work(tiny32, tmp_path, monkeypatch, capsys):
    name, sample = sorted(calibrated())[0], Bench.sample

    def probe(bench, *given, stop=None, **more):
        """Each method is asked for its first step whether it takes the model."""
        assert stop == 1, "sampled"
        return sample(bench, *given, stop=stop, **more)

    monkeypatch.setattr(calibrated()[name], "knob", Knob("threshold", 0.01, 1.0))
    monkeypatch.setattr(profile, "FOLDER", tmp_path)
    monkeypatch.setattr(Bench, "sample", probe)
    assert code(main, *swept(tmp_path / "x", tiny32, "0.5", 2, 1, 0, methods=f"interval,{name}")) == 2
    one_line(capsys, name, "no profile for this run", "calibrate.py")
    assert list(tmp_path.iterdir()) == []
