"""LazyDiT: trained gates and the stand-in's by hand, loading and fitting them, and whole runs."""

import argparse
import math
import os

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from toy import make_run, make_view, tiny_dit

from adacorr import make_policy
from adacorr.calibration.lazydit import LazyDiTCalibration
from adacorr.policy import Ran
from adacorr.unit import by_branch
from evaluate.bench import Setting

TOKENS, WIDTH = 16, 32
PATTERN = torch.tensor([1.0, -1.0]).repeat(WIDTH // 2)  # equal to its own layer norm


@pytest.fixture
def plain():
    """Two blocks whose adaLN gives zero for everything, so that Z is the normalised input."""
    made = tiny_dit(depth=2)
    for block in made.blocks:
        for parameter in block.adaLN_modulation.parameters():
            parameter.zero_()
    return made


def stream(means):
    """(halves, n, 16, 32) whose normalised tokens have the mean m * PATTERN: means (halves, n) in eighths."""
    up = (torch.tensor(means) * 8 + 8).long()[..., None]  # tokens that are +PATTERN; the others are -PATTERN
    return torch.where(torch.arange(TOKENS) < up, 1.0, -1.0)[..., None] * PATTERN


@pytest.fixture
def fitted(measured):
    def use(weight, change):
        """The stand-in's profile: an input m * PATTERN multiplies the change (4 units, 10 steps) by e^(weight m)."""
        offset = np.log(np.broadcast_to(change, (4, 10)))
        measured("lazydit", weight=np.outer(np.full(4, weight), PATTERN / WIDTH), offset=offset)

    return use


def trained(path, logits=lambda *_: -2.0, depth=2, steps=4, width=WIDTH, edit=None):
    """A file as the authors' trainer writes it: logits(layer, branch, i) for the input 1 * PATTERN."""
    gates = {
        f"block_{layer}_{branch}_lazy_learning_weight_{i}": logits(layer, branch, i)
        * torch.tensor([1.0, -1.0]).repeat(width // 2)[None]
        / (width * TOKENS)
        for layer in range(depth)
        for branch in ("attn", "mlp")
        for i in range(steps)
    }
    if edit:
        edit(gates)
    args = argparse.Namespace(model="DiT-XL/2", rho=1e-7)
    torch.save({"model": gates, "opt": {"state": {}}, "args": args, "epoch": 0, "step": 500}, path)
    return str(path)


def begun(plain, spec, images=1, halves=1, steps=10):
    run, policy = make_run(plain, images, halves, steps, corrected=True), make_policy(spec)
    policy.begin(run)
    return policy, run


def ask(policy, run, step, x, unit=None, age=1, question="decide"):
    return getattr(policy, question)(make_view(run, step, x, unit, age=[age] * run.images)).tolist()


def tell(policy, run, step, x, images=None, units=None):
    """Units ran on x for some images."""
    images = np.arange(run.images) if images is None else np.array(images)
    for unit in by_branch(run.depth) if units is None else units:
        own = x[:, images]
        policy.computed(make_view(run, step, x, unit), Ran(images, own, own, own))


ATTN, MLP = by_branch(1)


def test_predicted_errors_add_up_until_the_threshold(plain, fitted):
    # Image 0 changes by 0.1 a step, image 1 by 0.1 e^(ln 4 * 0.5) = 0.2, image 2 by 0.1 e^(ln 4) = 0.4.
    fitted(math.log(4), 0.1)
    policy, run = begun(plain, "lazydit:threshold=0.35", images=3)
    x = stream([[0.0, 0.5, 1.0]])
    found = []
    for step in range(1, 9):
        want = ask(policy, run, step, x, ATTN)
        found.append(want)
        if any(want):
            tell(policy, run, step, x, np.flatnonzero(want), [ATTN])
    # Errors 0.1, 0.2, 0.3 sum up to 0.1, 0.3, 0.6; 0.2 and 0.4 to 0.2, 0.6; 0.4 is too much at once.
    assert [[s for s, w in enumerate(found, 1) if w[i]] for i in range(3)] == [[3, 6], [2, 4, 6, 8], list(range(1, 9))]


def test_each_branch_and_step_has_its_own_change(plain, fitted):
    change = np.full((4, 10), 0.1)
    change[1, 3] = 0.9  # MLP of block 0 at step 3
    fitted(0.0, change)
    policy, run = begun(plain, "lazydit:threshold=0.8")
    for step in (2, 3):
        found = [ask(policy, run, step, stream([[0.0]]), unit)[0] for unit in by_branch(2)]
        assert found == [False, step == 3, False, False]


def test_the_half_that_changes_more_decides(plain, fitted):
    fitted(math.log(4), 0.1)
    policy, run = begun(plain, "lazydit:threshold=0.35", images=3, halves=2)
    assert ask(policy, run, 1, stream([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), ATTN) == [False, True, True]


def test_scope_batch_is_one_decision(plain, fitted):
    fitted(math.log(4), 0.1)
    policy, run = begun(plain, "lazydit:threshold=0.35,scope=batch", images=2, halves=2)
    tell(policy, run, 0, x := stream([[0.0, 0.0], [0.0, 1.0]]))
    assert ask(policy, run, 1, x, ATTN) == [True, True]
    assert ask(policy, run, 1, x, question="propose") == [True, True]


@pytest.mark.parametrize("question", ["decide", "propose"])
def test_extremes_of_the_threshold(plain, fitted, question):
    fitted(0.0, [[0.0001]])
    for threshold, expected in (("0", [True, True]), ("inf", [False, False])):
        policy, run = begun(plain, f"lazydit:threshold={threshold}", images=2)
        x = stream([[0.0, 1.0]])
        assert ask(policy, run, 0, x, ATTN, age=0, question=question) == [True, True]
        tell(policy, run, 0, x)
        for step in range(1, 10):
            assert ask(policy, run, step, x, ATTN, age=step, question=question) == expected


def test_a_wild_prediction_counts_as_a_change_of_one(plain, fitted):
    fitted(5000.0, 0.1)
    policy, run = begun(plain, "lazydit:threshold=1.5", images=2)
    x = stream([[1.0, 0.0]])
    assert [ask(policy, run, step, x, ATTN) for step in (1, 2)] == [[False, False], [True, False]]


def test_max_lag_limits_reuse_in_a_row(plain, fitted):
    fitted(0.0, 0.1)
    policy, run = begun(plain, "lazydit:threshold=inf,max_lag=2")
    assert [ask(policy, run, age, stream([[0.0]]), ATTN, age=age)[0] for age in (1, 2, 3)] == [False, False, True]


def test_types_may_have_thresholds_of_their_own(plain, fitted):
    fitted(0.0, 0.1)
    policy, run = begun(plain, "lazydit:threshold=inf,attn_threshold=0")
    assert [ask(policy, run, 1, stream([[0.0]]), unit)[0] for unit in (ATTN, MLP)] == [True, False]
    policy, run = begun(plain, "lazydit:threshold=inf,mlp_threshold=0")
    assert [ask(policy, run, 1, stream([[0.0]]), unit)[0] for unit in (ATTN, MLP)] == [False, True]


def test_trained_gates_sum_over_tokens_and_skip_below_the_threshold(plain, tmp_path):
    # Logits -2 m: sigmoid 0.119 for m = 1, 0.269 for 0.5, 0.5 for 0, 0.881 for -1. Means would all be near 0.5.
    path = trained(tmp_path / "gates.pt")
    x = stream([[1.0, 0.5, 0.0, -1.0]])
    for threshold, expected in (
        (0.0, [True, True, True, True]),
        (0.2, [False, True, True, True]),
        (0.5, [False, False, True, True]),  # weights of zero compute, as they start
        (0.6, [False, False, False, True]),
        (math.inf, [False] * 4),
    ):
        policy, run = begun(plain, f"lazydit:threshold={threshold},gates={path}", images=4, steps=4)
        assert ask(policy, run, 1, x, ATTN) == expected
        assert ask(policy, run, 2, x, ATTN) == expected  # nothing adds up


def test_entry_zero_is_the_last_step(plain, tmp_path):
    path = trained(tmp_path / "gates.pt", lambda layer, branch, i: -9.0 if (layer, branch, i) == (1, "mlp", 0) else 0.0)
    policy, run = begun(plain, f"lazydit:gates={path}", steps=4)
    found = [[ask(policy, run, step, stream([[1.0]]), unit)[0] for unit in by_branch(2)] for step in range(4)]
    assert found == [[True] * 4, [True] * 4, [True] * 4, [True, True, True, False]]


def test_trained_gates_see_the_modulated_input(plain, tmp_path):
    path = trained(tmp_path / "gates.pt")
    policy, run = begun(plain, f"lazydit:gates={path}", steps=4)
    bias = plain.blocks[0].adaLN_modulation[1].bias.view(6, WIDTH)  # shift, scale, gate of attention, then of the MLP
    for row, value, expected in ((0, -2 * PATTERN, True), (1, -3.0, True), (2, 9.0, False), (3, -2 * PATTERN, False)):
        bias.zero_()
        bias[row] = value
        assert ask(policy, run, 1, stream([[1.0]]), ATTN) == [expected]
    assert ask(policy, run, 1, stream([[1.0]]), MLP) == [True]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"depth": 3}, "for 2 blocks and 4 steps, as this run; it has them for 3 blocks and 4 steps"),
        ({"steps": 5}, "for 2 blocks and 4 steps, as this run; it has them for 2 blocks and 5 steps"),
        ({"width": 64}, r"must have the entry .* of shape \(1, 32\); its shape is \(1, 64\)"),
        ({"edit": lambda g: g.pop("block_1_mlp_lazy_learning_weight_2")}, "block_1_mlp_.*_2 .* its shape is none"),
        ({"edit": dict.clear}, "must have entries block_0_attn"),
    ],
)
def test_gates_of_another_model_are_refused(plain, tmp_path, change, words):
    path = trained(tmp_path / "gates.pt", **change)
    with pytest.raises(ValueError, match=f"lazydit: gates=.*{words}") as caught:
        begun(plain, f"lazydit:gates={path}", steps=4)
    assert "\n" not in str(caught.value)


