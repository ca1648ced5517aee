"""Adaptive correction: the weight of Eq. 6, the blend of Eq. 7, and the options of both forms."""

from math import inf, nan

import pytest
import torch
from torch.testing import assert_close

from adacorr import AdaCorrection, Algorithm1, blend, correction_weight, parse_correction


def test_weight_is_gamma_times_the_score_held_in_0_to_1():
    score = torch.tensor([-0.5, 0.0, 0.2, 0.5, 3.0])
    assert_close(correction_weight(score, 2.0), torch.tensor([0.0, 0.0, 0.4, 1.0, 1.0]))
    assert_close(correction_weight(score), torch.tensor([0.0, 0.0, 0.2, 0.5, 1.0]))


def test_blend_weighs_the_fresh_output():
    cached, fresh = torch.full((3, 2, 2), 2.0), torch.full((3, 2, 2), 10.0)
    mixed = blend(cached, fresh, torch.tensor([0.0, 0.25, 1.0]))
    assert_close(mixed[:, 0, 0], torch.tensor([2.0, 4.0, 10.0]))  # swapped arguments would give 10, 8, 2
    assert_close(blend(cached, fresh, torch.full((3,), 0.5)), torch.full((3, 2, 2), 6.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blend_is_exact_at_both_ends(dtype):
    generator = torch.Generator().manual_seed(0)
    cached = (1e3 * torch.randn(2, 5, 7, generator=generator)).to(dtype)
    fresh = torch.randn(2, 5, 7, generator=generator).to(dtype)
    mixed = blend(cached, fresh, torch.tensor([0.0, 1.0]))
    assert mixed.dtype == dtype
    assert torch.equal(mixed[0], cached[0])
    assert torch.equal(mixed[1], fresh[1])


def test_weights_and_blends_take_the_fresh_output_where_the_score_is_not_finite():
    weight = correction_weight(torch.tensor([0.25, nan, inf, -inf]))
    assert weight.tolist() == [0.25, 1.0, 1.0, 1.0]
    cached = torch.tensor([4.0, nan, inf, 0.0]).view(4, 1, 1)
    assert blend(cached, torch.full((4, 1, 1), 8.0), weight).flatten().tolist() == [5.0, 8.0, 8.0, 8.0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  ", AdaCorrection(gamma=1.0, spatial_weight=1.0, budget=None)),
        ("gamma=2,lambda=0.5", AdaCorrection(gamma=2.0, spatial_weight=0.5)),
        ("budget=8", AdaCorrection(budget=8)),
        ("difference=false, rewind=false,order=1", AdaCorrection(difference=False, rewind=False, order=1)),
        ("budget=none", AdaCorrection()),
        ("literal", Algorithm1(gamma=1.0, spatial_weight=1.0, form="paper")),
        ("literal:gamma=0.5,lambda=2,form=squared", Algorithm1(0.5, 2.0, "squared")),
    ],
)
def test_options_of_both_forms(text, expected):
    assert parse_correction(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gama=2", "no option 'gama'.*did you mean gamma"),
        ("spatial_weight=2", "no option 'spatial_weight'.*lambda"),
        ("gamma=-1", "gamma=-1"),
        ("gamma=nan", "gamma=nan"),
        ("lambda=-0.1", "lambda=-0.1"),
        ("order=9", "order=9.*0..4"),
        ("rewind=1", "rewind=1 must be true or false"),
        ("budget=8,gamma=2", "budget=8.*gamma=2"),
        ("budget=0", "budget=0"),
        ("budget=nan", "budget=nan"),
        ("gate_error=0.9", "gate_error=0.9"),
        ("tolerance=0", "tolerance=0"),
        ("difference_tolerance=nan", "difference_tolerance=nan"),
        ("gamma", "not key=value"),
        ("literal:", "not key=value"),
        ("literal:form=cubed", "form='cubed'.*paper, squared"),
        ("literal:budget=8", "no option 'budget'"),
        ("litteral", "not key=value"),
    ],
)
def test_a_wrong_option_raises_in_one_line_that_names_it(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_correction(text)
    assert "\n" not in str(caught.value)
