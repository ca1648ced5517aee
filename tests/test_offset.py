"""Offset estimation: Eq. 1-3 by hand, and what the innovation promises."""

import pytest
import torch
from torch.testing import assert_close

from adacorr import innovation, offset_score, spatial_variation, temporal_deviation

# Two images of two tokens and two channels.
NOW = torch.tensor([[[3.0, 4.0], [0.0, 2.0]], [[1.0, 1.0], [5.0, 5.0]]])
BEFORE = torch.tensor([[[0.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [5.0, 3.0]]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_temporal_deviation_is_the_mean_token_norm_of_the_change(dtype):
    # Norms of the change: 5 and 1, then 0 and 2. The norm of the whole would be sqrt(26).
    assert_close(temporal_deviation(NOW.to(dtype), BEFORE.to(dtype)), torch.tensor([3.0, 1.0]))  # float32


def test_spatial_variation_is_the_population_deviation_over_channels():
    # Deviations of (3, 4), (0, 2): 1/2 and 1, where the sample's would be 0.71 and 1.41; of (1, 1), (5, 5):
    # none, although the two tokens differ.
    assert_close(spatial_variation(NOW), torch.tensor([0.75, 0.0]))


@pytest.mark.parametrize(("form", "expected"), [("paper", [3.375, 1.0]), ("squared", [9.375, 1.0])])
def test_score_adds_the_spatial_term_to_the_temporal_one_or_its_square(form, expected):
    temporal, spatial = temporal_deviation(NOW, BEFORE), spatial_variation(NOW)
    assert_close(offset_score(temporal, spatial, 0.5, form), torch.tensor(expected))
    assert_close(offset_score(temporal, spatial), torch.tensor([3.75, 1.0]))  # by default the paper's, at lambda 1


def test_score_of_an_unknown_form_raises_and_names_both():
    with pytest.raises(ValueError, match="cubed.*paper, squared"):
        offset_score(torch.zeros(1), torch.zeros(1), 1.0, "cubed")


def test_innovation_by_hand():
    fresh, predicted = NOW[:1], torch.tensor([[[3.0, 4.0], [0.0, 1.0]]])
    # Changes 0 and 1 over norms 5 and 2: r = 0.5 / 3.5. Dispersion 0.75 against 0.5: q = 1/3.
    for spatial_weight in (0.0, 1.0, 2.0):
        expected = torch.tensor([1 / 7 + spatial_weight / 3])
        assert_close(innovation(fresh, predicted, spatial_weight), expected)
    assert_close(innovation(fresh, predicted), torch.tensor([1 / 7 + 1 / 3]))


def test_innovation_does_not_know_the_scale():
    now, before = NOW.flip(1) + torch.tensor([0.0, 1.0]), BEFORE + torch.tensor([0.5, 0.0])
    expected = innovation(now, before)
    assert (expected > 0.1).all()
    for scale in (10.0, 1e-6, -1.0):
        assert_close(innovation(scale * now, scale * before), expected)


def test_innovation_is_zero_exactly_when_the_prediction_is_right():
    assert_close(innovation(NOW, NOW.clone()), torch.zeros(2), rtol=0, atol=0)
    assert_close(innovation(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2)), torch.zeros(1), rtol=0, atol=0)
    # A rotation keeps the dispersion but not the tensor.
    assert innovation(NOW, NOW.flip(-1))[0] > 0.5


def test_innovation_of_an_image_does_not_depend_on_its_batch():
    both = innovation(NOW, BEFORE)
    for i in range(2):
        assert torch.equal(innovation(NOW[i : i + 1], BEFORE[i : i + 1])[0], both[i])
