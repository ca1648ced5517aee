"""FastCache: tokens and blocks by hand, the maps and their fit, what partial steps cost, and whole runs."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from toy import make_run, make_view, sample, through, tiny_dit

from adacorr import CacheManager, make_policy
from adacorr.calibration.fastcache import FastCacheCalibration
from adacorr.policy import Cached, Ran, Unit
from adacorr.tokens import moved, relative_norms, spend_tokens, split_tokens


@pytest.fixture
def maps(measured):
    def use(form, weight, bias):
        """Maps that do nothing but for some weights, map -> factor of the identity, and biases (10 steps, 4 maps)."""
        weights = np.zeros((4, 32, 32))
        for index, factor in weight.items():
            weights[index] = np.eye(32) * factor
        measured("fastcache", **{f"{form}_weight": weights, f"{form}_bias": np.repeat(bias[..., None], 32, axis=2)})

    return use


class Walk:
    """Drives a policy over steps of given stack inputs, as the cache does without AdaCorrection."""

    def __init__(self, model, spec, images=1, halves=1):
        self.policy, self.run = make_policy(spec), make_run(model, images, halves)
        self.policy.begin(self.run)
        self.everyone, self.step = np.arange(images), 0

    def __call__(self, x):
        """The stack's output, and the executed shares (layers, 2, images)."""
        x_in, executed = x, []
        for layer in range(self.run.depth):
            view = make_view(self.run, self.step, x, Unit(layer, layer + 1), x_in)
            if self.policy.decide(view).any():
                out = view.block(x.flatten(0, 1), view.conditioning.c).view_as(x)
                self.policy.computed(view, Ran(self.everyone, x, out))
                view.account.executed[self.step, layer] = 1
            else:
                out = x + self.policy.reuse(view, Cached(self.everyone, x, self.step, None))
            executed.append(view.account.executed[self.step, layer, :, :, 0])
            x, self.flops = out, view.account.extra_flops
        self.step += 1
        return x, np.stack(executed)


def stream(images=1, halves=1, seed=0):
    return torch.randn(halves, images, 16, 32, generator=torch.Generator().manual_seed(seed))


def nudged(x, tokens, by=0.3):
    x = x.clone()
    x[:, :, tokens] += by
    return x


def test_saliency_is_the_larger_of_both_halves_over_the_largest_of_the_image():
    before = torch.zeros(2, 2, 3, 1)
    now = torch.tensor([[[1.0, 2, 0], [0, 0, 0]], [[3.0, 1, 0], [0, 10, 5]]]).unsqueeze(-1)
    assert_close(moved(now, before), torch.tensor([[1.0, 4 / 9, 0], [0, 1, 0.25]]))
    assert moved(before, before).tolist() == [[0, 0, 0]] * 2


def test_groups_take_the_next_most_salient_up_to_a_multiple_of_8():
    saliency = torch.zeros(3, 20)
    saliency[0, [3, 5]], saliency[0, [0, 1, 2, 7, 9, 11]] = 1.0, 0.05  # 2 move, 8 are taken
    saliency[1] = 1.0  # 20 of 20, not 24
    images = torch.tensor([1, 0, 2])
    none, eight, all_of_them = split_tokens(saliency, images, 0.1)
    (_, image, moving), (_, _, still) = none
    assert (image.tolist(), moving.shape, sorted(still[0].tolist())) == ([[2]], (1, 0), list(range(20)))
    (_, image, moving), (_, same, still) = eight
    assert (image.tolist(), same.tolist(), moving.tolist()) == ([[0]], [[0]], [[0, 1, 2, 3, 5, 7, 9, 11]])
    assert sorted(still[0].tolist()) == [4, 6, 8, 10, *range(12, 20)]
    assert (all_of_them[0][1].tolist(), all_of_them[0][2].tolist()) == ([[1]], [list(range(20))])
    assert len(split_tokens(saliency, images, 0.0)) == 1  # tau 0: tokens that did not change move, too


