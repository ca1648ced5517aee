"""`python -m evaluate compare`: the search for a compute level, the bench's memory, and a whole comparison."""

import argparse
import json
import math
import sys
from collections import defaultdict
from dataclasses import fields, replace
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from toy import tiny_dit

import pipeline
from adacorr import Algorithm1, available, make_policy, profile
from adacorr.policies import calibrated
from adacorr.policies.interval import Interval
from adacorr.policies.never import Never
from adacorr.policies.taylorseer import TaylorSeer
from adacorr.policy import Knob
from adacorr.spec import parse_spec
from download import save_checkpoint
from evaluate import compare
from evaluate.__main__ import main
from evaluate.compare import GAMMA, NEAR, REACHED, SOLVERS, TRIES, Bench, Row, Setting, search, sweep, with_option
from evaluate.fidelity import fidelity

STEPS, LEVELS = 12, (0.5, 0.3)
KNOBS = {Interval: Knob("every", 1, STEPS, ("", "order=1")), TaylorSeer: Knob("every", 1, STEPS)}


@pytest.fixture(scope="module", autouse=True)
def _knobs():
    """Knobs of this file's own, whatever those of the methods are tuned to."""
    with pytest.MonkeyPatch.context() as patch:
        for kind, knob in KNOBS.items():
            patch.setattr(kind, "knob", knob)
        yield


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    model = tiny_dit(input_size=16, patch_size=4)  # SSIM needs 11 pixels
    path = tmp_path_factory.mktemp("compare") / "tiny.safetensors"
    save_checkpoint(path, model.state_dict(), model.config)
    return path


def flags(ckpt):
    return ["--ckpt", str(ckpt), "--num-sampling-steps", str(STEPS), "--device", "cpu"]


@pytest.fixture
def bench(ckpt):
    parser = argparse.ArgumentParser()
    pipeline.add_model_flags(parser)
    pipe, _ = pipeline.load(argparse.Namespace(**vars(parser.parse_args(flags(ckpt))), cache=None, adacorr=None))
    return Bench(pipe, 4242, torch.arange(2), 2, 0, few=2)


def code(*argv):
    """Exit code of `main`, argparse's own included."""
    try:
        return main([str(a) for a in argv])
    except SystemExit as stop:
        return stop.code


# --------------------------------------------------------------------------------------------------------- search


class Law:
    """A run whose compute follows a function; it remembers what it was asked for."""

    def __init__(self, compute):
        self.compute, self.asked = compute, []

    def __call__(self, value):
        self.asked.append(value)
        return SimpleNamespace(value=value, compute=self.compute(value))


def test_search_stops_at_the_first_value_that_is_near():
    law = Law(lambda x: 0.1 / x)
    row = search(law, Knob("x", 0.1, 1.0), 0.3)
    assert all(abs(0.1 / x / 0.3 - 1) > NEAR for x in law.asked[:-1])
    assert row.value == law.asked[-1]
    assert abs(row.compute / 0.3 - 1) <= NEAR
    assert len(law.asked) == len(set(law.asked)) < TRIES


def test_search_follows_a_straight_line():
    law = Law(lambda x: 0.1 / x)  # straight on logarithmic scales, so the second guess is the answer
    tried = {0.2: SimpleNamespace(compute=0.5), 0.8: SimpleNamespace(compute=0.125)}
    row = search(law, Knob("x", 0.1, 1.0), 0.25, tried=tried)
    assert law.asked == [0.4]
    assert (row.value, row.compute) == (0.4, pytest.approx(0.25))
    assert set(tried) == {0.2, 0.4, 0.8}  # the next search knows it
    assert search(law, Knob("x", 0.1, 1.0), 0.25, tried=tried) is row
    assert law.asked == [0.4]