class Trap:
    def __reduce__(self):
        return os.mkdir, (os.environ["TRAP"],)


def test_files_that_are_no_gates_are_refused_unexecuted(plain, tmp_path, monkeypatch):
    monkeypatch.setenv("TRAP", str(tmp_path / "sprung"))
    torch.save({"model": {}, "args": Trap()}, tmp_path / "trap.pt")
    torch.save({"weights": {}}, tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("no gates")
    for name in ("trap.pt", "other.pt", "text.pt", "none.pt"):
        with pytest.raises(
            ValueError, match="gates=.* must be stand-in, or a torch file with the key 'model'"
        ) as caught:
            begun(plain, f"lazydit:gates={tmp_path / name}", steps=4)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "sprung").exists()


def test_a_step_is_proposed_for_half_of_the_flops(plain, fitted):
    # Attention has 0.4 of the FLOPs: 0.2 in each of two blocks, the MLPs 0.3 each.
    for wanting, expected in (([0], False), ([0, 2], False), ([0, 1], True), ([1, 3], True), ([2, 1], True)):
        change = np.full((4, 10), 0.1)
        change[wanting] = 0.9
        fitted(0.0, change)
        policy, run = begun(plain, "lazydit:threshold=0.5")
        x = stream([[0.0]])
        assert ask(policy, run, 0, x, age=0, question="propose") == [True]
        tell(policy, run, 0, x)
        assert ask(policy, run, 1, x, question="propose") == [expected]


