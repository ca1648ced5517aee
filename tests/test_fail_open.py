"""Measures that are not finite: the image is computed in full and counted, and its batch mates notice nothing."""

from contextlib import nullcontext
from importlib import import_module

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from toy import Scheduled, fitted, known_model, make_run, make_view, open_run, sample, show, timed_dit, tiny_dit

import adacorr
from adacorr import AdaCorrection, Algorithm1, CacheManager, Unit, View, make_policy
from adacorr.by_image import relative_change
from adacorr.offset import innovation, relative_offset
from adacorr.run import checked_decision
from diffusion import make_sampler
from pipeline import gaussian

NAMES = sorted(adacorr.available())
# For the methods that measure; the others follow a schedule:
# - the function of its module that a method measures with, or "measured" where `View.measured` gets all of it,
# - settings that skip on a model whose features turn as fast as this one's,
# - a call of the measure in whose step image BAD would reuse (for `lazydit`: the branch in question).
MEASURING = {
    "adacache": ("relative_change", "scale=10", 1),
    "dicache": ("relative_change", "threshold=2", 2),
    "easycache": ("measured", "threshold=1,warmup=1", 4),
    "fastcache": ("moved", "threshold=1", 3),
    "first_block": ("relative_change", "threshold=1", 3),
    "h2_cache": ("measured", "threshold=1,detail=1", 2),
    "lazydit": ("measured", "threshold=1", 14),
    "precisecache": ("measured", "threshold=1", 2),
    "rfc": ("relative_change", "threshold=2", 2),
    "sencache": ("measured", "threshold=1,start=1", 3),
    "speca": ("measured", "base_threshold=1000000", 7),
    "teacache": ("relative_change", "threshold=1", 3),
}
LATE = {"adacache", "speca"}  # the decision rests on what was measured in an earlier step
LABELS, BAD, MATES, STEPS, FROM = (3, 0, 1), 1, [0, 2], 20, 9


def make(name, model, folder, options=""):
    _, own, _ = MEASURING.get(name, (None, None, None))
    return fitted(name, model, folder, STEPS, options=",".join(filter(None, [own, options])))


def run(model, manager, value=None, row=None, step=FROM, **arguments):
    """(final states, trace); a value goes to the model for image BAD at step FROM, or to the first block for a row."""

    def poison(_, args):
        z = args[0]
        if model.cache.step == FROM and len(z) == len(LABELS):  # fewer: some images are taken again
            z = z.clone()
            z[BAD] = value
        return z, *args[1:]

    def poison_row(_, args):
        if model.cache.step == step:
            args[0][row] = value

    hook = nullcontext()
    if row is not None:
        hook = model.blocks[0].register_forward_pre_hook(poison_row)
    elif value is not None:
        hook = model.register_forward_pre_hook(poison)
    with hook:
        return sample(model, STEPS, LABELS, cache=manager, **arguments), manager.trace


def same_for_mates(found, expected):
    """Decisions are equal; values are up to rounding, since the row of another image may change the kernel."""
    (out, trace), (clean, clean_trace) = found, expected
    assert np.array_equal(trace.executed[:, :, :, MATES], clean_trace.executed[:, :, :, MATES])
    assert_close(out[MATES], clean[MATES], rtol=1e-4, atol=1e-5)


def broken(original, at, value, image=(..., BAD)):
    """A function like `original` whose result number `at` holds `value` for an image."""
    calls = []

    def measure(*arguments):
        score = original(*arguments)
        calls.append(1)
        if len(calls) == at:
            score[image] = value
        return score

    return measure


def break_measure(monkeypatch, name, value, at):
    """Put `value` for image BAD in the place of what method `name` measures in its call of number `at`."""
    measure, _, _ = MEASURING[name]
    if measure == "measured":
        take = broken(lambda view, score: score, at, value)
        measured = View.measured
        monkeypatch.setattr(View, "measured", lambda view, score: measured(view, take(view, score)))
        return
    module, image = import_module(f"adacorr.policies.{name}"), BAD if name == "fastcache" else (..., BAD)
    monkeypatch.setattr(module, measure, broken(getattr(module, measure), at, value, image))


def break_offset(monkeypatch, value, at, row=BAD):
    """The same for the offset of a row in the computed step number `at` of AdaCorrection, after the first one."""
    monkeypatch.setattr("adacorr.corrected_run.relative_offset", broken(relative_offset, at, value, (..., row)))


# ------------------------------------------------------------------------------- the state of an image is lost


