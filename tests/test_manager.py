"""The cache end to end: exact against the uncached model and against references that keep every branch."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from toy import (
    Scheduled,
    Twin,
    alphas,
    forced,
    practical_reference,
    rows_at,
    sample,
    sample_with,
    timed_dit,
    tiny_dit,
)

from adacorr import AdaCorrection, Algorithm1, CacheManager, Predictor, Unit, by_branch, make_policy, parse_correction
from adacorr.control import split_budget
from diffusion import make_sampler
from download import BUNDLED, build_model, load_checkpoint
from pipeline import gaussian

LABELS = (3, 0, 3)


@pytest.fixture(scope="module")
def model():
    return tiny_dit()


@pytest.fixture(scope="module")
def bundled():
    return build_model(load_checkpoint(BUNDLED, offline=True)).eval()


def computed(manager, half=0):
    return [manager.trace.computed_steps(i, half) for i in range(manager.trace.images)]


def near(out, expected, rel=1e-5):
    """Equal but for rounding, relative to the size of the whole."""
    assert out.shape == expected.shape
    assert float((out - expected).abs().max()) <= rel * float(expected.abs().max())


def apart(out, expected, rel=1e-3):
    """So different that `near` means something."""
    assert float((out - expected).abs().max()) > rel * float(expected.abs().max())


def branches(order=0, gate_error=0.0):
    return Predictor("branches", order, gate_error)


# ---------------------------------------------------------------------------------- equal to the plain model


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmsolver++"])
@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
def test_never_is_the_plain_model_bit_for_bit(model, sampler, cfg_scale):
    plain = sample(model, sampler=sampler, cfg_scale=cfg_scale)
    manager = CacheManager(make_policy("never"))
    assert torch.equal(sample(model, sampler=sampler, cfg_scale=cfg_scale, cache=manager), plain)
    assert (manager.trace.compute, manager.trace.hit_rate) == (1.0, 0.0)
    assert manager.bytes == 0


@pytest.mark.parametrize("options", ["", ",difference=false", ",rewind=false"])
def test_at_the_highest_gamma_every_step_is_computed_and_equals_the_plain_model(model, options):
    manager = CacheManager(correction=parse_correction("gamma=1e6" + options))
    out = sample(model, cache=manager)
    assert computed(manager) == [list(range(10))] * 3
    near(out, sample(model))


def test_steps_that_are_computed_equal_the_plain_model(model):
    """Whatever the clock leaves out at the end: states are exact as long as nothing was skipped."""
    correction = AdaCorrection(gamma=1e6, difference=False, gate_error=0)
    cached, plain = forced(model, CacheManager(correction=correction))
    near(cached[:9], plain[:9], rel=1e-6)


def test_rewinding_changes_nothing_where_no_step_was_skipped(model):
    both = []
    for rewind in (True, False):
        manager = CacheManager(make_policy("interval:every=1"), AdaCorrection(gamma=1e6, rewind=rewind))
        both.append(sample(model, cache=manager))
        assert manager.trace.rewound == 0
    assert torch.equal(*both)


# ----------------------------------------------------------------------------------------- the cached path


@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
@pytest.mark.parametrize("depth", [1, 3, 13])
def test_order_0_is_fora(depth, cfg_scale):
    """Pre-gate outputs of the last computed step under the gates of now."""
    model, steps = tiny_dit(depth), (0, 3, 5, 6)
    manager = CacheManager(Scheduled((steps,), branches()))
    out = sample(model, cfg_scale=cfg_scale, cache=manager)
    twin = Twin("branches", steps, make_sampler("ddim", 10).timesteps)
    near(out, sample_with(twin, model, cfg_scale=cfg_scale))
    stale = Scheduled((steps,), Predictor("residual", 0))  # a frozen residual is something else
    apart(out, sample(model, cfg_scale=cfg_scale, cache=CacheManager(stale)))
    apart(out, sample(model, cfg_scale=cfg_scale))
    assert computed(manager) == [list(steps)] * 3


def test_the_interval_policy_is_fora_up_to_its_gate_error(model):
    out = sample(model, cache=CacheManager(make_policy("interval:every=3")))
    twin = Twin("branches", (0, 3, 6, 9), make_sampler("ddim", 10).timesteps)
    exact = sample_with(twin, model)
    assert float((out - exact).norm() / (exact - sample(model)).norm()) < 0.2


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_forecasts_equal_those_of_every_branch_with_exact_gates(model, order):
    steps = (0, 1, 3, 4, 8, 13, 15)  # uneven
    manager = CacheManager(Scheduled((steps,), branches(order)))
    out = sample(model, steps=20, cache=manager)
    twin = Twin("branches", steps, make_sampler("ddim", 20).timesteps, order)
    near(out, sample_with(twin, model, steps=20), rel=1e-4)
    lower = Twin("branches", steps, make_sampler("ddim", 20).timesteps, order - 1)
    apart(out, sample_with(lower, model, steps=20))


@pytest.mark.parametrize("order", [1, 2])
def test_polynomial_branches_are_forecast_exactly(order):
    model = timed_dit(degree=order)
    cached, plain = forced(model, CacheManager(Scheduled(((0, 2, 3, 7),), branches(order))), steps=16)
    near(cached[3 + order - 1 :], plain[3 + order - 1 :], rel=1e-4)  # as soon as there are order + 1 nodes
    apart(cached[1], plain[1])
    cached, plain = forced(model, CacheManager(Scheduled(((0, 2, 3, 7),), branches(order - 1))), steps=16)
    apart(cached[-1], plain[-1])


@pytest.mark.parametrize("kind", ["residual"])
def test_stored_residuals_and_outputs_are_reused_as_they_were(model, kind):
    steps = (0, 2, 6)
    out = sample(model, cache=CacheManager(Scheduled((steps,), Predictor(kind, 0))))
    twin = Twin(kind, steps, make_sampler("ddim", 10).timesteps)
    near(out, sample_with(twin, model), rel=1e-6)
    apart(out, sample(model))


def test_first_block_keeps_one_residual_of_the_rest(model):
    out = sample(model, cache=CacheManager(make_policy("first_block:threshold=inf")))
    near(out, sample_with(Twin("tail", (0,), make_sampler("ddim", 10).timesteps), model), rel=1e-6)
    apart(out, sample(model))


def test_several_units_forecast_like_one(model):
    """The same steps in two ranges of blocks: every branch is its own forecast, so nothing may change."""
    steps = (0, 2, 5)
    parts = Scheduled((steps,), branches(2), spans=((0, 1), (1, 3)))
    near(
        sample(model, cache=CacheManager(parts)),
        sample(model, cache=CacheManager(Scheduled((steps,), branches(2)))),
    )


def test_images_with_steps_of_their_own_equal_images_alone(model):
    own = ((0, 2, 5), (0, 1, 6, 7), (0, 5))
    manager = CacheManager(Scheduled(own, branches(2)))
    out = sample(model, cache=manager)
    assert computed(manager) == [list(s) for s in own]
    for i, steps in enumerate(own):
        twin = Twin("branches", steps, make_sampler("ddim", 10).timesteps, 2)
        near(out[i : i + 1], sample_with(twin, model, labels=LABELS[i : i + 1], first=i), rel=1e-4)


# ------------------------------------------------------------------------------------ the practical method


@pytest.mark.parametrize("rewind", [True, False])
@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize(("cfg_scale", "difference"), [(1.0, True), (1.5, True), (4.0, True), (1.5, False)])
def test_the_practical_form_equals_its_reference(model, cfg_scale, difference, order, rewind):
    """Decisions are taken from the trace; everything else is done again branch by branch, image by image."""
    correction = AdaCorrection(gamma=0.3, difference=difference, order=order, rewind=rewind, gate_error=0)
    manager = CacheManager(correction=correction)
    out = sample(model, steps=24, cfg_scale=cfg_scale, cache=manager)
    sampler, plain = make_sampler("ddim", 24), sample(model, steps=24, cfg_scale=cfg_scale)
    for i, label in enumerate(LABELS):
        nodes = computed(manager)[i]
        both = [] if cfg_scale == 1.0 else computed(manager, 1)[i]
        assert 3 < len(nodes) < 20
        assert both == nodes if not difference else len(both) < len(nodes)
        noise = gaussian(0, [i], (3, 8, 8))
        expected = practical_reference(model, noise, label, cfg_scale, sampler, nodes, both, order, rewind)
        near(out[i : i + 1], expected, rel=1e-4)
        apart(out[i], plain[i])


def alike(model):
    """The same gates in both guidance halves, so that a constant difference of branches is one of what they add."""
    model.y_embedder.embedding_table.weight.zero_()
    for block in model.blocks:
        block.adaLN_modulation[1].weight[:, 1] = 0.0  # the channel that holds the label


def test_rewinding_makes_linear_branches_exact():
    """A held first node is wrong until the second one is known; taken again between the two, it is exact."""
    model = timed_dit(degree=1)
    alike(model)
    for sampler in ("ddim", "ddpm"):
        plain = sample(model, steps=20, sampler=sampler)
        for difference in (True, False):
            options = {"gate_error": 0, "order": 2, "difference": difference}
            manager = CacheManager(correction=AdaCorrection(**options))
            near(sample(model, steps=20, sampler=sampler, cache=manager), plain, rel=1e-4)
            assert manager.trace.rewound > 0
            assert manager.trace.compute < 0.7
            manager = CacheManager(correction=AdaCorrection(**options, rewind=False))
            apart(sample(model, steps=20, sampler=sampler, cache=manager), plain)
            assert manager.trace.rewound == 0


def test_rewound_steps_are_those_between_computed_ones(model):
    manager = CacheManager(correction=AdaCorrection(gamma=0.1))
    sample(model, steps=40, cache=manager)
    gaps = [b - a - 1 for nodes in computed(manager) for a, b in zip(nodes, nodes[1:], strict=False)]
    assert manager.trace.rewound == sum(gaps) > 0


def test_samplers_with_a_history_are_never_rewound(model):
    manager = CacheManager(correction=AdaCorrection())
    out = sample(model, steps=20, sampler="dpmsolver++", cache=manager)
    assert manager.trace.rewound == 0
    assert bool(torch.isfinite(out).all())
    assert manager.trace.hit_rate > 0.2


def test_a_constant_guidance_difference_is_inferred_exactly():
    """Branches that no polynomial fits, in both halves alike: the half not computed is exact."""
    model = timed_dit(degree=1, bend=1.0)
    alike(model)
    manager = CacheManager(correction=AdaCorrection(gate_error=0, difference_tolerance=1e6))
    cached, plain = forced(model, manager, steps=24)
    nodes, both = computed(manager)[0], computed(manager, 1)[0]
    assert computed(manager) == [nodes] * 3
    inferred = sorted(set(nodes) - set(both))
    assert len(inferred) >= 3
    near(cached[inferred], plain[inferred])
    skipped = sorted(set(range(24)) - set(nodes))
    apart(cached[skipped], plain[skipped])  # the conditional half is only a forecast there


def test_weights_say_what_was_computed(model):
    manager = CacheManager(correction=AdaCorrection(gamma=0.3))
    sample(model, steps=30, cache=manager)
    ran, weight = manager.trace.executed[:, :, 0, :, 0] == 1, manager.trace.weight
    assert (weight[ran] == 1.0).all()
    assert (weight[~ran] < 1.0).all()
    assert (weight >= 0.0).all()
    scored = ~np.isnan(manager.trace.score)
    assert (scored[1:] == ran[1:]).all()  # an offset wherever a forecast met the truth
    assert not scored[0].any()
    assert (manager.trace.score[scored] > 0).all()


def test_compute_counts_executed_blocks_and_the_gates(model):
    manager = CacheManager(correction=AdaCorrection(gamma=0.3))
    sample(model, steps=20, cache=manager)
    blocks = 3 * sum(len(s) for half in (0, 1) for s in computed(manager, half))
    total = 20 * 3 * 3 * 2
    executed = blocks * model.block_flops() + total * model.gate_flops()
    assert manager.trace.compute == pytest.approx(executed / (total * model.block_flops()))
    assert manager.trace.hit_rate == pytest.approx(1 - blocks / total)
    assert manager.bytes > 0


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_more_gamma_never_computes_less(model, bundled, sampler):
    for network, steps in ((model, 50), (bundled, 12)):
        share, error = [], []
        plain = sample(network, steps=steps, labels=(1,), sampler=sampler)
        for gamma in (0, 0.1, 0.3, 1, 10, 1000):
            manager = CacheManager(correction=AdaCorrection(gamma=gamma))
            out = sample(network, steps=steps, labels=(1,), sampler=sampler, cache=manager)
            share.append(manager.trace.compute)
            error.append(float((out - plain).square().mean()))
        assert share == sorted(share)
        assert share[0] < 0.3 * share[-1]
        assert error[-1] < 0.3 * error[2] < 0.3 * error[0]


@pytest.mark.parametrize(
    "policy", [None, "teacache:threshold=0.3,profile=none", "first_block:threshold=0.2", "interval:every=4"]
)
def test_an_image_does_not_depend_on_its_batch(bundled, policy):
    labels, steps = (1, 7, 7), 12
    spec = policy and make_policy(policy)

    def draw(labels, first=0):
        manager = CacheManager(spec, AdaCorrection(gamma=0.5))
        return sample(bundled, steps=steps, labels=labels, first=first, cache=manager), manager.trace

    together, trace = draw(labels)
    assert len(set(trace.score[~np.isnan(trace.score)].tolist())) > 3  # offsets differ, so a mean would show
    for i, label in enumerate(labels):
        alone, own = draw((label,), first=i)
        for half in (0, 1):
            assert own.computed_steps(0, half) == trace.computed_steps(i, half)
        np.testing.assert_allclose(own.score[..., 0], trace.score[..., i], rtol=0.01)
        near(alone, together[i : i + 1], rel=1e-4)


@pytest.mark.parametrize("spec", ["first_block:threshold=0.35", "teacache:threshold=0.15,profile=none"])
def test_policies_with_image_scope_decide_image_by_image(bundled, spec):
    labels = (1, 7, 4)
    manager = CacheManager(make_policy(spec))
    together = sample(bundled, steps=16, labels=labels, cache=manager)
    steps = computed(manager)
    for i, label in enumerate(labels):
        own = CacheManager(make_policy(spec))
        near(sample(bundled, steps=16, labels=(label,), first=i, cache=own), together[i : i + 1], rel=1e-4)
        assert computed(own) == [steps[i]]
    manager = CacheManager(make_policy(spec + ",scope=batch"))
    sample(bundled, steps=16, labels=labels, cache=manager)
    assert len({tuple(s) for s in computed(manager)}) == 1


@pytest.mark.parametrize("steps", [10, 20, 50])
@pytest.mark.parametrize("cfg_scale", [1.0, 1.5, 4.0])
def test_a_budget_is_used_up_and_never_exceeded(model, steps, cfg_scale):
    """In full evaluations, the gates included: every image gets as many nodes as fit, all of them alike."""
    for budget in (2.5, 3.5, 5, 8):
        for difference in (True, False):
            manager = CacheManager(correction=AdaCorrection(budget=budget, difference=difference))
            sample(model, steps=steps, cfg_scale=cfg_scale, cache=manager)
            gates = steps * model.gate_flops() / model.block_flops()
            halves = manager.trace.halves
            inferred = difference and halves == 2
            nodes, both = split_budget(budget - gates, steps, halves, cfg_scale - 1 if inferred else None)
            assert [len(s) for s in computed(manager)] == [nodes] * 3
            assert halves == 1 or [len(s) for s in computed(manager, 1)] == [both] * 3
            used = manager.trace.summary()["evaluations"]
            assert budget - (0.5 if inferred else 1.0) < used <= budget


def test_a_budget_that_is_too_small_raises_before_any_work(model):
    with pytest.raises(ValueError, match="leaves . computed step"):
        sample(model, cfg_scale=1.0, cache=CacheManager(correction=AdaCorrection(budget=1)))
    assert model.cache is None


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_very_few_steps(model, steps):
    corrections = [AdaCorrection(), AdaCorrection(gamma=1e6), Algorithm1()]
    for correction in corrections + [AdaCorrection(budget=8)] * (steps > 1):
        manager = CacheManager(correction=correction)
        out = sample(model, steps=steps, cache=manager)
        assert bool(torch.isfinite(out).all())
        assert manager.trace.done == steps


def test_a_budget_of_several_evaluations_is_no_error_for_a_single_step(model):
    manager = CacheManager(correction=AdaCorrection(budget=8))
    near(sample(model, steps=1, cache=manager), sample(model, steps=1))


@pytest.mark.parametrize(
    "correction", [None, AdaCorrection(), AdaCorrection(gamma=1e6), AdaCorrection(budget=80)], ids=str
)
def test_repeated_timesteps_do_no_harm(model, correction):
    """A log-SNR grid of many steps rounds several of them to one timestep."""
    sampler = "dpmsolver++:use_lu_lambdas=true"
    assert (make_sampler(sampler, 100).timesteps.diff() == 0).any()
    manager = CacheManager(None if correction else make_policy("interval:every=2,order=2"), correction)
    with np.errstate(divide="raise", invalid="raise"):
        out = sample(model, steps=100, sampler=sampler, cache=manager)
    assert bool(torch.isfinite(out).all())
    plain = sample(model, steps=100, sampler=sampler)
    assert float((out - plain).norm() / plain.norm()) < 1.0


# ------------------------------------------------------------------------------------- policy and correction


def test_the_policy_proposes_and_the_correction_may_veto(model):
    """Asked for in every step, a computation is taken once the weight has come far enough."""
    eager = CacheManager(make_policy("never"), AdaCorrection(gamma=0.3))
    sample(model, steps=20, cache=eager)
    alone = CacheManager(correction=AdaCorrection(gamma=0.3))
    sample(model, steps=20, cache=alone)
    assert len(computed(alone)[0]) <= len(computed(eager)[0]) < 20
    lazy = CacheManager(make_policy("teacache:threshold=inf,profile=none"), AdaCorrection(gamma=0.3))
    sample(model, steps=20, cache=lazy)
    assert computed(lazy)[0][0] == 0
    assert len(computed(lazy)[0]) >= len(computed(alone)[0])  # the correction still sees to it


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
    for image, nodes in enumerate(computed(manager)):
        assert nodes == [step for step, unit, ran in told if unit.start == 0 and image in ran.images]


@pytest.mark.parametrize(
    "spec", ["first_block:threshold=0.2", "interval:every=5", "teacache:threshold=0.2,profile=none", "never"]
)
def test_every_policy_composes_with_the_correction(model, spec):
    manager = CacheManager(make_policy(spec), AdaCorrection(gamma=0.3, gate_error=0))
    out = sample(model, steps=20, cache=manager)
    assert bool(torch.isfinite(out).all())
    plain = sample(model, steps=20)
    assert float((out - plain).norm() / plain.norm()) < 0.2
    if spec.startswith("first_block"):
        assert manager.trace.executed[:, 0, :, :, 0].all()  # its probe is fresh in every step, in the half it sees
    assert torch.equal(sample(model, steps=20, cache=manager), out)


# ------------------------------------------------------------------------------------------------- literal


def test_literal_with_saturated_weights_is_the_plain_model(model):
    for form in ("paper", "squared"):
        manager = CacheManager(correction=Algorithm1(gamma=1e6, form=form))
        near(sample(model, cache=manager), sample(model), rel=1e-6)
        assert (manager.trace.weight == 1.0).all()
        assert (manager.trace.compute, manager.trace.hit_rate) == (1.0, 0.0)
        assert (manager.trace.executed == 1).all()


def test_literal_at_weight_0_holds_the_first_step(model):
    cached, plain = forced(model, CacheManager(correction=Algorithm1(gamma=0)))
    assert torch.equal(cached[0], plain[0])
    held = Twin("output", (0,), make_sampler("ddim", 10).timesteps)
    out = sample(model, cache=CacheManager(correction=Algorithm1(gamma=0)))
    near(out, sample_with(held, model), rel=1e-6)


@pytest.mark.parametrize("form", ["paper", "squared"])
@torch.no_grad()
def test_literal_blends_with_what_it_stored_which_is_the_blend(form):
    """Algorithm 1 by hand: three steps of two blocks, two images, both halves."""
    model, sampler, labels = tiny_dit(depth=2), make_sampler("ddim", 10), torch.tensor([1, 4])
    gamma, spatial_weight = 0.15, 0.5
    correction = Algorithm1(gamma, spatial_weight, form)
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(2, 3, 8, 8, generator=generator)
    states = [base, base + 0.3 * torch.randn(2, 3, 8, 8, generator=generator), 1.1 * base]

    manager = CacheManager(correction=correction)
    outputs = []
    with manager.run(model, labels, sampler.timesteps, alphas(sampler), cfg_scale=1.5) as run:
        for step, x in enumerate(states):
            run.begin_step(step)
            outputs.append(model(*rows_at(model, sampler, step, x, labels, 2)))

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
                lam = (gamma * score).clamp(0, 1)
                assert bool(((lam > 0.05) & (lam < 1)).all())
                assert_close(torch.from_numpy(manager.trace.score[step, layer]), score, rtol=1e-4, atol=1e-5)
                assert_close(torch.from_numpy(manager.trace.weight[step, layer]), lam, rtol=1e-4, atol=1e-5)
                rows = lam.repeat(2).view(-1, 1, 1)
                out = (1 - rows) * stored + rows * out
            before[layer] = h, out
            h = out
        assert_close(outputs[step], model.decode(h, c), rtol=1e-4, atol=1e-4)


def test_literal_weights_of_an_image_do_not_depend_on_its_batch(model):
    manager = CacheManager(correction=Algorithm1(gamma=0.05))
    together = sample(model, cache=manager)
    weights = manager.trace.weight.copy()
    assert 0 < weights[1:].min() < 1
    for i, label in enumerate(LABELS):
        near(sample(model, labels=(label,), first=i, cache=manager), together[i : i + 1])
        np.testing.assert_allclose(manager.trace.weight[:, :, 0], weights[:, :, i], rtol=1e-4, atol=1e-6)


def test_literal_takes_no_policy():
    with pytest.raises(ValueError, match="policy 'never'"):
        CacheManager(make_policy("never"), Algorithm1())


# ---------------------------------------------------------------------------------------- birth and death

CORRECTIONS = [AdaCorrection(gamma=0.3), AdaCorrection(budget=4), Algorithm1(gamma=0.05)]


@pytest.mark.parametrize("correction", CORRECTIONS, ids=str)
def test_a_second_run_does_not_see_the_first(model, correction):
    manager = CacheManager(correction=correction)
    first = sample(model, cache=manager)
    weights = manager.trace.weight
    sample(model, labels=(2,), seed=5, steps=7, cfg_scale=1.0, cache=manager)  # of another shape, in between
    assert torch.equal(sample(model, cache=manager), first)
    assert np.array_equal(manager.trace.weight, weights)
    assert manager.trace.weight is not weights


def test_runs_on_two_models_do_not_mix(model):
    other, sampler = tiny_dit(seed=9), make_sampler("ddim", 6)
    labels = torch.tensor([1, 2])
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def outputs(models):
        """Every model's outputs, taking turns step by step."""
        made = [[] for _ in models]
        runs = [CacheManager(correction=AdaCorrection(gamma=0.3)) for _ in models]
        opened = [r.run(m, labels, sampler.timesteps, alphas(sampler)) for r, m in zip(runs, models, strict=True)]
        entered = [o.__enter__() for o in opened]
        for step in range(6):
            for run, m, out in zip(entered, models, made, strict=True):
                run.begin_step(step)
                out.append(m(*rows_at(m, sampler, step, x / (1 + step), labels, 1)))
        for o in opened:
            o.__exit__(None, None, None)
        return [torch.stack(out) for out in made]

    together = outputs([model, other])
    assert torch.equal(together[0], outputs([model])[0])
    assert torch.equal(together[1], outputs([other])[0])