def test_moving_tokens_attend_to_each_other_and_still_ones_pass_by(model):
    walk = Walk(model, "fastcache:threshold=0,profile=none")
    x = stream()
    first, _ = walk(x)
    moving = [0, 1, 2, 3, 8, 9, 10, 11]
    y = nudged(x, moving)
    out, _ = walk(y)
    assert_close(out[0][:, moving], through(model.blocks, y[0][:, moving], torch.zeros(1, 32)))
    still = [i for i in range(16) if i not in moving]
    assert_close(out[:, :, still], first[:, :, still])  # what the stack added last


def test_shares_are_those_of_the_models_own_flops():
    model = tiny_dit()
    half = tiny_dit(input_size=4)  # 4 of 16 tokens
    view = make_view(make_run(model, 2), 0, stream(2), Unit(1, 2))
    spend_tokens(view, (slice(None), torch.tensor([[1]]), torch.zeros(1, 4)))
    executed = view.account.executed[0, :, :, :, 0]
    assert_close(executed[1, :, 1] * model.branch_flops(), np.array(half.branch_flops(), dtype=float))
    executed[1, :, 1] = 0
    assert not executed.any()


def test_a_block_is_skipped_below_the_threshold_only(model):
    x = stream()
    change = float(0.1 * x.norm() / x.norm())
    for threshold, runs in ((0.0999, True), (0.1001, False)):
        walk = Walk(model, f"fastcache:tau=0,threshold={threshold},profile=none")
        walk(x)
        _, executed = walk(x * (1 + change))
        assert bool(executed[0].any()) is runs


def test_the_reference_is_the_last_computed_input(model):
    x, walk = stream(), Walk(model, "fastcache:tau=0,threshold=0.1,profile=none")
    # 0.06, then 0.057 more: 0.12 since the computed one.
    assert [bool(walk(x * scale)[1][0].any()) for scale in (1.0, 1.06, 1.12, 1.18)] == [True, False, True, False]


@pytest.mark.parametrize("scope", ["image", "batch"])
def test_images_are_tested_alone_or_together(model, scope):
    walk = Walk(model, f"fastcache:tau=0,threshold=0.1,scope={scope},profile=none", images=2)
    x = stream(images=2)
    walk(x)
    _, executed = walk(x * torch.tensor([1.01, 1.5]).view(1, 2, 1, 1))
    assert executed[0, 0].tolist() == ([0, 1] if scope == "image" else [1, 1])


def test_norms_that_are_not_finite_are_no_small_change():
    change = relative_norms(np.array([1.0, 1.0, np.nan, np.inf]), np.array([4.0, np.inf, 1.0, 1.0]), "image")
    np.testing.assert_array_equal(change[:2], [0.5, np.nan])
    assert not (change[1:] < np.inf).any()


def test_both_halves_share_tokens_and_tests(model):
    walk = Walk(model, "fastcache:threshold=0,profile=none", halves=2)
    x = stream(halves=2)
    walk(x)
    y = x.clone()
    y[1, 0, :8] += 1.0  # only the second half moves
    out, executed = walk(y)
    assert 0 < executed[0, 1, 0] < 1
    for half in (0, 1):
        assert_close(out[half][:, :8], through(model.blocks, y[half][:, :8], torch.zeros(1, 32)))


def test_increments_correct_the_last_computed_pair(model, maps):
    bias = np.zeros((10, 4))
    bias[:, 0] = np.arange(10)
    maps("increment", {0: 0.5, 3: 2}, bias)
    x, walk = stream(), Walk(model, "fastcache:threshold=inf,tau=0")
    first, _ = walk(x)
    y = x + 0.1
    out, executed = walk(y)
    assert_close(out - y, (first - x) + 0.05 + 1)  # all from the map of block 0: the others' add nothing
    assert not executed.any()
    assert walk.flops == 2 * 16 * 32 * 32  # of the last block's map
    walk = Walk(model, "fastcache:threshold=inf,tau=inf")
    walk(x)
    assert_close(walk(y)[0] - y, (first - x) + 0.2)


def test_residual_maps_stand_alone(model, maps):
    bias = np.zeros((10, 4))
    bias[1, 3] = 0.25
    maps("residual", {3: 0.5}, bias)
    x, walk = stream(), Walk(model, "fastcache:form=residual,tau=inf")
    walk(x)
    assert_close(walk(x)[0], 1.5 * x + 0.25)


