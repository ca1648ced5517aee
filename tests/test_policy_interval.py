"""FORA's schedule, counted as the release counts it."""

import pytest
from by_hand import schedule

from adacorr import Predictor, make_policy


@pytest.mark.parametrize(("every", "count"), [(1, 50), (2, 26), (3, 18), (5, 11), (7, 8)])
def test_the_published_number_of_full_steps(every, count):
    """The release counts i down from 49 and computes i = 49 and every i that N divides."""
    expected = [49 - i for i in range(49, -1, -1) if i == 49 or i % every == 0]
    assert schedule(f"interval:every={every}", 50) == expected
    assert len(expected) == count


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ("every=4", [0, 2, 6, 10]),  # the last step is computed
        ("every=4,align=start", [0, 4, 8]),
        ("every=4,warmup=1", [0, 1, 2, 6, 10]),
        ("every=4,warmup=1,align=start", [0, 1, 5, 9]),
        ("every=4,warmup=5,align=start", [0, 1, 2, 3, 4, 5, 9]),
        ("every=100", [0, 10]),
    ],
)
def test_alignment_at_either_end_and_warm_up(options, steps):
    assert schedule(f"interval:{options}", 11) == steps


def test_what_is_stored():
    assert make_policy("interval").predictor == Predictor("branches", order=0)
    assert make_policy("interval:order=2").predictor == Predictor("branches", order=2)
    assert make_policy("never").predictor is None