def test_search_begins_with_the_guess_and_stays_near_it():
    law = Law(lambda g: 0.05 + 0.95 * g / (g + 1))
    row = search(law, GAMMA, 0.5, first=1.0)  # 0.525 there
    assert law.asked[0] == 1.0
    assert len(law.asked) <= 4
    assert abs(row.compute / 0.5 - 1) <= NEAR


def test_search_ends_where_compute_comes_in_steps():
    law = Law(lambda x: 0.6 if x < 0.3 else 0.2)
    row = search(law, Knob("x", 0.2, 0.5), 0.4, most=0.41)
    assert row.compute == 0.2
    assert len(law.asked) < TRIES  # not the fourth digit of 0.3


@pytest.mark.parametrize("target", [0.9, 0.5, 0.35, 0.15, 0.06])
@pytest.mark.parametrize(
    ("knob", "compute"),
    [
        (Knob("threshold", 1e-4, 10.0), lambda x: 0.05 + 0.95 / (1 + x)),
        (Knob("threshold", 1e-4, 10.0), lambda x: max(0.02, round(50 / (1 + 4 * x**2)) / 50)),  # in steps
        (GAMMA, lambda g: 0.05 + 0.95 * g / (g + 1)),  # more gamma is more compute, so its low end is the larger
    ],
)
def test_search_of_numbers(knob, compute, target):
    law = Law(compute)
    row = search(law, knob, target)
    best = min((compute(x) for x in np.geomspace(knob.low, knob.high, 2000)), key=lambda c: abs(math.log(c / target)))
    assert len(law.asked) <= TRIES
    assert abs(math.log(row.compute / target)) <= abs(math.log(best / target)) + NEAR
    low, high = sorted((knob.low, knob.high))
    assert all(low <= x <= high and float(f"{x:g}") == x for x in law.asked)  # what is printed is what ran


def ladders(count):
    """Compute that falls along whole numbers in stairs of any height and width."""
    for seed in range(count):
        random = np.random.default_rng(seed)
        size = int(random.integers(2, 60))
        stairs = np.sort(random.choice(random.uniform(0.05, 1.0, size), size))[::-1]
        yield random, stairs


def test_search_of_whole_numbers_finds_the_best_there_is():
    for random, stairs in ladders(200):
        low = int(random.integers(0, 4))
        law = Law(lambda x, low=low, stairs=stairs: stairs[x - low])
        target = random.uniform(0.05, 1.0)
        row = search(law, Knob("every", low, low + len(stairs) - 1), target)
        assert all(type(x) is int for x in law.asked)
        best = np.abs(np.log(stairs / target)).min()
        assert abs(math.log(row.compute / target)) <= max(best, -math.log(1 - NEAR)) + 1e-12
        assert len(set(law.asked)) <= TRIES


def test_search_is_never_above_the_most_where_it_can():
    for random, stairs in ladders(200):
        target = random.uniform(0.1, 1.0)
        most = target * random.choice([1.0, 1.03, 1.2])
        row = search(Law(lambda x, stairs=stairs: stairs[x]), Knob("every", 0, len(stairs) - 1), target, most)
        allowed = stairs[stairs <= most]
        assert row.compute <= most or not len(allowed)
        best = np.abs(np.log((allowed if len(allowed) else stairs) / target)).min()
        assert abs(math.log(row.compute / target)) <= max(best, -math.log(1 - NEAR)) + 1e-12


def test_search_of_numbers_is_never_above_the_most():
    for target in (0.9, 0.5, 0.2, 0.11):
        for most in (target, target * 1.03):
            row = search(Law(lambda g: 0.1 + 0.9 * g / (g + 1)), GAMMA, target, most)
            assert row.compute <= most
            assert row.compute == pytest.approx(target, rel=0.05)
            row = search(Law(lambda g: max(0.1, round(20 * g / (g + 1)) / 20)), GAMMA, target, most)
            assert row.compute <= most
    row = search(Law(lambda g: 0.1 + 0.9 * g / (g + 1)), GAMMA, 0.5, most=0.4)  # then the most is what it goes for
    assert 0.37 < row.compute <= 0.4


