"""FasterCache: which halves and which attention run, the bands of the difference, and a run against the release's."""

import numpy as np
import pytest
import torch
from by_hand import compute, schedule, show, start, told
from torch.testing import assert_close
from toy import guided, rows_at, sample, sample_with, standing_in

from adacorr import CacheManager, make_policy
from adacorr.policies.fastercache import bands
from diffusion import make_sampler
from pipeline import gaussian

TIMESTEPS = make_sampler("ddim", 50).timesteps.tolist()


@pytest.mark.parametrize(("height", "width", "low"), [(32, 32, 113), (8, 8, 5), (10, 15, 13), (9, 9, 5), (4, 4, 1)])
def test_bands_are_those_of_the_shifted_spectrum(height, width, low):
    image = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 3, height, width)))
    spectrum = np.fft.fftshift(np.fft.fft2(image.numpy()), axes=(-2, -1))
    y, x = np.arange(height)[:, None] - height // 2, np.arange(width) - width // 2
    mask = x**2 + y**2 <= (min(height, width) // 5) ** 2
    assert mask.sum() == low
    for part, own in zip(bands(image), (mask, ~mask), strict=True):
        expected = np.fft.ifft2(np.fft.ifftshift(spectrum * own, axes=(-2, -1)))
        assert abs(expected.imag).max() < 1e-12
        np.testing.assert_allclose(part.numpy(), expected.real, atol=1e-12)


def test_steps_of_both_halves_and_of_attention():
    policy, info, unit = start("fastercache", halves=2, steps=50)
    both = [not policy.conditional_only(info, step) for step in range(50)]
    assert [s for s in range(50) if both[s]] == [s for s in range(50) if TIMESTEPS[s] >= 641 or s % 5 == 0]
    # In every second step below 681, but for steps of both halves after one of a single half.
    first = next(s for s in range(50) if TIMESTEPS[s] < 681)
    alone = next(s for s in range(50) if not both[s])
    for step in range(50):
        x = torch.zeros(1 + both[step], 1, 1, 1)
        (due,) = policy.decide(show(info, step, x, unit))
        assert due == (step < first or step % 2 == 0 or (both[step] and step > alone))
        if due:
            compute(policy, info, unit, step, x)
    proposed = [s for s in range(50) if s < first or s % 2 == 0]
    assert schedule("fastercache", 50, halves=2, question="propose") == proposed


def test_attention_is_extrapolated_in_the_half_that_runs():
    first, second = (torch.tensor(value).view(2, 1, 1, 1) for value in ([1.0, 10.0], [3.0, 20.0]))
    policy, info, unit = told("fastercache:weight=0.25", first)
    assert policy.reuse(show(info, 1, first, unit), None).flatten().tolist() == [1.0, 10.0]  # none before: held
    compute(policy, info, unit, 1, second)
    assert policy.reuse(show(info, 2, first, unit), None).flatten().tolist() == [3.5, 22.5]
    assert policy.reuse(show(info, 3, first[:1], unit), None).flatten().tolist() == [3.5]


@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_bands_grow_by_timestep(alpha):
    """A difference of one low and one high wave, through a run of 10 steps that computes both halves in step 0 only."""
    policy, info, _ = start(f"fastercache:every=10,uncond_below=1000,alpha={alpha}", halves=2, steps=10)
    place = torch.arange(10) / 10 * 2 * torch.pi
    low, high = place.cos().expand(10, 10), (4 * place).cos().expand(10, 10)
    cond = torch.randn(1, 1, 10, 10, generator=torch.Generator().manual_seed(0))
    noise = torch.stack([cond, cond + 2 * low + 3 * high])
    assert torch.equal(policy.network_output(info, 0, noise), noise)
    for step in range(1, 10):
        t = info.timesteps[step]
        done = [info.timesteps[s] for s in range(1, step + 1)]
        grown = [alpha ** sum(a < t < b for t in done) for a, b in ((99, 901), (-1, 301))]
        out = policy.network_output(info, step, torch.stack([2 * cond, torch.full_like(cond, torch.nan)]))
        assert torch.equal(out[0], 2 * cond), t
        assert_close(out[1], 2 * cond + grown[0] * 2 * low + grown[1] * 3 * high, rtol=1e-4, atol=1e-4)


class Halves:
    """In the plainest way: the loop over steps, with the rows that run, and attention held or extrapolated by row."""

    def __init__(self, both, computed, weight):
        self.both, self.computed, self.weight, self.kept = both, computed, weight, {}

    def __call__(self, step, blocks, x, c):
        rows = len(x) if self.both[step] else len(x) // 2
        x, c = x[:rows], c[:rows]
        for i, block in enumerate(blocks):
            shift, scale, gate, *rest = block.modulation(c)
            if self.computed[step]:
                attn = block.attn_branch(x, shift, scale)
                self.kept[i] = self.kept.get(i, [attn])[-1:] + [attn]
            else:
                b, a = (output[:rows] for output in self.kept[i])
                attn = a + self.weight * (a - b)
            x = x + gate.unsqueeze(1) * attn
            x = x + rest[2].unsqueeze(1) * block.mlp_branch(x, *rest[:2])
        return x if self.both[step] else torch.cat([x, x])


@torch.no_grad()
def test_whole_run(model):
    manager = CacheManager(make_policy("fastercache:every=3,attention=2,weight=0.3,uncond_below=750,below=850"))
    out = sample(model, 12, (1, 4), cache=manager)
    sampler = make_sampler("ddim", 12)
    t = sampler.timesteps.tolist()
    both = [t[s] >= 750 or s % 3 == 0 for s in range(12)]
    full, computed = [], []  # whether the outputs in store are of both halves
    for s in range(12):
        computed.append(t[s] >= 850 or s % 2 == 0 or (both[s] and not all(full[-2:])))
        full += [both[s]] if computed[s] else []
    assert computed.count(False) >= 4
    x, labels = gaussian(0, np.arange(2), (3, 8, 8)), torch.tensor([1, 4])
    with standing_in(model, Halves(both, computed, 0.3)):
        for s in range(12):
            noise = model(*rows_at(model, sampler, s, x, labels, 2))
            if both[s]:
                difference = bands(noise[2:] - noise[:2])
            else:
                grown = [1.1 if low < t[s] < high else 1.0 for low, high in ((99, 901), (-1, 301))]
                difference = [a * band for a, band in zip(grown, difference, strict=True)]
                noise = torch.cat([noise[:2], noise[:2] + sum(difference)])
            x = sampler.step(s, x, guided(noise, 1.5))
    assert_close(out, x, rtol=1e-4, atol=1e-4)
    executed = manager.trace.executed  # (steps, layers, branches, images, halves)
    assert (executed[:, :, 0, :, 0].all(axis=(1, 2)) == computed).all()
    assert (executed[:, :, 1, :, 1].all(axis=(1, 2)) == both).all()
    assert (executed[:, :, 1, :, 0] == 1).all()
    spent = executed.sum(axis=(0, 1, 3, 4)) @ np.array(model.branch_flops())
    idle = sum((2 if both[s] else 1) * (not computed[s]) for s in range(12)) * 3 * 2 * 6 * 32 * 32  # fresh gates
    assert manager.trace.flops == spent + idle


def test_without_guidance_only_attention_is_left_out(model):
    manager = CacheManager(make_policy("fastercache:weight=0"))
    out = sample(model, cfg_scale=1.0, cache=manager)
    steps = [s for s in range(10) if s % 2 == 0 or make_sampler("ddim", 10).timesteps[s] >= 681]
    assert np.flatnonzero(manager.trace.executed[:, 0, 0, 0, 0]).tolist() == steps

    both, computed = [True] * 10, [s in steps for s in range(10)]
    assert_close(out, sample_with(Halves(both, computed, 0.0), model, cfg_scale=1.0), rtol=1e-4, atol=1e-5)
