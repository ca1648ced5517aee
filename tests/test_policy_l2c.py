"""L2C: the authors' files, and the stand-in's fit and calibration by hand."""

import argparse

import numpy as np
import pytest
import torch
from by_hand import schedule, walk_units
from torch.testing import assert_close
from toy import TINY, make_run, make_view

from adacorr import make_policy
from adacorr.calibration.l2c import L2CCalibration, fit_routers, load_routers
from adacorr.policy import Ran
from adacorr.unit import by_branch

WIDTH = TINY["hidden_size"]


def trained(path, logits):
    """A file as the authors' trainer writes it, from logits (S, 2L) of the kept timesteps upwards."""
    routers = {f"{i}.prob": torch.tensor(row, dtype=torch.float32) for i, row in enumerate(logits)}
    args = argparse.Namespace(model="DiT-XL/2", l1=1e-6)
    torch.save({"routers": routers, "opt": {"state": {}}, "args": args}, path)
    return str(path)


def routed(steps, branches, computed, threshold=0.1):
    """Logits just above the threshold for the branches computed[i] of router i, just below for the others."""
    edge = np.log(threshold / (1 - threshold))
    logits = np.full((steps, branches), edge - 0.01)
    for i, own in computed.items():
        logits[i, list(own)] = edge + 0.01
    return logits


def test_every_second_step_is_full_and_the_others_follow_the_file(tmp_path):
    # Routers count upwards: sampling steps 1, 3, 5 of 6 read 4, 2, 0. The odd ones are never read.
    spec = f"l2c:router={trained(tmp_path / 'r.pt', routed(6, 6, {4: (0, 3), 2: (5,), 1: (0, 1, 2)}))}"
    assert walk_units(spec, 6) == ["xxxxxx x..x.. xxxxxx .....x xxxxxx ......"]
    for threshold, word in ((0.09, "xxxxxx"), (0.11, "......"), (1, "......")):
        assert walk_units(f"{spec},threshold={threshold}", 6) == [" ".join(["xxxxxx", word] * 3)]


@pytest.mark.parametrize("steps", [5, 8])
def test_files_of_other_runs_are_refused(model, tmp_path, steps):
    path = trained(tmp_path / "r.pt", np.zeros((5, 6)))
    with pytest.raises(ValueError, match=rf"router={path} must have .* an even number of steps, {steps} in this run"):
        load_routers(path, make_run(model, steps=steps))
    torch.save({"model": {}}, path)
    with pytest.raises(ValueError, match="must be stand-in, or a torch file with the key 'routers'"):
        load_routers(path, make_run(model, steps=steps))


def test_one_branch_is_skipped_where_its_error_costs_less_than_it():
    # By itself a branch of squared error e has 1 - w = l1 / 2e, at most 1.
    gram = np.stack([np.diag([1.0, 4.0]), np.diag([0.5, 0.0])])
    assert_close(fit_routers(gram, 1.0), np.array([[0.5, 0.875], [0.0, 0.0]]))
    assert_close(fit_routers(gram, 0.0), np.ones((2, 2)))
    assert fit_routers(gram[:0], 1.0).shape == (0, 2)


def test_the_fit_is_the_minimum_of_the_loss():
    rng = np.random.default_rng(0)
    gram = np.stack([(a := rng.normal(size=(5, 4))).T @ a for _ in range(3)])

    def loss(w, l1):
        return np.einsum("rb,rbc,rc->r", 1 - w, gram, 1 - w) + l1 * w.sum(axis=1)

    for l1 in (0.1, 2.0, 20.0):
        best = fit_routers(gram, l1)
        assert ((best >= 0) & (best <= 1)).all()
        for scale in (1e-3, 0.1, 1.0):
            others = (np.clip(best + scale * rng.normal(size=best.shape), 0, 1) for _ in range(50))
            assert all((loss(best, l1) <= loss(other, l1) + 1e-9).all() for other in others)


def test_errors_that_cancel_are_skipped_together():
    gram = np.array([[[1.0, -0.99], [-0.99, 1.0]]])
    assert (fit_routers(gram, 0.1) < 1e-3).all()
    assert (fit_routers(np.abs(gram), 0.1) > 0.9).all()


def test_calibration_multiplies_gated_changes_relative_to_the_stack(model):
    calibration, generator = L2CCalibration(), torch.Generator().manual_seed(1)
    errors = np.zeros((2, 6, 6))  # of the routed steps, summed up the long way
    for images in (2, 1):
        run = make_run(model, images, 2, 5, cfg_scale=1.5)
        calibration.begin(run)
        before = {}
        for step in range(5):
            c = torch.randn(2 * images, WIDTH, generator=generator)
            out = torch.randn(2, images, 16, WIDTH, generator=generator)
            seen = []
            for unit in by_branch(run.depth):
                value = torch.randn(2, images, 16, WIDTH, generator=generator)
                view = make_view(run, step, out, unit, c=c)
                calibration.computed(view, Ran(np.arange(images), out, out, value))
                gate = run.blocks[unit.start].modulation(c)[2 if unit.branch == "attn" else 5].view(2, images, 1, WIDTH)
                seen.append(gate * (before.get(unit, value) - value))
                before[unit] = value
            if step in (1, 3):
                for half in range(2):
                    for image in range(images):
                        own = torch.stack([s[half, image].flatten() for s in seen]).double().numpy()
                        errors[step // 2] += own @ own.T / float(out[half, image].double().square().sum())
    arrays, _ = calibration.fit()
    assert_close(arrays["gram"], np.float32(errors / 6), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("l1", "word"), [("0", "xxxxxx"), ("inf", "......")])
def test_the_price_of_a_branch_decides_from_all_to_half(measured, l1, word):
    measured("l2c", gram=np.tile(np.eye(6), (5, 1, 1)))
    assert walk_units(f"l2c:l1={l1}", 10) == [" ".join(["xxxxxx", word] * 5)]


def test_a_step_is_proposed_for_half_of_the_flops(tmp_path):
    # Attention has 0.39 of a block's FLOPs: branches 1 and 3 have 0.41 of all, with branch 0 it is 0.54.
    path = trained(tmp_path / "r.pt", routed(6, 6, {4: (1, 3), 2: (0, 1, 3), 0: ()}))
    assert schedule(f"l2c:router={path}", 6, question="propose") == [0, 2, 3, 4]


def test_tables_say_what_stands_in():
    assert make_policy("l2c").remark == "fitted stand-in"
    assert make_policy("l2c:router=x.pt").remark == ""