def open_run(model, correction=None, labels=(1, 2), cfg_scale=1.5):
    sampler = make_sampler("ddim", 10)
    manager = CacheManager(None if correction else make_policy("interval"), correction)
    return manager.run(model, torch.tensor(labels), sampler.timesteps, alphas(sampler), cfg_scale=cfg_scale)


def call(model, labels=(1, 2), halves=2):
    sampler, labels = make_sampler("ddim", 10), torch.tensor(labels)
    return model(*rows_at(model, sampler, 0, torch.zeros(len(labels), 3, 8, 8), labels, halves))


ANY = [None, AdaCorrection(), Algorithm1()]


@pytest.mark.parametrize("correction", ANY, ids=str)
def test_the_model_is_free_again_after_an_exception(model, correction):
    def fail(*_):
        raise KeyError

    def one_step_and_fail():
        with open_run(model, correction) as run:
            run.begin_step(0)
            call(model)
            fail()

    with pytest.raises(KeyError):
        one_step_and_fail()
    assert model.cache is None
    call(model)
    with pytest.raises(KeyError):
        sample_failing(model, CacheManager(correction=correction or AdaCorrection()), fail)
    assert model.cache is None


def sample_failing(model, manager, observe):
    from pipeline import sample_latents

    labels = torch.tensor([1, 2])
    sample_latents(model, make_sampler("ddim", 5), gaussian(0, [0, 1], (3, 8, 8)), labels, cfg_scale=1.5,
                   cache=manager, observe=observe)  # fmt: skip