@pytest.mark.parametrize("knob", [Knob("every", 1, 9), Knob("threshold", 0.01, 10.0), GAMMA], ids=["int", "float", ""])
def test_search_of_what_is_out_of_reach_gives_the_nearest(knob):
    falls = knob is not GAMMA
    law = Law(lambda x: 0.6 + (0.1 / (1 + x) if falls else 0.1 * x / (1 + x)))
    below, above = search(law, knob, 0.1), search(law, knob, 0.95)
    assert below.compute == pytest.approx(0.6, abs=0.011)
    assert above.compute > below.compute + 0.03
    assert search(law, knob, 0.1, most=0.1).compute == below.compute
    assert search(Law(lambda x: 0.5), knob, 0.2).compute == 0.5  # a knob that does nothing


def test_search_of_one_whole_number():
    assert search(Law(lambda x: 0.4), Knob("every", 3, 3), 0.2).value == 3
    assert {search(Law(lambda x: 1 / x), Knob("every", 1, 2), t).value for t in (0.9, 0.5)} == {1, 2}


# -------------------------------------------------------------------------------------------------- specs and flags


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("rule",), "rule"),
        (("rule", ""), "rule"),
        (("rule", "a=1"), "rule:a=1"),
        (("rule", "a=1", ""), "rule:a=1"),
        (("rule", "", "b=2"), "rule:b=2"),
        (("rule", "a=1", "b=2,c=x"), "rule:a=1,b=2,c=x"),
        (("rule:z=0", "a=1"), "rule:z=0,a=1"),
    ],
)
def test_with_option(given, expected):
    assert with_option(*given) == expected


def test_parse_methods(monkeypatch):
    assert compare.parse_methods("interval, taylorseer") == ["interval", "taylorseer"]
    assert compare.parse_methods("taylorseer,interval,taylorseer") == ["taylorseer", "interval"]
    assert {"interval", "taylorseer"} <= set(compare.parse_methods("all")) <= set(available())
    assert "never" not in compare.parse_methods("all")
    for text, words in {
        "intervall": ["'intervall'", "did you mean interval?"],
        "interval,": ["''"],
        "interval,nothing": ["'nothing'", "taylorseer"],
        "never": ["'never'"],  # a method without a knob cannot be swept
        "": ["''"],
    }.items():
        with pytest.raises(ValueError, match="--methods: ") as caught:
            compare.parse_methods(text)
        assert all(word in str(caught.value) for word in words), str(caught.value)
    monkeypatch.setattr(Never, "knob", Knob("every", 1, 2))
    assert "never" in compare.parse_methods("all")


def test_parse_levels():
    assert compare.parse_levels("0.15, 0.5,.25") == [0.5, 0.25, 0.15]
    assert compare.parse_levels("0.5,0.5") == [0.5]
    for text in ("0", "1", "1.5", "-0.1", "nan", "inf", "half", "", "0.5,,0.2"):
        with pytest.raises(ValueError, match=r"--levels: .* between 0 and 1"):
            compare.parse_levels(text)
    with pytest.raises(ValueError, match="'2'"):
        compare.parse_levels("0.5,2,3")