def test_proposals_add_up_and_start_anew_where_a_step_was_computed(plain, fitted):
    fitted(0.0, 0.3)
    policy, run = begun(plain, "lazydit:threshold=0.5", images=2)
    x = stream([[0.0, 0.0]])
    tell(policy, run, 0, x)
    assert ask(policy, run, 1, x, question="propose") == [False, False]
    tell(policy, run, 1, x, [1])  # image 1 was computed though nobody asked
    assert ask(policy, run, 2, x, question="propose") == [True, False]


@pytest.mark.parametrize("halves", [1, 2])
def test_proposals_see_the_newest_computed_input_under_the_modulation_of_now(plain, tmp_path, halves):
    path = trained(tmp_path / "gates.pt")
    policy, run = begun(plain, f"lazydit:gates={path}", images=2, halves=halves, steps=4)
    seen, other = (stream([[m, m]] * halves) for m in (1.0, -1.0))
    tell(policy, run, 0, other)
    tell(policy, run, 1, seen, [0])
    assert ask(policy, run, 2, other, question="propose") == [False, True]  # what the view shows does not matter
    for block in plain.blocks:
        block.adaLN_modulation[1].bias.view(6, WIDTH)[[0, 3]] = -2 * PATTERN
    assert ask(policy, run, 2, other, question="propose") == [True, True]