@pytest.mark.parametrize("name", NAMES)
def test_a_lost_image_is_computed_and_its_mates_notice_nothing(name, folder, model):
    policy = make(name, model, folder)
    clean = run(model, CacheManager(policy))
    assert clean[1].fallbacks == 0
    for value in (np.nan, np.inf) if name in MEASURING else (np.nan,):
        out, trace = found = run(model, CacheManager(policy), value)
        same_for_mates(found, clean)
        assert torch.isnan(out[BAD]).all()
        if name not in MEASURING:  # a schedule is a schedule
            assert np.array_equal(trace.executed, clean[1].executed)
            assert trace.fallbacks == 0
            continue
        # What is measured in a computed step shows with the next one.
        start = next(s for s in clean[1].computed_steps(BAD) if s >= FROM) + 1 if name in LATE else FROM
        assert (trace.executed[start:, :, :, BAD] == 1).all()
        assert np.array_equal(trace.executed[:FROM, :, :, BAD], clean[1].executed[:FROM, :, :, BAD])
        assert trace.fallbacks >= (1 if name in LATE else STEPS - FROM - 1)  # some do not look in the last step


@pytest.mark.parametrize("name", [None, *NAMES])
def test_a_lost_image_is_computed_under_adacorrection(name, folder, model):
    policy = name and make(name, model, folder)
    correction = AdaCorrection(gamma=0.3)
    clean = run(model, CacheManager(policy, correction))
    row, step = None, FROM
    if name is None:  # skipped steps do not call the model, so it is lost where the image is computed
        step = next(s for s in clean[1].computed_steps(BAD) if s >= FROM)
        row = int(clean[1].executed[step, 0, 0, :BAD, 0].sum())
    out, trace = found = run(model, CacheManager(policy, correction), np.nan, row, step)
    same_for_mates(found, clean)
    assert torch.isnan(out[BAD]).all()
    start = FROM
    if name not in set(MEASURING) - {"lazydit", *LATE}:  # the others look at computed steps alone
        start = next(s for s in clean[1].computed_steps(BAD) if s >= FROM) + 1
    assert start < STEPS - 1
    assert (trace.executed[start:, :, :, BAD] == 1).all()
    assert (clean[1].executed[start:, :, :, BAD] == 0).any()
    assert trace.fallbacks == trace.summary()["fallbacks"] == STEPS - start
    assert clean[1].fallbacks == clean[1].summary()["fallbacks"] == 0


@pytest.mark.parametrize("name", sorted(set(MEASURING) - {"fastcache", *LATE}))
def test_one_decision_for_all_computes_all(name, folder, model):
    """fastcache measures tokens image by image in any scope."""
    _, trace = run(model, CacheManager(make(name, model, folder, "scope=batch")), np.nan)
    assert (trace.executed[FROM:] == 1).all()
    assert (trace.executed[:FROM] == 0).any()


# -------------------------------------------------------------------------------- only the measure is not finite


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", MEASURING)
def test_a_broken_measure_is_as_one_beyond_all_thresholds(monkeypatch, name, value, folder, model):
    """The same decisions, in this step and in those that follow, and the same images to the bit."""
    policy, (_, _, call) = make(name, model, folder), MEASURING[name]
    clean = run(model, CacheManager(policy))
    found = []
    for bad in (value, 1e30):
        with monkeypatch.context() as patch:
            break_measure(patch, name, bad, call)
            found.append(run(model, CacheManager(policy)))
    (out, trace), (expected, expected_trace) = found
    assert trace.fallbacks == {"adacache": 2}.get(name, 1)  # its first two units decide before it looks again
    same_for_mates(found[0], clean)
    assert not np.array_equal(trace.executed[:, :, :, BAD], clean[1].executed[:, :, :, BAD])
    assert bool(torch.isfinite(out).all())
    if name in ("fastcache", "teacache"):
        # A large saliency says that few others count, and the fitted polynomial ends: these have no such measure.
        assert (trace.executed[call, :, :, BAD] == 1).all()
        return
    assert np.array_equal(trace.executed, expected_trace.executed)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", MEASURING)