def test_every_knob_and_variant_is_an_option_of_its_method():
    for name in compare.parse_methods("all"):
        kind = type(make_policy(name))
        knob = kind.knob
        assert knob.option in {f.name for f in fields(kind)}, name
        assert isinstance(knob.low, int) == isinstance(knob.high, int), name
        assert knob.variants, name
        for variant in knob.variants:
            for value in (knob.low, knob.high):
                assert isinstance(value, int) or value > 0, name  # the search is on a logarithmic scale
                spec = with_option(name, f"{knob.option}={value:g}", variant)
                policy = make_policy(spec)  # ValueError for what the method does not take
                assert getattr(policy, knob.option) == value
                assert len(parse_spec(spec)[1]) == 1 + len([v for v in variant.split(",") if v])


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        (Setting("interval:every=3"), "--cache interval:every=3"),
        (Setting("interval", "gamma=2"), "--cache interval --adacorr gamma=2"),
        (Setting(None, ""), "--adacorr"),
        (Setting(None, "literal"), "--adacorr literal"),
        (Setting(sampler="unipc", steps=5), "--sampler unipc --num-sampling-steps 5"),
        (Setting(), ""),
    ],
)
def test_a_setting_reads_as_flags(setting, text):
    assert str(setting) == text
    manager = setting.manager()
    assert (manager is None) == (setting.cache is None and setting.adacorr is None)
    if setting.adacorr == "literal":
        assert isinstance(manager.correction, Algorithm1)


# ---------------------------------------------------------------------------------------------------- bench, sweep


def test_a_setting_runs_once(bench, monkeypatch):
    runs, sample = [], pipeline.Pipeline.sample
    assert len(bench.reference) == 2  # sampled when first asked for
    monkeypatch.setattr(pipeline.Pipeline, "sample", lambda *a, **k: runs.append(1) or sample(*a, **k))
    first = bench.run("interval", "alone", Setting("interval:every=3"))
    assert bench.run("interval", "alone", Setting("interval:every=3")) is first
    assert len(runs) == 1
    other = bench.run("interval", "adacorr", Setting("interval:every=3", "gamma=1"))
    assert len(runs) == 2
    assert other is not first
    assert list(bench.rows.values()) == [first, other]


def test_a_few_images_are_the_first_of_all(bench):
    bench.few, setting = 1, Setting("interval:every=3")
    row, whole = bench.run("interval", "alone", setting, few=True), bench.run("interval", "alone", setting)
    assert (row.images, whole.images) == (1, 2)
    images = bench.pipe.decode(bench.states(setting, setting.manager()))
    assert row.score == pytest.approx(fidelity(bench.reference[:1], images[:1])["psnr"]["mean"], abs=0.5)
    assert bench.run("interval", "alone", setting, few=True) is row


def test_gamma_is_lowered_until_all_images_spend_no_more():
    class Fake:
        """The few images say that gamma=1 is enough; all of them need less."""

        searched = defaultdict(dict)

        def run(self, method, form, setting, few=False):
            gamma = float((setting.adacorr or "gamma=0").partition("=")[2])
            compute = 0.5 if form == "alone" else min(0.5 * gamma if few else 0.6 * gamma, 1.0)
            return SimpleNamespace(setting=setting, form=form, compute=compute, score=20.0)

    _, corrected = sweep(Fake(), "interval", 0.5)
    assert 0.5 * 0.7 < corrected.compute <= 0.5 * (1 + NEAR)


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
    same = bench.run("ddim", "fewer steps", Setting(sampler="ddim", steps=STEPS))
    assert same.score == math.inf


def test_fewer_steps_are_of_their_own_sampler_on_the_same_noise(bench):
    steps = bench.pipe.sampler.num_steps
    with_steps = bench.states(Setting(sampler="unipc", steps=4))
    again = replace(bench.pipe, sampler=compare.make_sampler("unipc", 4))
    assert torch.equal(with_steps, again.sample(4242, np.arange(2), torch.arange(2)))
    assert bench.pipe.sampler.num_steps == steps  # the bench's own is as it was


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
    assert corrected.setting.adacorr.startswith("gamma=")
    assert corrected.form == "adacorr"
    assert corrected.compute <= alone.compute * (1 + NEAR)


def test_sweep_prefers_less_compute_to_more():
    class Fake:
        searched = defaultdict(dict)

        def run(self, method, form, setting, few=False):
            gamma = float((setting.adacorr or "gamma=0").partition("=")[2])
            compute = 0.5 if form == "alone" else 0.52 if gamma > 1 else 0.45
            return SimpleNamespace(setting=setting, form=form, compute=compute, score=20.0)

    alone, corrected = sweep(Fake(), "interval", 0.5)
    assert (alone.compute, corrected.compute) == (0.5, 0.45)  # 0.52 is nearer, but over the 3 % that are let pass


