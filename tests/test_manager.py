"""The cache end to end: exact against the uncached model and against references that keep every branch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from toy import (
    Scheduled,
    Twin,
    apply_gates,
    forecast,
    guided,
    known_model,
    open_run,
    rows_at,
    run_all,
    sample,
    sample_with,
    show,
    timed_dit,
    tiny_dit,
)

from adacorr import AdaCorrection, Algorithm1, CacheManager, Predictor, Unit, by_branch, make_policy, parse_correction
from adacorr.control import amplification, split_budget
from diffusion import make_sampler
from pipeline import alpha_bar, gaussian

LABELS = (3, 0, 3)
CORRECTIONS = [AdaCorrection(gamma=0.3), AdaCorrection(budget=4), Algorithm1(gamma=0.05)]


def corrected(**options):
    return CacheManager(correction=AdaCorrection(**options))


def scheduled(steps, predictor, **options):
    """A cache that computes every image at the same steps."""
    return CacheManager(Scheduled((steps,), predictor, **options))


def branches(order=0):
    return Predictor("branches", order, gate_error=0.0)


def computed(manager, half=0):
    return [manager.trace.computed_steps(i, half) for i in range(manager.trace.images)]


def times(steps):
    return make_sampler("ddim", steps).timesteps


def near(out, expected, rel=1e-5):
    """Equal but for rounding, relative to the size of the whole."""
    assert out.shape == expected.shape
    assert float((out - expected).abs().max()) <= rel * float(expected.abs().max())


def apart(out, expected, rel=1e-3):
    """So different that `near` means something."""
    assert float((out - expected).abs().max()) > rel * float(expected.abs().max())


def distance(out, expected):
    return float((out - expected).norm() / expected.norm())


# ---------------------------------------------------------------------------------- equal to the plain model


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmsolver++"])
@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
def test_never_is_the_plain_model_bit_for_bit(model, sampler, cfg_scale):
    plain = sample(model, sampler=sampler, cfg_scale=cfg_scale)
    manager = CacheManager(make_policy("never"))
    assert torch.equal(sample(model, sampler=sampler, cfg_scale=cfg_scale, cache=manager), plain)
    assert (manager.trace.compute, manager.trace.hit_rate, manager.bytes) == (1.0, 0.0, 0)


@pytest.mark.parametrize("options", ["", ",difference=false", ",rewind=false,difference=false"])
def test_at_the_highest_gamma_every_step_is_computed_and_equals_the_plain_model(model, options):
    manager = CacheManager(correction=parse_correction("gamma=1e6" + options))
    out = sample(model, cache=manager)
    assert computed(manager) == [list(range(10))] * 3
    assert manager.trace.rewound == 0
    near(out, sample(model), rel=1e-5)


# ----------------------------------------------------------------------------------------- the cached path


@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
@pytest.mark.parametrize("depth", [1, 3, 13])
def test_order_0_is_fora(depth, cfg_scale):
    """Pre-gate outputs of the last computed step under the gates of now."""
    model, steps = tiny_dit(depth), (0, 3, 5, 6)
    manager = scheduled(steps, branches())
    out = sample(model, cfg_scale=cfg_scale, cache=manager)
    near(out, sample_with(Twin("branches", steps, times(10)), model, cfg_scale=cfg_scale))
    # A frozen residual is something else.
    apart(out, sample(model, cfg_scale=cfg_scale, cache=scheduled(steps, Predictor("residual", 0))))
    apart(out, sample(model, cfg_scale=cfg_scale))
    assert computed(manager) == [list(steps)] * 3


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_forecasts_equal_those_of_every_branch_with_exact_gates(model, order):
    steps = (0, 1, 3, 4, 8, 13, 15)  # uneven
    out = sample(model, steps=20, cache=scheduled(steps, branches(order)))
    near(out, sample_with(Twin("branches", steps, times(20), order), model, steps=20), rel=1e-4)
    apart(out, sample_with(Twin("branches", steps, times(20), order - 1), model, steps=20))


def test_stored_residuals_are_reused_as_they_were(model):
    steps = (0, 2, 6)
    out = sample(model, cache=scheduled(steps, Predictor("residual", 0)))
    near(out, sample_with(Twin("residual", steps, times(10)), model), rel=1e-6)
    apart(out, sample(model))


def test_images_with_steps_of_their_own_equal_images_alone(model):
    own = ((0, 2, 5), (0, 1, 6, 7), (0, 5))
    manager = CacheManager(Scheduled((*own[:2], (5,)), branches(2)))
    out = sample(model, cache=manager)
    assert computed(manager) == [list(s) for s in own]  # without a past a unit runs, whatever the policy says
    for i, steps in enumerate(own):
        alone = sample_with(Twin("branches", steps, times(10), 2), model, labels=LABELS[i : i + 1], first=i)
        near(out[i : i + 1], alone, rel=1e-4)


# ------------------------------------------------------------------------------------ the practical method


@torch.no_grad()
def practical_reference(model, image, cfg_scale, computed, both, offset, order=2, rewind=True, known=None):
    """The practical AdaCorrection for an image in 24 steps, given its decisions, branch by branch and with exact gates.

    computed, both: steps that compute the conditional half, and both halves. Elsewhere the unconditional half adds what
    the conditional one does, less the difference of the two at the steps of `both`, under fresh gates. Steps are taken
    again once the polynomial has all of its own, where the offset (S,) times the change of log noise is at most 0.6.
    known (S, S): the covariance that the forecasts follow, in place of a polynomial; a rewind then goes back to the
    step of `both` before, where four computed steps reach as far and skipped ones outweigh the others.
    """
    halves, sampler = 1 if cfg_scale == 1.0 else 2, make_sampler("ddim", 24)
    noise = np.sqrt(1 / alpha_bar(sampler) - 1)
    labels, times = torch.tensor(LABELS[image : image + 1]), sampler.timesteps.tolist()
    history, pairs, last, anchors, x = [], ([], []), None, {}, gaussian(0, [image], (3, 8, 8))

    def expected(entries, step, kept):
        if known is None:
            return forecast([(times[at], branches) for at, branches in entries], times[step], order)
        at, branches = zip(*entries[-kept:], strict=True)
        weights = np.linalg.solve(known[np.ix_(at, at)], known[list(at), step])
        return sum(float(w) * value for w, value in zip(weights, branches, strict=True))

    def inferred(step, tokens, c, added):
        """The null half of tokens (2, T, D), c (2, D): what the other half added, less the forecast difference."""
        own, null = (expected(half, step, 3) for half in pairs)
        own, null = (apply_gates(model.blocks, tokens[:1], c[i : i + 1], f) for i, f in enumerate((own, null)))
        return tokens[1:] + added - (own - null)

    def begin(step, x):
        z, t, y = rows_at(model, sampler, step, x, labels, halves)
        return model.embed(z), model.condition(t, y)

    def advance(step, x, c, tokens):
        return sampler.step(step, x, guided(model.decode(tokens, c), cfg_scale))

    def skip(step, x):
        tokens, c = begin(step, x)
        out = apply_gates(model.blocks, tokens[:1], c[:1], expected(history, step, 4))
        if halves == 2:
            out = torch.cat([out, inferred(step, tokens, c, out - tokens[:1])])
        return advance(step, x, c, out)

    for step in range(len(times)):
        if step not in computed:
            x = skip(step, x)
            continue
        tokens, c = begin(step, x)
        out, cond = run_all(model.blocks, tokens[:1], c[:1])
        origin = last
        if halves == 2:
            if step in both:
                before = pairs[0][-1][0] if pairs[0] else step
                again = sum(before < at for at, _ in history)
                kept = known is not None and [*history, (step, None)][-4:][0][0] <= before < step
                far = kept and abs(cfg_scale - 1) * (step - before - 1 - again) > again
                origin = before if far else last
                null_out, null = run_all(model.blocks, tokens[1:], c[1:])
                for half, branches in zip(pairs, (cond, null), strict=True):
                    half.append((step, branches))
            else:
                null_out = inferred(step, tokens, c, out - tokens[:1])
            out = torch.cat([out, null_out])
        history.append((step, cond))
        again = rewind and origin is not None and step - origin > 1
        if again and known is None:
            again = len(history) > order and offset[step] * np.log(noise[origin] / noise[step]) <= 0.6
        if again:
            x = anchors[origin]
            for past in range(origin + 1, step):
                x = skip(past, x)
            added, (tokens, c) = out - tokens, begin(step, x)
            out = tokens + added
        x = advance(step, x, c, out)
        anchors[step], last = x, step
    return x


def checked_decisions(model, manager, cfg_scale, rel, **options):
    """The steps that each image of a run computed, and those of both halves; with them it equals the reference."""
    out, plain = (sample(model, steps=24, cfg_scale=cfg_scale, cache=cache) for cache in (manager, None))
    decisions = list(zip(computed(manager), [[]] * 3 if cfg_scale == 1.0 else computed(manager, 1), strict=True))
    offset = manager.trace.score[:, 0] / amplification(alpha_bar(make_sampler("ddim", 24)))[:, None]
    for i, (steps, both) in enumerate(decisions):
        near(out[i : i + 1], practical_reference(model, i, cfg_scale, steps, both, offset[:, i], **options), rel)
        apart(out[i], plain[i])
    return decisions


@pytest.mark.parametrize(("rewind", "order"), [(True, 0), (True, 1), (True, 2), (False, 2)])
@pytest.mark.parametrize(("cfg_scale", "difference"), [(1.0, True), (4.0, True), (1.5, False)])
def test_the_practical_form_equals_its_reference(model, cfg_scale, difference, order, rewind):
    manager = corrected(gamma=0.3, difference=difference, order=order, rewind=rewind, gate_error=0)
    for steps, both in checked_decisions(model, manager, cfg_scale, 1e-4, order=order, rewind=rewind):
        assert 3 < len(steps) < 20
        assert both == steps if not difference else len(both) < len(steps)


@pytest.mark.parametrize("cfg_scale", [1.0, 1.5, 4.0])
@pytest.mark.parametrize("schedule", ["2..12..1..21..1.2", "21112...1..2.1", "2.1.1.1.2", "2.11.2..11..2"])
def test_with_a_profile_it_equals_its_reference(model, cfg_scale, schedule):
    """Steps of a schedule: 2 computes both halves, 1 the conditional one, and a dot neither."""
    schedule = schedule.ljust(24, ".")
    profile = known_model(model, schedule, cfg_scale)
    manager, known = corrected(budget=20).knowing(profile), profile.arrays["covariance_conditional"]
    steps = [i for i, kind in enumerate(schedule) if kind != "."]
    both = [i for i in steps if cfg_scale != 1.0 and schedule[i] == "2"]
    assert checked_decisions(model, manager, cfg_scale, 1e-3, known=known) == [(steps, both)] * 3


@pytest.mark.parametrize("policy", ["interval:every=4", "taylorseer:every=4"])
def test_with_a_profile_a_policy_spends_no_more_than_the_schedule(model, policy):
    profile = known_model(model, "2....1....2....1....1...", 1.5)
    alone, asked = (CacheManager.of(name, "budget=20").knowing(profile) for name in (None, policy))
    for manager in (alone, asked):
        sample(model, steps=24, cache=manager)
    assert 0 < asked.trace.compute <= alone.trace.compute
    assert computed(asked) != computed(alone)


def test_what_is_known_must_fit_the_run(model):
    profile = known_model(model, "2.1.1.1.2.", 1.5)
    for correction, message in (
        (AdaCorrection(order=1), "order=1 is of the polynomial"),
        (AdaCorrection(rewind=False, tolerance=0.1), "rewind=false,tolerance=0.1 is of the polynomial"),
        (Algorithm1(), "serves AdaCorrection alone"),
    ):
        with pytest.raises(ValueError, match=message):
            CacheManager(correction=correction, profile=profile)
    manager = CacheManager(correction=AdaCorrection(), profile=profile)
    with pytest.raises(ValueError, match="does not fit this run .guidance 1.5 there"):
        sample(model, cache=manager, cfg_scale=4.0)
    sample(model, cache=manager, sampler="unipc")  # any sampler
    sample(model, steps=31, cache=manager)  # any number of steps
    assert computed(manager)[0] == [0, 7, 13, 20, 27]  # at the timesteps of steps 0, 2, 4, 6 and 8
    with pytest.raises(ValueError, match="covariance_difference must have shape"):
        CacheManager(
            correction=AdaCorrection(),
            profile=replace(profile, arrays={**profile.arrays, "covariance_difference": np.eye(3)}),
        )


def alike(model):
    """The same gates in both guidance halves, so that a constant difference of branches is one of what they add."""
    model.y_embedder.embedding_table.weight.zero_()
    for block in model.blocks:
        block.adaLN_modulation[1].weight[:, 1] = 0.0  # the channel that holds the label


@pytest.mark.parametrize("difference", [True, False])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "unipc:solver_order=3"])
def test_rewinding_makes_linear_branches_exact(sampler, difference):
    """A held first step is wrong until the second computed one is known; taken again between the two, it is exact."""
    model = timed_dit(degree=1)
    alike(model)
    plain = sample(model, steps=20, sampler=sampler)
    for rewind, check in ((True, near), (False, apart)):
        manager = corrected(order=1, gate_error=0, difference=difference, rewind=rewind)
        check(sample(model, steps=20, sampler=sampler, cache=manager), plain, 1e-4 if rewind else 1e-3)
        assert (manager.trace.rewound > 0) == rewind
        assert manager.trace.compute < 0.7


def test_samplers_with_a_history_are_never_rewound(model):
    manager = corrected()
    out = sample(model, steps=20, sampler="lms", cache=manager)
    assert manager.trace.rewound == 0
    assert bool(torch.isfinite(out).all())
    assert manager.trace.hit_rate > 0.2


@torch.no_grad()
def test_a_caller_may_leave_rewinding_out_and_forecast_only(model):
    """The loop of `CachedRun` without that line: what `rewind=false` gives."""
    sampler, labels, x = make_sampler("ddim", 24), torch.tensor(LABELS), gaussian(0, range(3), (3, 8, 8))
    manager = corrected(gamma=0.3)
    with open_run(model, manager, sampler, labels) as run:
        for step in range(24):
            run.begin_step(step)
            x = sampler.step(step, x, guided(model(*rows_at(model, sampler, step, x, labels, 2)), 1.5))
    expected = corrected(gamma=0.3, rewind=False)
    near(x, sample(model, steps=24, cache=expected), rel=1e-6)
    apart(x, sample(model, steps=24, cache=corrected(gamma=0.3)), rel=1e-5)
    assert (computed(manager), manager.trace.rewound) == (computed(expected), 0)


def test_the_trace_says_what_was_computed_and_rewound(model):
    manager = corrected(gamma=0.3)
    sample(model, steps=30, cache=manager)
    trace, ran = manager.trace, manager.trace.executed[:, :, 0, :, 0] == 1
    assert (trace.weight[ran] == 1.0).all()
    assert ((trace.weight[~ran] < 1.0) & (trace.weight[~ran] >= 0.0)).all()
    scored = ~np.isnan(trace.score)
    assert (scored[1:] == ran[1:]).all()  # an offset wherever a forecast met the truth
    assert not scored[0].any()
    assert (trace.score[scored] > 0).all()
    blocks = 3 * sum(len(s) for half in (0, 1) for s in computed(manager, half))
    total = 30 * 3 * 3 * 2
    executed = blocks * sum(model.branch_flops()) + total * model.gate_flops()
    assert trace.compute == pytest.approx(executed / (total * sum(model.branch_flops())))
    assert trace.hit_rate == pytest.approx(1 - blocks / total)
    between = [b - a - 1 for steps in computed(manager) for a, b in zip(steps, steps[1:], strict=False)]
    assert 0 < trace.rewound < sum(between)  # not where an offset is large
    assert manager.bytes > 0


@pytest.mark.parametrize("correction", [None, AdaCorrection(gamma=0.3)], ids=str)
def test_modulations_that_are_made_for_a_rule_are_counted(model, correction):
    manager = CacheManager(make_policy("teacache:threshold=0.3,profile=none"), correction)
    sample(model, steps=20, cache=manager)
    seen = 1 if correction else 2  # halves that the policy looks at
    idle = (manager.trace.executed[:, 0, :, :, :seen] == 0).sum()  # branches of the first block, whose input it reads
    gates = 20 * 3 * 3 * 2 * model.gate_flops() if correction else 0
    assert manager.trace.extra_flops == gates + 6 * 32 * 32 * idle
    assert idle > 0


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmsolver++"])
def test_more_gamma_never_computes_less(model, sampler):
    share, error = [], []
    plain = sample(model, steps=50, labels=(1,), sampler=sampler)
    for gamma in (0, 0.1, 0.3, 1, 10, 1000):
        manager = corrected(gamma=gamma)
        error.append(distance(sample(model, steps=50, labels=(1,), sampler=sampler, cache=manager), plain) ** 2)
        share.append(manager.trace.compute)
    assert share == sorted(share)
    assert share[0] < 0.3 * share[-1]
    assert error[-1] < 0.3 * error[2] < 0.3 * error[0]


@pytest.mark.parametrize("steps", [10, 20, 50])
@pytest.mark.parametrize("cfg_scale", [1.0, 1.5, 4.0])
def test_a_budget_is_used_up_and_never_exceeded(model, steps, cfg_scale):
    """In full evaluations, the gates included: every image computes as many steps as fit, all images alike."""
    for budget in (2.5, 3.5, 5, 8):
        for difference in (True, False):
            manager = corrected(budget=budget, difference=difference)
            sample(model, steps=steps, cfg_scale=cfg_scale, cache=manager)
            gates = steps * model.gate_flops() / sum(model.branch_flops())
            halves = manager.trace.halves
            infers = difference and halves == 2
            ran, both = split_budget(budget - gates, steps, halves, cfg_scale - 1 if infers else None)
            assert [len(s) for s in computed(manager)] == [ran] * 3
            assert halves == 1 or [len(s) for s in computed(manager, 1)] == [both] * 3
            used = manager.trace.summary()["evaluations"]
            assert budget - (0.5 if infers else 1.0) < used <= budget


def test_a_budget_that_is_too_small_raises_before_any_work(model):
    with pytest.raises(ValueError, match="leaves . computed step"):
        sample(model, cfg_scale=1.0, cache=corrected(budget=1))
    profile = known_model(model, "2.........", 1.5)
    for sampler in ("ddim", "ddpm"):
        with pytest.raises(ValueError, match="budget=1 is too little: .* give at least") as caught:
            sample(model, sampler=sampler, cache=CacheManager(correction=AdaCorrection(budget=1), profile=profile))
        least = float(str(caught.value).split()[-1])
        manager = CacheManager(correction=AdaCorrection(budget=least), profile=profile)
        sample(model, sampler=sampler, cache=manager)
        assert least - 0.01 < manager.trace.summary()["evaluations"] <= least
    assert model.cache is None


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("correction", [*CORRECTIONS, AdaCorrection(gamma=1e6), AdaCorrection(budget=8)], ids=str)
def test_very_few_steps(model, steps, correction):
    manager = CacheManager(correction=correction)
    out = sample(model, steps=steps, cache=manager)
    assert bool(torch.isfinite(out).all())
    assert manager.trace.done == steps
    if steps == 1:
        near(out, sample(model, steps=1))


@pytest.mark.parametrize("correction", [None, AdaCorrection(), AdaCorrection(budget=80)], ids=str)
def test_repeated_timesteps_do_no_harm(model, correction):
    """A log-SNR grid of many steps rounds several of them to one timestep."""
    sampler = "dpmsolver++:use_lu_lambdas=true"
    assert (make_sampler(sampler, 100).timesteps.diff() == 0).any()
    manager = CacheManager(None if correction else make_policy("interval:every=2,order=2"), correction)
    with np.errstate(divide="raise", invalid="raise"):
        out = sample(model, steps=100, sampler=sampler, cache=manager)
    assert distance(out, sample(model, steps=100, sampler=sampler)) < 1.0


# ------------------------------------------------------------------------------------- policy and correction


def test_the_policy_proposes_and_the_correction_may_veto(model):
    """Asked for in every step, a computation is taken once the weight has come far enough."""
    count = {}
    for spec in ("never", "teacache:threshold=inf,profile=none", None):
        manager = CacheManager(spec and make_policy(spec), AdaCorrection(gamma=0.05))
        sample(model, steps=40, cache=manager)
        count[spec] = len(computed(manager)[0])
        assert computed(manager)[0][0] == 0
    eager, lazy, alone = count.values()
    assert alone < eager < 40
    assert lazy >= alone  # the correction still sees to it


@pytest.mark.parametrize("correction", [{}, {"difference": False}, {"rewind": False}], ids=str)
@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
@pytest.mark.parametrize("policy", ["probe", "by branch", "ranges"])
def test_a_policy_that_never_proposes_changes_nothing(model, policy, cfg_scale, correction):
    """A probe is resumed where a step is computed, and units are walked for the policy: the numbers stay the same."""
    units = {"by branch": by_branch(3), "ranges": [Unit(0, 1), Unit(1, 2, "attn"), Unit(1, 2, "mlp"), Unit(2, 3)]}
    if policy == "probe":
        made = make_policy("first_block:threshold=inf,front=2")
    else:
        made = Scheduled(spans=tuple((u.start, u.stop, u.branch) for u in units[policy]))
    correction = AdaCorrection(gamma=0.3, gate_error=0, **correction)
    with_policy, alone = CacheManager(made, correction), CacheManager(correction=correction)
    out = sample(model, steps=20, cfg_scale=cfg_scale, cache=with_policy)
    near(out, sample(model, steps=20, cfg_scale=cfg_scale, cache=alone))
    probed = 2 if policy == "probe" else 0
    seen = 2 if cfg_scale != 1.0 and not correction.difference else 1  # halves that the policy looks at
    assert (with_policy.trace.executed[:, :probed, :, :, :seen] == 1).all()
    assert np.array_equal(with_policy.trace.executed[:, probed:], alone.trace.executed[:, probed:])
    assert computed(with_policy) == computed(alone)


def test_policies_are_told_what_ran_in_corrected_steps(model):
    spans, told = ((0, 1), (1, 2, "attn"), (1, 2, "mlp"), (2, 3)), []

    class Listening(Scheduled):
        def computed(self, view, ran):
            told.append((view.step, view.unit, ran))
            assert view.x.shape == (1, 3, 16, 32)  # the conditional half: the other one is inferred
            assert torch.equal(view.x[:, ran.images], ran.x)
            if view.unit.branch is not None:
                gate = view.modulation[2][:, ran.images]
                near(ran.out, ran.x + gate * ran.value)
                branch = view.block.attn_branch if view.unit.branch == "attn" else view.block.mlp_branch
                shift, scale = (v[0, ran.images, 0] for v in view.modulation[:2])
                near(ran.value[0], branch(ran.x[0], shift, scale))

    manager = CacheManager(Listening(spans=spans), AdaCorrection(gamma=0.3))
    sample(model, steps=20, cache=manager)
    for at in range(0, len(told), 4):
        steps, units, ran = zip(*told[at : at + 4], strict=True)
        assert len(set(steps)) == 1
        assert units == tuple(Unit(*span) for span in spans)
        assert all(torch.equal(a.out, b.x) for a, b in zip(ran, ran[1:], strict=False))
    for image, steps in enumerate(computed(manager)):
        assert steps == [step for step, unit, ran in told if unit.start == 0 and image in ran.images]


# ------------------------------------------------------------------------------------------------- literal


@pytest.mark.parametrize("form", ["paper", "squared"])
@torch.no_grad()
def test_literal_blends_with_what_it_stored_which_is_the_blend(form):
    """Algorithm 1 by hand: three steps of two blocks, two images, both halves."""
    model, sampler, labels = tiny_dit(depth=2), make_sampler("ddim", 10), torch.tensor([1, 4])
    gamma, spatial_weight = 0.15, 0.5
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(2, 3, 8, 8, generator=generator)
    states = [base, base + 0.3 * torch.randn(2, 3, 8, 8, generator=generator), 1.1 * base]
    manager = CacheManager(correction=Algorithm1(gamma, spatial_weight, form))
    outputs = show(model, manager, sampler, states, labels)

    before = [None, None]
    for step, x in enumerate(states):
        z, t, y = rows_at(model, sampler, step, x, labels, 2)
        h, c = model.embed(z), model.condition(t, y)
        for layer, block in enumerate(model.blocks):
            out = block(h, c)
            if step:
                was, stored = before[layer]
                moved = (h - was).norm(dim=2).unflatten(0, (2, 2)).mean(dim=(0, 2))  # images: over halves, tokens
                spread = h.var(dim=2, correction=0).sqrt().unflatten(0, (2, 2)).mean(dim=(0, 2))
                score = (moved if form == "paper" else moved**2) + spatial_weight * spread
                weight = (gamma * score).clamp(0, 1)
                assert bool(((weight > 0.05) & (weight < 1)).all())
                assert_close(torch.from_numpy(manager.trace.score[step, layer]), score, rtol=1e-4, atol=1e-5)
                assert_close(torch.from_numpy(manager.trace.weight[step, layer]), weight, rtol=1e-4, atol=1e-5)
                rows = weight.repeat(2).view(-1, 1, 1)
                out = (1 - rows) * stored + rows * out
            before[layer] = h, out
            h = out
        assert_close(outputs[step], model.decode(h, c), rtol=1e-4, atol=1e-4)
    assert (manager.trace.executed[:3] == 1).all()  # a blend costs a full evaluation
    assert (manager.trace.compute, manager.trace.hit_rate) == (1.0, 0.0)


# ---------------------------------------------------------------------------------------- birth and death


@pytest.mark.parametrize("correction", CORRECTIONS, ids=str)
def test_a_second_run_does_not_see_the_first(model, correction):
    manager = CacheManager(correction=correction)
    first = sample(model, cache=manager)
    weights = manager.trace.weight
    sample(model, labels=(2,), seed=5, steps=7, cfg_scale=1.0, cache=manager)  # of another shape, in between
    assert torch.equal(sample(model, cache=manager), first)
    assert np.array_equal(manager.trace.weight, weights)
    assert manager.trace.weight is not weights


class Counting(Scheduled):
    """Computes every image in steps 0 and 1, as it counts them itself."""

    seen = 0

    def decide(self, view):
        self.seen += 1
        return view.everyone(self.seen <= 2)


@pytest.mark.parametrize("correction", [None, AdaCorrection(gamma=0.05)], ids=str)
def test_a_run_works_on_a_copy_of_the_policy(model, correction):
    manager = CacheManager(Counting(stored=branches()), correction)
    first = sample(model, cache=manager)
    ran = computed(manager)
    assert torch.equal(sample(model, cache=manager), first)
    assert computed(manager) == ran
    assert manager.policy.seen == 0


@torch.no_grad()
def test_runs_on_two_models_do_not_mix(model):
    other, sampler, labels = tiny_dit(seed=9), make_sampler("ddim", 6), torch.tensor([1, 2])
    states = [gaussian(1, [0, 1], (3, 8, 8)) / (1 + step) for step in range(6)]
    found = []
    with (
        open_run(model, corrected(gamma=0.3), sampler, labels) as first,
        open_run(other, corrected(gamma=0.3), sampler, labels) as second,
    ):
        for step, x in enumerate(states):
            for run, m in ((first, model), (second, other)):
                run.begin_step(step)
                found.append(m(*rows_at(m, sampler, step, x, labels, 2)))
    for i, m in enumerate((model, other)):
        assert torch.equal(torch.stack(found[i::2]), show(m, corrected(gamma=0.3), sampler, states, labels))


@pytest.mark.parametrize("correction", [None, AdaCorrection(), Algorithm1()], ids=str)
def test_misuse_of_a_run_raises_and_leaves_the_model_free(model, correction):
    sampler = make_sampler("ddim", 10)

    def opened():
        manager = CacheManager(None if correction else make_policy("interval"), correction)
        return open_run(model, manager, sampler, torch.tensor([1, 2]))

    def call(labels=(1, 2), halves=2):
        return model(*rows_at(model, sampler, 0, torch.zeros(len(labels), 3, 8, 8), torch.tensor(labels), halves))

    with opened() as run:
        with pytest.raises(RuntimeError, match="no step is open"):
            call()
        run.begin_step(0)
        with pytest.raises(RuntimeError, match="a cache run is open"), opened():
            pass
        for labels, halves in (((1, 2), 1), ((1, 2, 3), 2), ((1,), 2)):
            with pytest.raises(ValueError, match="2 x 2 rows"):
                call(labels, halves)
        assert model.cache is run
        call()
    assert model.cache is None
    with pytest.raises(KeyError), opened():
        raise KeyError
    assert model.cache is None
    call()


def test_a_cache_needs_something_to_do():
    assert CacheManager.of(None) is None
    with pytest.raises(ValueError, match="a policy, a correction or both"):
        CacheManager()


@pytest.mark.parametrize(
    ("policy", "correction", "spec", "name"),
    [
        ("interval", None, "interval", "interval"),
        (None, "", "adacorr", "adacorr"),
        (None, "lambda=0.5,rewind=false", "adacorr:lambda=0.5,rewind=false", "adacorr"),
        (None, "literal:gamma=2,form=squared", "literal:gamma=2,form=squared", "literal"),
        ("interval:every=5", "gamma=2", "interval:every=5+adacorr:gamma=2", "interval + adacorr"),
    ],
)
def test_name_and_spec_are_what_the_cache_was_made_of(model, policy, correction, spec, name):
    manager = CacheManager.of(policy, correction)
    sample(model, cache=manager)
    assert (manager.spec, manager.name) == (spec, name)


@pytest.mark.parametrize("correction", [None, *CORRECTIONS], ids=str)
def test_an_unconditional_model(correction):
    model = tiny_dit(num_classes=0)
    manager = CacheManager(None if correction else make_policy("interval:every=3,order=1"), correction)
    plain = sample(model, cfg_scale=1.0)
    assert distance(sample(model, cfg_scale=1.0, cache=manager), plain) < 0.5
    assert manager.trace.halves == 1
    near(sample(model, cfg_scale=1.0, cache=CacheManager(make_policy("never"))), plain, rel=0)


def test_a_model_without_a_null_label():
    out = sample(tiny_dit(class_dropout_prob=0.0), cfg_scale=1.0, cache=corrected(gamma=0.3))
    assert bool(torch.isfinite(out).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_halves_the_memory_and_stays_finite(dtype):
    exact, size = sample(tiny_dit(), steps=20), {}
    for model_dtype, cache_dtype in ((dtype, torch.float32), (torch.float32, dtype), (dtype, dtype)):
        manager = CacheManager(correction=AdaCorrection(), dtype=cache_dtype)
        out = sample(tiny_dit().to(model_dtype), steps=20, cache=manager)
        assert out.dtype == torch.float32
        assert distance(out, exact) < 0.3
        size[cache_dtype] = manager.bytes
    assert size[torch.float32] == 2 * size[dtype] > 0
    out = sample(tiny_dit().to(dtype), steps=20, cache=CacheManager(correction=Algorithm1()))
    assert out.dtype == torch.float32
    assert distance(out, exact) < 0.3


@pytest.mark.parametrize("policy", [None, "taylorseer:every=3", "interval:every=3", "toca"])
def test_int8_stays_near_the_full_store(policy):
    """Stored branches, blocks and sums of branches, alone and corrected."""
    full, short = (
        CacheManager.of(policy, "budget=8" if policy is None else None, dtype) for dtype in (torch.float32, torch.int8)
    )
    near(sample(tiny_dit(), steps=20, cache=short), sample(tiny_dit(), steps=20, cache=full), rel=0.02)
    assert 0 < short.bytes < full.bytes