def test_calibration_finds_the_maps_that_were_put_in(model):
    calibration, generator = FastCacheCalibration(), torch.Generator().manual_seed(0)
    run = make_run(model, 8, 2)
    weight = torch.randn(3, 32, 32, generator=generator) * 0.2
    bias = torch.randn(10, 3, 32, generator=generator)
    for _ in range(2):
        calibration.begin(run)
        drift = torch.randn(2, 8, 16, 32, generator=generator)
        for step in range(10):
            x = x_in = drift * (1 + step / 3) + torch.randn(2, 8, 16, 32, generator=generator)
            for unit in calibration.units(3):
                view = make_view(run, step, x, unit, x_in)
                out = x + x @ weight[unit.start] + bias[step, unit.start]
                calibration.computed(view, Ran(np.arange(8), x, out))
                x = out
    arrays, notes = calibration.fit()
    assert {name: (a.shape, a.dtype) for name, a in arrays.items()} == {
        f"{form}_{name}": (shape, np.float16)
        for form in ("increment", "residual")
        for name, shape in (("weight", (4, 32, 32)), ("bias", (10, 4, 32)))
    }
    assert notes["held_out"] == 4
    for form in ("increment", "residual"):
        assert min(notes[f"{form}_r2_blocks"]) > 0.97  # less than 1 by the ridge
        relative = np.linalg.norm(arrays[f"{form}_weight"][0] - weight[0].numpy()) / np.linalg.norm(weight[0])
        assert relative < 0.15
    steps = bias[:, 0] - bias[:, 0].mean(0)
    assert np.abs(arrays["increment_bias"][:, 0] - steps.numpy()).max() < 0.2
    assert np.abs(arrays["increment_bias"].astype(float).mean(0)).max() < 1e-2
    assert np.abs(arrays["residual_bias"][:, 0] - bias[:, 0].numpy()).max() < 0.2


def test_proposals(model):
    policy, run = make_policy("fastcache:threshold=0.1,profile=none"), make_run(model, corrected=True)
    policy.begin(run)
    x, unit = stream(), Unit(0, 1)

    def proposed(step, now):
        return bool(policy.propose(make_view(run, step, now, unit))[0])

    assert proposed(0, x)
    policy.computed(make_view(run, 0, x, unit), Ran(np.array([0]), x, x))
    policy.computed(make_view(run, 0, x, Unit(1, 2)), Ran(np.array([0]), x, x))
    assert policy.bytes == 2 * 16 * 32 * 4  # block 0's input and the stack's
    assert not proposed(1, nudged(x, slice(0, 8), 0.01))  # 8 of 16 are not more than half
    assert proposed(2, nudged(x, slice(0, 9), 0.02))  # against step 1, where 9 tokens differ now
    assert not proposed(3, nudged(x, slice(0, 9), 0.02))  # nothing moved
    assert proposed(4, nudged(x, slice(0, 2), 3.0))  # two tokens, far away
    policy.computed(make_view(run, 5, x, unit), Ran(np.array([0]), x, x))
    # Four tokens drift by 0.06 a step: 0.12 since the computed one.
    assert [proposed(5 + i, nudged(x, slice(0, 4), 0.06 * i)) for i in (1, 2)] == [False, True]


def run(model, options, **arguments):
    manager = CacheManager(make_policy(f"fastcache:{options}"))
    return sample(model, cache=manager, **arguments), manager.trace


def test_whole_runs(model):
    plain = sample(model)
    everything, trace = run(model, "threshold=0,tau=0,profile=none")
    assert_close(everything, plain, rtol=1e-5, atol=1e-4)
    assert (trace.compute, trace.hit_rate) == (1.0, 0.0)
    for tau in ("0", "inf"):
        least, trace = run(model, f"threshold=inf,tau={tau},profile=none")
        assert bool(torch.isfinite(least).all())
        assert trace.compute == pytest.approx(0.1)
        assert [trace.computed_steps(i) for i in range(3)] == [[0]] * 3
    costs = [run(model, f"threshold={t},profile=none")[1].compute for t in (0, 0.02, 0.1, 0.3, "inf")]
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) > 2