def test_sweep_out_of_reach(bench, monkeypatch):
    assert sweep(bench, "interval", 0.02) is None  # 1 of 12 steps is 0.083
    assert all(setting.adacorr is None for setting, _ in bench.rows)  # nothing to correct, so nothing ran
    monkeypatch.setattr(Interval, "knob", Knob("every", 3, 4))
    assert sweep(bench, "interval", 0.9) is None


def test_adacorr_alone_out_of_reach_is_left_out(bench):
    said = []
    rows = list(compare.compare(bench, [], [0.02], said.append))
    assert [row.form for row in rows] == ["adacorr"] + ["fewer steps"] * 4
    assert rows[0].method == "literal"
    assert "--adacorr at 0.02: out of reach" in said
    assert {row.setting.steps for row in rows[1:]} == {1}


# --------------------------------------------------------------------------------------------------- a comparison


@pytest.fixture(scope="module")
def result(ckpt):
    """(exit code, files by suffix) of one comparison."""
    torch.set_num_threads(1)
    out = ckpt.parent / "new" / "compare"
    given = [
        "--methods",
        "taylorseer,interval",
        "--levels",
        ",".join(map(str, LEVELS)),
        "--num-images",
        3,
        "--search-images",
        2,
    ]
    given += ["--solution-steps", 24, "--repeats", 1, "--out", out]
    plot = ["--plot"] if find_spec("matplotlib") else []
    exit_code = code("compare", *flags(ckpt), *given, *plot)
    return exit_code, {path.suffix[1:]: path for path in out.parent.iterdir()}


@pytest.fixture
def content(result):
    return json.loads(result[1]["json"].read_text(), parse_constant=pytest.fail)  # no NaN, no Infinity


def test_files(result):
    exit_code, files = result
    assert exit_code == 0
    assert set(files) == {"json", "md"} | ({"png"} if find_spec("matplotlib") else set())
    assert {path.stem for path in files.values()} == {"compare"}


def test_rows(content):
    rows = [(row["method"], row["form"], row["level"]) for row in content["rows"]]
    solvers = ["ddim", "dpmsolver++", "dpmsolver++ (log-SNR)", "unipc"]
    assert rows == [
        *((method, form, x) for method in ("taylorseer", "interval") for x in LEVELS for form in ("alone", "adacorr")),
        *(("adacorr", "adacorr", x) for x in LEVELS),
        ("literal", "adacorr", None),
        *((solver, "fewer steps", x) for x in LEVELS for solver in solvers),
    ]
    assert len(solvers) == len(SOLVERS)


def test_compute_of_the_rows(content):
    by_key = {(row["method"], row["form"], row["level"]): row for row in content["rows"]}
    for (method, form, level), row in by_key.items():
        if method == "literal":
            assert row["compute"] == pytest.approx(1, abs=0.01)
            assert 0 <= row["weights_at_1"] <= 1
            continue
        assert row["weights_at_1"] is None
        if form == "alone":
            assert abs(row["compute"] / level - 1) <= REACHED
            after = by_key[method, "adacorr", level]
            assert after["compute"] <= row["compute"] * (1 + NEAR)
            assert after["setting"]["cache"] == row["setting"]["cache"]
            assert row["setting"]["cache"].startswith(f"{method}:every=")
        if form == "fewer steps":
            assert row["setting"]["steps"] == round(level * STEPS)
            assert row["compute"] == row["setting"]["steps"] / STEPS