def observe(model, images, steps, log_change, batches=1):
    """A calibration that saw runs in which each branch's log change is log_change(unit, step, z (halves, n, D))."""
    calibration, generator = LazyDiTCalibration(), torch.Generator().manual_seed(0)
    for _ in range(batches):
        run = make_run(model, images, 2, steps, cfg_scale=1.5)
        calibration.begin(run)
        sizes = {}
        for step in range(steps):
            c = torch.randn(2 * images, WIDTH, generator=generator)
            for i, unit in enumerate(by_branch(run.depth)):
                x = torch.randn(2, images, TOKENS, WIDTH, generator=generator)
                view = make_view(run, step, x, unit, c=c)
                z = view.modulated().mean(dim=2)
                # |F - F_before| / |F| for a constant tensor that grows: 1 - before / now.
                change = log_change(i, step, z).exp().clamp_max(0.9)
                sizes[i] = sizes[i] / (1 - change) if step else torch.ones(2, images)
                value = sizes[i].double()[..., None, None].expand(2, images, 2, 2)
                calibration.computed(view, Ran(np.arange(images), x, x, value))
    return calibration


@pytest.mark.parametrize("batches", [1, 2])
def test_calibration_finds_the_gates_that_were_put_in(batches):
    model = tiny_dit(depth=1)
    weights = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(3)) * 0.3
    offsets = -3 + 0.2 * torch.arange(6.0)
    calibration = observe(model, 24 // batches, 6, lambda i, s, z: z @ weights[i] + offsets[s] - i, batches)
    arrays, notes = calibration.fit()
    assert arrays["weight"].shape == (2, WIDTH)
    assert arrays["offset"].shape == (2, 6)
    assert {a.dtype for a in arrays.values()} == {np.dtype(np.float32)}
    for i in range(2):
        assert_close(arrays["weight"][i], weights[i].numpy(), atol=0.06, rtol=0)
        assert_close(arrays["offset"][i, 1:], offsets[1:].numpy() - i, atol=0.06, rtol=0)
    assert notes["held_out_share_explained_within_steps"] > 0.97
    assert notes["held_out_rms_log_error"] < 0.1


def test_calibration_does_not_take_chance_for_a_gate():
    generator = torch.Generator().manual_seed(5)
    noise = lambda i, s, z: -2 - 0.1 * s + 0.3 * torch.randn(z.shape[:2], generator=generator)  # noqa: E731
    arrays, notes = observe(tiny_dit(depth=1), 8, 6, noise).fit()
    assert notes["held_out_share_explained_within_steps"] < 0.1  # the trend over the steps is the offsets'
    assert notes["held_out_rms_log_error"] == pytest.approx(0.3, abs=0.05)
    assert np.abs(arrays["weight"]).max() < 0.05
    assert_close(arrays["offset"][0, 1:], np.float32(-2 - 0.1 * np.arange(1, 6)), atol=0.3, rtol=0)


def test_tables_name_the_stand_in(tmp_path):
    assert Setting("lazydit:threshold=2").named == "`--cache lazydit:threshold=2` (untrained stand-in)"
    assert Setting(f"lazydit:gates={tmp_path}/gates.pth").named == f"`--cache lazydit:gates={tmp_path}/gates.pth`"
    assert Setting("never", "gamma=2").named == "`--cache never --adacorr gamma=2`"
