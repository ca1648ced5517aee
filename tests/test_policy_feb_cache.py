"""FEB-Cache: the table of the release, tables of one's own, and a run against the plainest form of the rule."""

import pytest
import torch
from toy import HeldBranches, forced, make_run, make_view, sample, sample_with, tiny_dit

from adacorr import CacheManager, make_policy
from adacorr.unit import Unit


def kinds(spec, steps):
    """What a run of so many steps computes, a letter a step."""
    policy, run = make_policy(f"feb_cache:{spec}"), make_run(tiny_dit(), steps=steps)
    policy.begin(run)
    found, x = "", torch.zeros(1, 1, 2, 3)
    for step in range(steps):
        attn, mlp = (bool(policy.decide(make_view(run, step, x, Unit(1, 2, branch)))[0]) for branch in ("attn", "mlp"))
        assert policy.propose(make_view(run, step, x)).tolist() == [attn]
        found += {(True, True): "f", (False, True): "m", (False, False): "s"}[attn, mlp]
    return found


@pytest.mark.parametrize(
    ("spec", "steps", "expected"),
    [
        ("every=0", 50, "ffffffffffffffffffffffsfsfsfsfsfsfsfsfsfsssfssfssf"),  # as the release's file has it
        ("every=0", 10, "ffffffsfss"),
        ("table=fms", 3, "fms"),
        ("table=fms", 7, "fffmmss"),
        ("table=fffsmm", 3, "ffm"),
        ("every=3,noisy=0", 8, "fssfssfs"),
        ("every=3,noisy=0.5", 8, "ffffssfs"),
        ("every=2,noisy=0.25,between=m", 8, "ffmfmfmf"),
        ("every=1", 4, "ffff"),
    ],
)
def test_steps(spec, steps, expected):
    assert kinds(spec, steps) == expected


@pytest.mark.parametrize("spec", ["every=2,table=fms", "noisy=0", "between=m,table=f"])
def test_options_that_would_change_nothing_are_refused(spec):
    with pytest.raises(ValueError, match="feb_cache: .*every"):
        make_policy(f"feb_cache:{spec}")


def test_whole_run():
    model, table = tiny_dit(), "ffmsfmmssf"
    out = sample(model, cache=CacheManager(make_policy(f"feb_cache:table={table}")))
    twin = HeldBranches(lambda step, _, branch: table[step] in "f" + "m" * branch)
    torch.testing.assert_close(out, sample_with(twin, model), rtol=1e-4, atol=1e-5)


def test_the_noise_is_divided():
    out, plain = forced(tiny_dit(), CacheManager(make_policy("feb_cache:table=f,delta=0.965")))
    torch.testing.assert_close(out, plain / 0.965)