def test_measures_of_the_rows(content):
    for row in content["rows"]:
        assert set(row) == {f.name for f in fields(Row)}
        assert row["speedup"] > 0
        assert 0 <= row["hit_rate"] < 1
        for scores in (row["psnr"], row["ssim"], row["solution_psnr"]):
            assert set(scores) == {"mean", "p5", "min"}
            assert float(scores["min"]) <= float(scores["p5"]) <= float(scores["mean"])
        assert (row["bytes_per_image"] == 0) == (row["form"] == "fewer steps")
    scores = {(row["method"], row["level"]): row["solution_psnr"]["mean"] for row in content["rows"]}
    assert scores["unipc", 0.5] > scores["unipc", 0.3]  # more steps come nearer to the solution


def test_the_record_says_what_was_run(content, ckpt):
    assert content["made_with"][:5] == ["python", "-m", "evaluate", "compare", "--ckpt"]
    assert content["arguments"]["seed"] == "4242"  # no seed of a calibration, nor the default of sample.py
    assert content["arguments"]["ckpt"] == str(ckpt)
    assert not {"run", "command", "made_with"} & set(content["arguments"])
    assert content["environment"]["torch"] == torch.__version__
    assert len(content["identity"]["checkpoint_sha256"]) == 64
    assert (content["identity"]["seed"], content["identity"]["num_images"]) == (
        "4242",
        content["arguments"]["num_images"],
    )
    tried = [(json.dumps(row["setting"], sort_keys=True), row["images"]) for row in content["tried"]]
    assert len(tried) == len(set(tried))  # nothing ran twice
    assert {images for _, images in tried} == {2, 3}  # searched on a few, then run on all
    assert {(json.dumps(row["setting"], sort_keys=True), 3) for row in content["rows"]} <= set(tried)


def test_known_rows_are_not_run_again(result, content, ckpt, tmp_path, monkeypatch):
    given = ["--methods", "interval", "--levels", "0.5", "--num-images", 3, "--solution-steps", 24, "--repeats", 0]
    given += ["--search-images", 2]
    given += ["--out", tmp_path / "again", "--known", result[1]["json"]]
    monkeypatch.setattr(Bench, "states", lambda *_: pytest.fail("something was sampled"))
    assert code("compare", *flags(ckpt), *given) == 0
    again = json.loads((tmp_path / "again.json").read_text())
    kept = [{**row, "speedup": None} for row in content["rows"] if row["level"] == 0.5 and row["method"] == "interval"]
    assert [row for row in again["rows"] if row["method"] == "interval"] == kept


def test_a_run_that_was_stopped_goes_on(ckpt, tmp_path, monkeypatch):
    out = tmp_path / "stopped"
    given = ["--methods", "interval", "--levels", "0.5,0.3", "--num-images", 2, "--search-images", 1]
    given += ["--solution-steps", 0, "--repeats", 0, "--out"]
    assert code("compare", *flags(ckpt), *given, tmp_path / "whole") == 0

    def stopped(bench, method, level, gamma):
        if level == 0.3:
            raise KeyboardInterrupt
        return sweep(bench, method, level, gamma)

    monkeypatch.setattr(compare, "sweep", stopped)
    assert code("compare", *flags(ckpt), *given, out) == 130
    monkeypatch.undo()
    found = json.loads(out.with_suffix(".json").read_text())
    assert [row["level"] for row in found["rows"]] == [0.5, 0.5]
    states, ran = Bench.states, []
    monkeypatch.setattr(
        Bench, "states", lambda self, setting, *rest: ran.append(setting) or states(self, setting, *rest)
    )
    assert code("compare", *flags(ckpt), *given, out, "--known", out.with_suffix(".json")) == 0
    whole, again = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "stopped"))
    assert again["rows"] == whole["rows"]
    assert not {str(setting) for setting in ran} & {str(Setting(**row["setting"])) for row in found["tried"]}


