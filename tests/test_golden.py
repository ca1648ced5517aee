"""Images that were sampled once, on the bundled checkpoint: what a user sees stays what it was.

The images in golden.npz were made by this command, which makes them anew where a change of them is meant:

    python tests/test_golden.py

Another processor rounds otherwise, so a value may differ by 1 of 255.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

FILE = Path(__file__).with_name("golden.npz")
sys.path.insert(0, str(FILE.parents[1]))  # for the command above

from adacorr import CacheManager  # noqa: E402
from pipeline import ModelOptions, load  # noqa: E402
from profiles import with_profile  # noqa: E402

# name: sampler, steps, --cache, --adacorr, --calibrate
CASES = {
    "uncached": ("ddim", 5, None, None, "off"),
    "adacorr": ("ddim", 14, None, "gamma=0.5", "off"),
    "corrected": ("ddim", 10, "first_block:threshold=0.3", "gamma=0.2", "off"),
    "ddpm": ("ddpm", 6, "interval:every=3,order=1", None, "off"),
    "known": ("ddim", 50, None, "budget=3", "auto"),
}


def draw(sampler: str, steps: int, policy: str | None, correction: str | None, calibrate: str) -> np.ndarray:
    """uint8 images (2, 32, 32, 3)."""
    pipe = load(ModelOptions(sampler=sampler, num_sampling_steps=steps, device="cpu", offline=True))
    cache = with_profile(CacheManager.of(policy, correction), pipe, calibrate)
    state = pipe.sample(11, np.arange(2), torch.tensor([1, 7]), cache)
    return pipe.decode(state).numpy()


@pytest.mark.parametrize("name", CASES)
def test_images_are_what_they_were(name):
    with np.load(FILE) as golden:
        difference = draw(*CASES[name]).astype(int) - golden[name]
    assert np.abs(difference).max() <= 1


if __name__ == "__main__":
    np.savez_compressed(FILE, **{name: draw(*case) for name, case in CASES.items()})
