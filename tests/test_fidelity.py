"""PSNR and SSIM against closed forms, and against scikit-image."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from evaluate.fidelity import fidelity, psnr, ssim


def flat(*levels, size=16):
    return torch.stack([torch.full((size, size, 3), level, dtype=torch.uint8) for level in levels])


def noise(n=3, h=24, w=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, h, w, 3), dtype=torch.uint8, generator=generator)


def blurred_pair(n=2, h=32, w=27):
    """Images with structure, and a slightly disturbed copy: SSIM well inside (0, 1)."""
    rng = np.random.default_rng(1)
    a = gaussian_filter(rng.normal(size=(n, h, w, 3)), (0, 3, 2, 0)) * 400 + 128
    b = a + rng.normal(size=a.shape) * 10
    return [torch.from_numpy(np.clip(x, 0, 255).astype(np.uint8)) for x in (a, b)]


# ---- PSNR


@pytest.mark.parametrize("d", [1, 5, 20, 100, 255])
def test_psnr_of_a_constant_offset(d):
    # Up and down are equally wrong; subtracted in uint8, 100 - 120 would be 236.
    expected = pytest.approx(20 * math.log10(255 / d), abs=1e-12)
    up, down = psnr(flat(0), flat(d)), psnr(flat(255), flat(255 - d))
    assert (up.item(), down.item(), up.dtype) == (expected, expected, torch.float64)
    checker = flat(0)
    checker[:, ::2] = d
    assert psnr(checker, flat(d) - checker).item() == expected


# ---- SSIM


def test_ssim_of_constants():
    # No variance: only the luminance term is left, (2ab + C1) / (a^2 + b^2 + C1) with C1 = 2.55^2.
    expected = (2 * 100 * 150 + 6.5025) / (100**2 + 150**2 + 6.5025)
    assert ssim(flat(100), flat(150)).item() == pytest.approx(expected, abs=1e-9)
    assert ssim(flat(0), flat(255)).item() == pytest.approx(6.5025 / (255**2 + 6.5025), abs=1e-9)
    assert ssim(noise(), noise()).tolist() == pytest.approx([1, 1, 1], abs=1e-12)


@pytest.mark.parametrize("pair", [blurred_pair(), (noise(seed=1), noise(seed=2))], ids=["alike", "unlike"])
def test_ssim_is_that_of_scikit_image(pair):
    metrics = pytest.importorskip("skimage.metrics")
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    options |= {"data_range": 255, "channel_axis": -1}
    pairs = zip(*(images.numpy() for images in pair), strict=True)
    expected = [metrics.structural_similarity(x, y, **options) for x, y in pairs]
    assert ssim(*pair).tolist() == pytest.approx(expected, abs=1e-6)


# ---- both


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_each_image_is_scored_alone_and_in_order(measure):
    a, b = noise(4, seed=1), noise(4, seed=2)
    b[1] = a[1] // 2
    before = a.clone(), b.clone()
    together = measure(a, b)
    assert torch.equal(a, before[0])  # inputs are left alone
    assert torch.equal(b, before[1])
    assert together.shape == (4,)
    assert [measure(a[i : i + 1], b[i : i + 1]).item() for i in range(4)] == together.tolist()
    assert measure(a.flip(0), b.flip(0)).tolist() == together.flip(0).tolist()
    assert measure(a, b.flip(0)).tolist() != together.tolist()
    assert measure(b, a).tolist() == pytest.approx(together.tolist(), abs=1e-12)


# ---- the summary


def test_summary():
    levels = [1, 2, 4, 8]
    result = fidelity(flat(0, 0, 0, 0), flat(*levels))
    each = [20 * math.log10(255 / d) for d in levels]  # their mean is taken, not that of the errors
    assert result["images"] == 4
    assert result["psnr"].pop("per_image") == pytest.approx(each, abs=1e-12)
    summary = {"mean": np.mean(each), "p5": np.percentile(each, 5), "min": each[-1], "identical": 0}
    assert result["psnr"] == pytest.approx(summary, abs=1e-12)
    scores = result["ssim"].pop("per_image")
    assert scores == ssim(flat(0, 0, 0, 0), flat(*levels)).tolist()
    summary = {"mean": np.mean(scores), "p5": np.percentile(scores, 5), "min": min(scores)}
    assert result["ssim"] == pytest.approx(summary, abs=1e-12)


def test_identical_images_are_counted_and_left_out_of_the_psnr():
    result = fidelity(flat(0, 50, 0), flat(1, 50, 3))
    assert result["psnr"].pop("per_image")[1] == "inf"
    each = [20 * math.log10(255 / d) for d in (1, 3)]
    summary = {"mean": np.mean(each), "p5": np.percentile(each, 5), "min": each[1], "identical": 1}
    assert result["psnr"] == pytest.approx(summary, abs=1e-12)
    assert result["ssim"]["per_image"][1] == pytest.approx(1, abs=1e-12)
    everything = fidelity(noise(), noise())
    identical = {"mean": "inf", "p5": "inf", "min": "inf", "identical": 3, "per_image": ["inf"] * 3}
    assert everything["psnr"] == identical
    assert float(everything["psnr"]["mean"]) == math.inf
    assert everything["ssim"]["mean"] == pytest.approx(1, abs=1e-12)
    for scores in (result, everything):
        assert json.loads(json.dumps(scores, allow_nan=False)) == scores


# ---- what is refused

X = noise(2, 16, 16)


@pytest.mark.parametrize("measure", [psnr, ssim, fidelity])
@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (X.numpy(), TypeError, "torch tensor"),
        (X.float() / 255, TypeError, "uint8"),
        (X.to(torch.int16), TypeError, "uint8"),
        (X[0], ValueError, r"\(N, H, W, 3\)"),
        (X.permute(0, 3, 1, 2), ValueError, r"\(N, H, W, 3\)"),
        (X[..., :1], ValueError, r"\(N, H, W, 3\)"),
        (X[:1], ValueError, r"\(2, 16, 16, 3\).*\(1, 16, 16, 3\)"),  # would broadcast
        (X[:, :1], ValueError, r"\(2, 16, 16, 3\).*\(2, 1, 16, 3\)"),
    ],
)
def test_bad_images(measure, images, error, message):
    with pytest.raises(error, match=message):
        measure(X, images)
    with pytest.raises(error):
        measure(images, X)


@pytest.mark.parametrize("measure", [psnr, ssim, fidelity])
def test_too_few_images_or_pixels(measure):
    with pytest.raises(ValueError, match="nothing to compare"):
        measure(X[:0], X[:0])
    if measure is not psnr:
        with pytest.raises(ValueError, match="11 x 11"):
            measure(X[:, :10], X[:, :10])
    assert psnr(X[:, :10], X[:, :10]).isinf().all()


@pytest.mark.gpu
def test_same_numbers_on_the_gpu():
    a, b = blurred_pair()
    here, there = fidelity(a, b), fidelity(a.cuda(), b.cuda())
    for name in ("psnr", "ssim"):
        assert there[name]["per_image"] == pytest.approx(here[name]["per_image"], abs=1e-9)
    with pytest.raises(ValueError, match="cuda"):
        fidelity(a, b.cuda())