@pytest.mark.parametrize("correction", ANY, ids=str)
def test_a_run_within_a_run_raises(model, correction):
    with open_run(model, correction) as run:
        run.begin_step(0)
        with pytest.raises(RuntimeError, match="a cache run is open"), open_run(model, correction):
            pass
        assert model.cache is run
        call(model)
    assert model.cache is None


@pytest.mark.parametrize("correction", ANY, ids=str)
def test_a_call_without_an_open_step_raises(model, correction):
    with open_run(model, correction), pytest.raises(RuntimeError, match="no step is open"):
        call(model)


@pytest.mark.parametrize("correction", ANY, ids=str)
@pytest.mark.parametrize(("labels", "halves"), [((1, 2), 1), ((1, 2, 3), 2), ((1,), 2)])
def test_another_number_of_rows_raises(model, correction, labels, halves):
    with open_run(model, correction) as run:
        run.begin_step(0)
        with pytest.raises(ValueError, match="2 x 2 rows"):
            call(model, labels, halves)


def test_a_cache_needs_something_to_do():
    with pytest.raises(ValueError, match="a policy, a correction or both"):
        CacheManager()


@pytest.mark.parametrize(
    ("policy", "correction", "spec"),
    [
        ("interval", None, "interval"),
        ("teacache:threshold=0.25,profile=none", None, "teacache:threshold=0.25,profile=none"),
        (None, AdaCorrection(), "adacorr"),
        (None, AdaCorrection(spatial_weight=0.5, rewind=False), "adacorr:lambda=0.5,rewind=false"),
        (None, Algorithm1(), "literal"),
        (None, Algorithm1(gamma=2.0, form="squared"), "literal:gamma=2,form=squared"),
        ("interval:every=5", AdaCorrection(gamma=2.0), "interval:every=5+adacorr:gamma=2"),
    ],
)
def test_spec_is_what_the_cache_was_made_of(model, policy, correction, spec):
    manager = CacheManager(None if policy is None else make_policy(policy), correction)
    assert manager.spec == spec
    if policy in (None, "interval"):
        sample(model, cache=manager)
        assert manager.spec == spec