def test_rows_of_another_comparison_are_refused(result, ckpt, tmp_path, capsys):
    given = [
        "--num-images",
        2,
        "--search-images",
        2,
        "--solution-steps",
        24,
        "--out",
        tmp_path / "x",
        "--known",
        result[1]["json"],
    ]
    assert code("compare", *flags(ckpt), *given, "--methods", "interval") == 2
    assert "is of another comparison: num_images '3' there, '2' here" in capsys.readouterr().err
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    given[-1] = broken
    assert code("compare", *flags(ckpt), *given, "--methods", "interval") == 2
    assert "is no result of a comparison" in capsys.readouterr().err


def test_the_page_shows_every_row(result, content):
    page = result[1]["md"].read_text()
    for row in content["rows"]:
        spec = row["setting"]
        if "sampler" in spec:
            shown = f"--sampler {spec['sampler']} --num-sampling-steps {spec['steps']}"
        else:
            shown = " ".join(f"--{key} {spec[key]}" for key in ("cache", "adacorr") if key in spec)
        line = f"| `{shown}` | {row['compute']:.3f} | {row['hit_rate']:.3f} | {float(row['psnr']['mean']):.1f} / "
        assert line in page
        section = "Algorithm 1 to the letter" if row["level"] is None else f"Compute {row['level']:g}"
        own = page.partition(f"## {section}\n")[2].partition("\n## ")[0]
        assert line in own
        assert f"{row['speedup']:.2f}x" in own
    summary = page.partition("| PSNR (dB) at compute | 0.5 | 0.3 |")[2].partition("\n\n")[0]
    names = [line.split("|")[1].strip() for line in summary.splitlines()[2:]]
    assert names == list(dict.fromkeys(row["method"] for row in content["rows"] if row["level"] is not None))
    assert summary.count("→") == 4
    assert "24" in content["made_with"]
    assert "3 images of seed 4242" in page
    assert "nan" not in page


@pytest.mark.skipif(not find_spec("matplotlib"), reason="needs matplotlib")
def test_the_plot_is_a_picture(result):
    with Image.open(result[1]["png"]) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 400


# ----------------------------------------------------------------------------------------------------------- tables


def row(method, form, level, score, speedup=None, **setting):
    scores = {"mean": score, "p5": score, "min": score}
    solved = None if speedup is None else scores
    given = Setting(**setting)
    return Row(method, form, level, given, 2, 0.5, 0.25, scores, scores, solved, 1_500_000, speedup=speedup)


ROWS = [
    row("interval", "alone", 0.5, 20.04, cache="interval:every=2"),
    row("interval", "adacorr", 0.5, 25.0, cache="interval:every=2", adacorr="gamma=1"),
    row("adacorr", "adacorr", 0.5, "inf", speedup=2.0, adacorr="gamma=1"),
    row("adacorr", "adacorr", 0.25, 30.0, adacorr="gamma=0.5"),
]


def test_summary_table():
    assert compare.summary_table(ROWS, [0.5, 0.25]).splitlines() == [
        "| PSNR (dB) at compute | 0.5 | 0.25 |",
        "|---|---|---|",
        "| interval | 20.0 → 25.0 | out of reach |",
        "| adacorr | inf | 30.0 |",
    ]


def test_level_table():
    lines = compare.level_table([ROWS[0], ROWS[2]]).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2] == "| `--cache interval:every=2` | 0.500 | 0.250 | 20.0 / 20.0 / 20.0 |  | 20.0400 |  | 1.50 |"
    assert lines[3] == "| `--adacorr gamma=1` | 0.500 | 0.250 | inf / inf / inf | inf | inf | 2.00x | 1.50 |"