def test_a_broken_proposal_is_taken_whatever_the_clock_says(monkeypatch, name, value, folder, model):
    policy, correction = make(name, model, folder), AdaCorrection(gamma=0.05)
    clean = run(model, CacheManager(policy, correction))
    break_measure(monkeypatch, name, value, at=1)
    out, trace = found = run(model, CacheManager(policy, correction))
    same_for_mates(found, clean)
    assert trace.fallbacks == 1
    assert bool(torch.isfinite(out).all())
    new = np.setdiff1d(trace.computed_steps(BAD, half=1), clean[1].computed_steps(BAD, half=1))
    assert len(new)  # both halves, though the clock wanted neither


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("options", [{}, {"difference": False}, {"budget": 6.0}])
@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
def test_an_offset_that_is_not_finite_makes_the_next_step_due(monkeypatch, value, options, cfg_scale, model):
    correction = AdaCorrection(**{"gamma": 1.0 if "budget" in options else 0.05}, **options)
    clean = run(model, CacheManager(correction=correction), cfg_scale=cfg_scale)
    second = clean[1].computed_steps(BAD)[1]
    assert second + 1 not in clean[1].computed_steps(BAD)
    break_offset(monkeypatch, value, at=1)  # at the second computed step, which is the same for all images
    out, trace = found = run(model, CacheManager(correction=correction), cfg_scale=cfg_scale)
    same_for_mates(found, clean)
    assert trace.fallbacks == 1
    assert (trace.executed[second + 1, :, :, BAD] == 1).all()
    assert (trace.executed[second + 2, :, :, BAD] == 0).all()  # and then as after any computed step
    assert bool(torch.isfinite(out).all())


def test_with_a_profile_the_step_after_the_next_computed_one_is_due(monkeypatch, model):
    manager = CacheManager(correction=AdaCorrection(budget=4)).knowing(known_model(model, "2...1...1....1......"))
    clean = run(model, manager)
    _, second, third, fourth = clean[1].computed_steps(BAD)
    break_offset(monkeypatch, np.nan, at=1)  # of the second one, which is read at the third
    found = run(model, manager)
    same_for_mates(found, clean)
    assert found[1].computed_steps(BAD) == [0, second, third, third + 1, fourth]
    assert found[1].fallbacks == 1


def test_a_guidance_difference_that_is_not_finite_makes_the_next_step_due(monkeypatch, model):
    clean = run(model, CacheManager(correction=AdaCorrection()))
    both = clean[1].computed_steps(BAD, half=1)[1]
    # The offsets of the guidance difference come after those of the images that are computed.
    at, images = sum(0 < s <= both for s in clean[1].computed_steps(BAD)), clean[1].executed[both, 0, 0]
    break_offset(monkeypatch, np.nan, at, row=int(images[:, 0].sum() + images[:BAD, 1].sum()))
    found = run(model, CacheManager(correction=AdaCorrection()))
    same_for_mates(found, clean)
    assert found[1].fallbacks == 1
    assert (found[1].executed[both + 1, :, :, BAD] == 1).all()


# --------------------------------------------------------------------------------------------- it is over again


def walk(model, manager, step_lost=None):
    """(outputs (S, rows, C, H, W), trace) of a cache that is shown fixed states, image BAD lost in one of them."""
    x = gaussian(0, np.arange(3), (3, 8, 8))
    states = torch.stack([0.98**step * x for step in range(STEPS)])
    if step_lost is not None:
        states[step_lost, BAD] = np.nan
    return show(model, manager, make_sampler("ddim", STEPS), states, torch.tensor(LABELS)), manager.trace


@pytest.mark.parametrize("name", ["teacache", "first_block", "adacache"])  # with one computed step to reuse
def test_a_policy_forgets_what_was_not_finite(name, folder, model):
    policy = make(name, model, folder)
    clean, clean_trace = walk(model, CacheManager(policy))
    out, trace = walk(model, CacheManager(policy), 5)
    found = torch.isfinite(out[:, [BAD, BAD + 3]]).flatten(1).all(dim=1)
    assert not found[5]
    assert found[8:].all()
    assert (trace.executed[8:, :, :, BAD] < 1).any()  # it reuses again
    assert np.array_equal(trace.executed[:, :, :, MATES], clean_trace.executed[:, :, :, MATES])
    assert_close(out[:, MATES], clean[:, MATES], rtol=1e-4, atol=1e-5)


def test_adacorrection_forgets_what_was_not_finite(model):
    """Steps are computed until an offset was measured on a forecast none of whose three steps is lost."""
    correction = AdaCorrection(difference=False, gamma=0.05)
    clean = walk(model, CacheManager(correction=correction))[1].computed_steps(BAD)
    lost = clean[2]
    out, trace = walk(model, CacheManager(correction=correction), lost)
    finite = torch.isfinite(out[:, [BAD, BAD + 3]]).flatten(1).all(dim=1)
    assert not finite[lost]
    assert finite[lost + 1 :].all()
    assert trace.fallbacks == 4
    ran = trace.computed_steps(BAD)
    assert ran[:7] == [*clean[:3], *range(lost + 1, lost + 5)]
    assert ran[7] > lost + 5