@pytest.mark.parametrize("correction", [None, *CORRECTIONS], ids=str)
def test_an_unconditional_model(correction):
    model = tiny_dit(num_classes=0)
    manager = CacheManager(None if correction else make_policy("interval:every=3,order=1"), correction)
    out = sample(model, cfg_scale=1.0, cache=manager)
    plain = sample(model, cfg_scale=1.0)
    assert manager.trace.halves == 1
    assert float((out - plain).norm() / plain.norm()) < 0.5
    near(sample(model, cfg_scale=1.0, cache=CacheManager(make_policy("never"))), plain, rel=0)


def test_a_model_without_a_null_label(model):
    plain = tiny_dit(class_dropout_prob=0.0)
    out = sample(plain, cfg_scale=1.0, cache=CacheManager(correction=AdaCorrection(gamma=0.3)))
    assert bool(torch.isfinite(out).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_and_stays_finite(dtype):
    exact = sample(tiny_dit(), steps=20)
    for model_dtype, cache_dtype in ((dtype, torch.float32), (torch.float32, dtype), (dtype, dtype)):
        model = tiny_dit().to(model_dtype)
        for correction in (AdaCorrection(), Algorithm1()):
            out = sample(model, steps=20, cache=CacheManager(correction=correction, dtype=cache_dtype))
            assert out.dtype == torch.float32
            assert float((out - exact).norm() / exact.norm()) < 0.3


def test_cache_dtype_halves_the_memory(model):
    sizes = []
    for dtype in (torch.float32, torch.bfloat16):
        manager = CacheManager(correction=AdaCorrection(), dtype=dtype)
        sample(model, cache=manager)
        sizes.append(manager.bytes)
    assert sizes[0] == 2 * sizes[1]
