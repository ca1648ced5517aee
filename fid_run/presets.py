"""Published protocols. This module imports nothing heavy, so that the command line is checked at once."""

from typing import Any, NamedTuple


class Preset(NamedTuple):
    """The options of a published protocol, and the FID that was published for it without a cache."""

    options: dict[str, Any]
    fid: str
    source: str


RELEASE = {"model": "DiT-XL/2", "vae": "ema", "cfg_scale": 1.5, "cfg_channels": "3", "labels": "random"}
DDPM = {**RELEASE, "sampler": "ddpm", "num_sampling_steps": 250}
DDIM = {**RELEASE, "sampler": "ddim", "num_sampling_steps": 50}
DIT = "Peebles and Xie, arXiv 2212.09748"
PRESETS = {
    "dit-xl-2-256-ddpm-250": Preset({**DDPM, "image_size": 256}, "2.27", DIT),
    "dit-xl-2-512-ddpm-250": Preset({**DDPM, "image_size": 512}, "3.04", DIT),
    "dit-xl-2-256-ddim-50": Preset(
        {**DDIM, "image_size": 256},
        "2.26 to 2.43",
        "Learning-to-Cache 2.26 (arXiv 2406.01733), SmoothCache 2.28 (2411.10510), TaylorSeer 2.32 (2503.06923), "
        "ProCache 2.43; AdaCorrection (2602.13357) has 4.42 by a protocol that it does not state",
    ),
}
