"""How close the images of a cached run are to those of the uncached run on the same noise: PSNR and SSIM.

    from evaluate.fidelity import fidelity
    result = fidelity(reference, images)        # both uint8, (N, H, W, 3); image i against image i
    float(result["psnr"]["mean"])               # dB

Both are taken per image and summarised afterwards: `mean`, `p5` (5th percentile with linear interpolation: 95 % of the
images are better) and `min`. Two equal images have an infinite PSNR. They are counted in `identical` and left out of
the summary, which is infinite only if all images are identical. JSON has no infinity: the result holds the string
"inf" in its place, and float("inf") reads it back.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

PEAK = 255.0


def _check(reference: Tensor, images: Tensor) -> None:
    for name, value in (("reference", reference), ("images", images)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a torch tensor, not {type(value).__name__}")
        if value.dtype != torch.uint8:
            raise TypeError(f"{name}: expected uint8 in 0..255, not {value.dtype}")
        if value.ndim != 4 or value.shape[-1] != 3:
            raise ValueError(f"{name}: expected shape (N, H, W, 3), got {tuple(value.shape)}")
    if reference.shape != images.shape:
        raise ValueError(f"reference is {tuple(reference.shape)} but images is {tuple(images.shape)}")
    if reference.device != images.device:
        raise ValueError(f"reference is on {reference.device} but images is on {images.device}")
    if reference.numel() == 0:
        raise ValueError(f"nothing to compare: shape {tuple(reference.shape)}")


# Peak signal-to-noise ratio, 10 log10(255^2 / MSE), in dB. The bytes are widened before the subtraction: in
# uint8 the difference -20 is 236.
def psnr(reference: Tensor, images: Tensor) -> Tensor:  # 2 x uint8 (N, H, W, 3) -> float64 (N,)
    _check(reference, images)
    pairs = zip(reference, images, strict=True)
    mse = torch.stack([(a.double() - b.double()).square().mean() for a, b in pairs])
    return 10 * torch.log10(PEAK**2 / mse)  # mse = 0 -> inf


def check_size(height: int, width: int) -> None:
    """ValueError for images that the window of SSIM does not fit into."""
    if min(height, width) < 11:
        raise ValueError(f"a comparison (SSIM) needs images of at least 11 x 11 pixels, these have {width} x {height}")


# Structural similarity, Wang et al. 2004 (IEEE TIP 13(4), eq. 13): an 11x11 gaussian window of sigma 1.5,
# population (co)variances under it, only windows that lie inside the image, mean over windows and channels.
def ssim(reference: Tensor, images: Tensor) -> Tensor:  # 2 x uint8 (N, H, W, 3), H, W >= 11 -> float64 (N,)
    _check(reference, images)
    check_size(*reference.shape[1:3])
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    offsets = torch.arange(-5, 6, dtype=torch.float64, device=reference.device)
    window = torch.exp(-0.5 * (offsets / 1.5) ** 2)
    window /= window.sum()

    def local_mean(z: Tensor) -> Tensor:  # (3, H, W) -> (3, H-10, W-10); the window is separable
        z = F.conv2d(z[:, None], window.view(1, 1, 11, 1))
        return F.conv2d(z, window.view(1, 1, 1, 11))[:, 0]

    scores = []
    for a, b in zip(reference, images, strict=True):  # one at a time: no image's score depends on the others
        a, b = a.permute(2, 0, 1).double(), b.permute(2, 0, 1).double()  # (3, H, W)
        mean_a, mean_b = local_mean(a), local_mean(b)
        var_a = local_mean(a * a) - mean_a * mean_a
        var_b = local_mean(b * b) - mean_b * mean_b
        cov = local_mean(a * b) - mean_a * mean_b
        luminance = (2 * mean_a * mean_b + c1) / (mean_a * mean_a + mean_b * mean_b + c1)
        structure = (2 * cov + c2) / (var_a + var_b + c2)
        scores.append((luminance * structure).mean())
    return torch.stack(scores)


def _summary(values: Tensor) -> dict:  # (n,), all finite; n = 0 if every image is identical to its reference
    if len(values) == 0:
        return dict.fromkeys(("mean", "p5", "min"), "inf")
    return {"mean": values.mean().item(), "p5": values.quantile(0.05).item(), "min": values.min().item()}


def fidelity(reference: Tensor, images: Tensor) -> dict:  # 2 x uint8 (N, H, W, 3)
    """PSNR and SSIM of each image against the reference image of the same index, as `summarise` gives them."""
    return summarise(psnr(reference, images), ssim(reference, images))


def summarise(psnr: Tensor, ssim: Tensor) -> dict:  # 2 x float64 (N,)
    """The scores of N images as plain JSON values.

    {"images": N,
     "psnr": {"mean", "p5", "min", "identical", "per_image": [N]},
     "ssim": {"mean", "p5", "min", "per_image": [N]}}
    """
    p, s = psnr.cpu(), ssim.cpu()
    each = ["inf" if value == float("inf") else value for value in p.tolist()]
    return {
        "images": len(p),
        "psnr": {**summarise_psnr(p), "per_image": each},
        "ssim": {**_summary(s), "per_image": s.tolist()},
    }


def summarise_psnr(values: Tensor) -> dict:  # float64 (N,), infinite for identical images
    """{"mean", "p5", "min", "identical"}"""
    finite = values[values.isfinite()]
    return {**_summary(finite), "identical": len(values) - len(finite)}