def test_the_literal_form_takes_the_fresh_output(model):
    clean, _ = walk(model, CacheManager(correction=Algorithm1(gamma=0.01)))
    out, trace = walk(model, CacheManager(correction=Algorithm1(gamma=0.01)), 5)
    plain, _ = walk(model, CacheManager(make_policy("never")))
    own = [BAD, BAD + 3]
    assert torch.isnan(out[5, own]).all()
    assert torch.equal(out[6, own], plain[6, own])  # the blend with what is lost would be lost
    assert bool(torch.isfinite(out[7:]).all())
    others = [0, 2, 3, 5]
    assert torch.equal(out[:, others], clean[:, others])
    assert trace.fallbacks == 2 * 3  # in two steps, for three layers
    assert (trace.weight[5:7, :, BAD] == 1).all()


# ------------------------------------------------------------------------------------------------- by hand


def test_lazydits_scores_of_minus_infinity_are_no_reason_to_reuse(tmp_path):
    """Nor when the other half of the image has a finite score, which is the larger one."""
    model, gates = tiny_dit(), tmp_path / "gates.pt"
    entry = "block_{}_{}_lazy_learning_weight_{}"
    names = [entry.format(u.start, u.branch, step) for u in adacorr.by_branch(3) for step in range(STEPS)]
    torch.save({"model": {name: torch.ones(1, 32) for name in names}}, gates)
    policy, info = make_policy(f"lazydit:gates={gates},threshold=1"), make_run(model, 2, 2, STEPS)
    policy.begin(info)
    model.blocks[0].adaLN_modulation[1].weight[:32, 0] = -1e38  # the shift overflows in all channels,
    c = torch.zeros(4, 32)
    c[3, 0] = 1e38  # of the unconditional half of image 1
    view = make_view(info, 3, torch.randn(2, 2, 16, 32), Unit(0, 1, "attn"), c=c)
    policy.decide(view)
    assert view.failed.tolist() == [False, True]


@torch.no_grad()
def test_fastcache_runs_a_block_whose_input_has_no_finite_norm():
    """The input does not change at all, but a change over a norm that overflows says nothing."""
    model = timed_dit(degree=0, depth=3)  # its branches do not look at their input
    manager, sampler = CacheManager(make_policy("fastcache:profile=none,tau=0")), make_sampler("ddim", 2)
    x = torch.ones(2, 16, 32)
    x[1] = 1e25
    with open_run(model, manager, sampler, torch.tensor([0, 1]), cfg_scale=1.0) as opened:
        for step in range(2):
            opened.begin_step(step)
            out = opened.run_blocks(model.blocks, x, torch.ones(2, 32))
    assert bool(torch.isfinite(out).all())
    assert manager.trace.executed[1].any(axis=(1, 3)).tolist() == [[False, True]] * 3
    assert manager.trace.fallbacks == 3


def test_a_size_that_overflows_is_no_small_change():
    """Each value is finite; the mean of before is not, and a finite change over it would come out as 0."""
    before = torch.full((1, 2, 4, 8), 1.0)
    before[:, 1] = 3e38
    change = relative_change(before, before)
    assert change[0] == 0
    assert np.isnan(change[1])
    assert np.isnan(relative_change(before, before, "batch")).all()


@pytest.mark.parametrize("spatial_weight", [0.0, 1.0])
def test_an_offset_from_norms_that_overflow_is_not_finite(spatial_weight):
    fresh = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    predicted = fresh + 0.01
    fresh[1] = 1e25  # the same in all channels, so that its spread is 0
    score = innovation(fresh, predicted, spatial_weight)
    assert bool(torch.isfinite(score[0]))
    assert not bool(torch.isfinite(score[1]))
    # Nor when the prediction overflows in the same way, so that the change is small.
    assert not bool(torch.isfinite(innovation(fresh, fresh, spatial_weight)[1]))


def test_a_policy_says_what_it_measured_and_is_overruled_and_counted(model):
    """Any policy: one line in `decide`, whatever it makes of the number."""
    view = make_view(make_run(model, images=4), 3, torch.zeros(1, 4, 16, 32))

    class Never(Scheduled):
        def decide(self, view):
            score = np.array([[0.0, np.nan, 5.0, 0.0], [1.0, 1.0, 1.0, -np.inf]])
            assert view.measured(score) is score
            return np.zeros(4, dtype=bool)

    policy = Never()
    assert checked_decision(policy, view, policy.decide).tolist() == [False, True, False, True]
    assert view.account.fallbacks == 2
