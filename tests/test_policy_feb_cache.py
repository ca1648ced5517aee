"""FEB-Cache: the table of the release, tables of one's own, and the noise that is divided."""

import pytest
from by_hand import schedule, walk_units
from torch.testing import assert_close
from toy import forced

from adacorr import CacheManager, make_policy


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
    words = {"f": "xx" * 3, "m": ".x" * 3, "s": ".." * 3}  # attention and MLP of three blocks
    assert walk_units(f"feb_cache:{spec}", steps) == [" ".join(words[kind] for kind in expected)]
    full = [step for step, kind in enumerate(expected) if kind == "f"]
    assert schedule(f"feb_cache:{spec}", steps, question="propose") == full


@pytest.mark.parametrize("spec", ["every=2,table=fms", "noisy=0", "between=m,table=f"])
def test_options_that_would_change_nothing_are_refused(spec):
    with pytest.raises(ValueError, match="feb_cache: .*every"):
        make_policy(f"feb_cache:{spec}")


def test_the_noise_is_divided(model):
    out, plain = forced(model, CacheManager(make_policy("feb_cache:table=f,delta=0.965")))
    assert_close(out, plain / 0.965)