@pytest.mark.skipif(not find_spec("matplotlib"), reason="needs matplotlib")
@pytest.mark.filterwarnings("error")
def test_a_plot_of_few_rows_and_identical_images(tmp_path):
    identical = row("interval", "adacorr", 0.25, "inf", cache="interval:every=4", adacorr="gamma=9")
    for name, rows in {"some": ROWS, "inf": [*ROWS, replace(ROWS[0], level=0.25), identical]}.items():
        compare.plot(rows, tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.format == "PNG"


# ----------------------------------------------------------------------------------------------------------- errors


def one_line(capsys, *words):
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("evaluate")
    assert ": error: " in err
    assert err.count("\n") == 1
    assert all(word in err for word in words), err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--methods", "intervall"], ["--methods", "did you mean interval?"]),
        (["--methods", "never"], ["--methods", "never"]),
        (["--levels", "0.5,2"], ["--levels", "'2'"]),
        (["--levels", "half"], ["--levels", "'half'"]),
        (["--num-images", "0"], ["--num-images", "0"]),
        (["--solution-steps", "1001"], ["--solution-steps", "1001"]),
        (["--repeats", "-1"], ["--repeats", "-1"]),
        (["--num-images", 4, "--search-images", 2, "--timed-images", 5], ["--timed-images", "5", "4"]),
        (["--num-sampling-steps", "1"], ["--num-sampling-steps", "1"]),
        (["--num-sampling-steps", "1001"], ["--num-sampling-steps", "1001"]),
        (["--num-images", "many"], ["--num-images", "many"]),
        (["--sampler", "dimm"], ["dimm", "ddim"]),
        (["--cfg-scale", "nan"], ["--cfg-scale", "nan"]),
        (["--colour"], ["--colour"]),
        (["--out", f"{__file__}/x"], ["--out", "test_compare.py"]),
    ],
)
def test_mistakes_are_one_line_before_any_weights_are_read(tmp_path, monkeypatch, capsys, argv, words):
    monkeypatch.setattr(pipeline, "load_checkpoint", lambda *_, **__: pytest.fail("read a checkpoint"))
    monkeypatch.chdir(tmp_path)
    assert code("compare", "--methods", "interval", "--out", "x", *argv) == 2
    one_line(capsys, *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", ["json", "md", "png"])
def test_a_folder_in_the_place_of_a_file(tmp_path, capsys, suffix):
    (tmp_path / f"x.{suffix}").mkdir()
    assert code("compare", "--methods", "interval", "--out", tmp_path / "x") == 2
    one_line(capsys, f"x.{suffix}", "is a folder")


def test_a_folder_that_is_not_writable(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("os.access", lambda *_: False)  # tests may run as root, who may write anywhere
    assert code("compare", "--methods", "interval", "--out", tmp_path / "x") == 2
    one_line(capsys, "--out", "not writable")


def test_a_plot_without_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert code("compare", "--methods", "interval", "--out", tmp_path / "x", "--plot") == 2
    one_line(capsys, "--plot", "matplotlib")


def test_a_method_without_a_profile_is_named_before_the_work(ckpt, tmp_path, monkeypatch, capsys):
    name = sorted(calibrated())[0]
    monkeypatch.setattr(calibrated()[name], "knob", Knob("threshold", 0.01, 1.0))
    monkeypatch.setattr(profile, "FOLDER", tmp_path)
    monkeypatch.setattr(Bench, "states", lambda *_: pytest.fail("began the work"))
    assert code("compare", "--methods", f"interval,{name}", "--out", tmp_path / "x", *flags(ckpt)) == 2
    one_line(capsys, name, "no profile for this run", "calibrate.py")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_is_quiet(ckpt, tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline.Pipeline, "sample", interrupted)
    assert code("compare", "--methods", "interval", "--out", tmp_path / "x", *flags(ckpt)) == 130
    assert capsys.readouterr() == ("", "")


def test_what_is_required(capsys):
    assert code() == 2
    one_line(capsys, "command")
    assert code("compare") == 2
    one_line(capsys, "--out")


@pytest.mark.parametrize("argv", [["--help"], ["compare", "--help"]])
def test_help(capsys, argv):
    assert code(*argv) == 0
    assert "compare" in capsys.readouterr().out
