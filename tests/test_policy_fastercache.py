"""FasterCache: which halves and which attention run, the bands of the difference, and a run against the release's."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from toy import begun, guided, make_view, ran, rows_at, sample, sample_with, tiny_dit

from adacorr import CacheManager, make_policy
from adacorr.policies.fastercache import bands
from adacorr.unit import Unit
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


def attention(policy, views, halves):
    """Whether attention runs, step by step, when steps of one half are shown as such: text."""
    found, unit = "", Unit(0, 1, "attn")
    for view, both in zip(views, halves, strict=True):
        x = view.x if both else view.x[:1]
        view = make_view(view.info, view.step, x, unit)
        due = bool(policy.decide(view)[0])
        found += ".x"[due]
        if due:
            policy.computed(view, ran(view, [0]))
    return found


def test_steps_of_both_halves_and_of_attention():
    policy, views = begun(tiny_dit(), "fastercache", steps=50, halves=2)
    both = [not policy.conditional_only(view.info, view.step) for view in views]
    assert [s for s in range(50) if both[s]] == [s for s in range(50) if TIMESTEPS[s] >= 641 or s % 5 == 0]
    # In every second step below 681, but for steps of both halves after one of a single half.
    first = next(s for s in range(50) if TIMESTEPS[s] < 681)
    alone = next(s for s in range(50) if not both[s])
    expected = [s < first or s % 2 == 0 or (both[s] and s > alone) for s in range(50)]
    assert attention(policy, views, both) == "".join(".x"[due] for due in expected)
    assert [view.step for view in views if policy.propose(view)[0]] == [s for s in range(50) if s < first or s % 2 == 0]


def test_attention_is_extrapolated_in_the_half_that_runs():
    policy, views = begun(tiny_dit(), "fastercache:weight=0.25", halves=2)
    unit = Unit(1, 2, "attn")
    for step, value in enumerate(([1.0, 10.0], [3.0, 20.0])):
        view = make_view(views[step].info, step, views[step].x, unit)
        told = ran(view, [0])
        told.value = torch.tensor(value).view(2, 1, 1, 1)
        policy.computed(view, told)
        if step == 0:  # there is no step before: the output is held
            assert policy.reuse(view, None).flatten().tolist() == [1.0, 10.0]
    assert policy.reuse(view, None).flatten().tolist() == [3.5, 22.5]
    alone = make_view(view.info, 3, view.x[:1], unit)
    assert policy.reuse(alone, None).flatten().tolist() == [3.5]


@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_bands_grow_by_timestep(alpha):
    """A difference of one low and one high wave, through a run of 10 steps that computes both halves in step 0 only."""
    policy, views = begun(tiny_dit(), f"fastercache:every=10,uncond_below=1000,alpha={alpha}", halves=2)
    info, place = views[0].info, torch.arange(10) / 10 * 2 * torch.pi
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
        self.both, self.computed, self.weight, self.step, self.kept = both, computed, weight, -1, {}

    def run_blocks(self, blocks, x, c):
        self.step += 1
        rows = len(x) if self.both[self.step] else len(x) // 2
        x, c = x[:rows], c[:rows]
        for i, block in enumerate(blocks):
            shift, scale, gate, *rest = block.modulation(c)
            if self.computed[self.step]:
                attn = block.attn_branch(x, shift, scale)
                self.kept[i] = self.kept.get(i, [attn])[-1:] + [attn]
            else:
                b, a = (output[:rows] for output in self.kept[i])
                attn = a + self.weight * (a - b)
            x = x + gate.unsqueeze(1) * attn
            x = x + rest[2].unsqueeze(1) * block.mlp_branch(x, *rest[:2])
        return x if self.both[self.step] else torch.cat([x, x])


@torch.no_grad()
def test_whole_run():
    model = tiny_dit()
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
    model.cache = Halves(both, computed, 0.3)
    for s in range(12):
        noise = model(*rows_at(model, sampler, s, x, labels, 2))
        if both[s]:
            difference = bands(noise[2:] - noise[:2])
        else:
            difference = [
                band * (1.1 if low < t[s] < high else 1.0)
                for band, (low, high) in zip(difference, ((99, 901), (-1, 301)), strict=True)
            ]
            noise = torch.cat([noise[:2], noise[:2] + sum(difference)])
        x = sampler.step(s, x, guided(noise, 1.5))
    model.cache = None
    assert_close(out, x, rtol=1e-4, atol=1e-4)
    executed = manager.trace.executed  # (steps, layers, branches, images, halves)
    assert (executed[:, :, 0, :, 0].all(axis=(1, 2)) == computed).all()
    assert (executed[:, :, 1, :, 1].all(axis=(1, 2)) == both).all()
    assert (executed[:, :, 1, :, 0] == 1).all()
    spent = executed.sum(axis=(0, 1, 3, 4)) @ np.array(model.branch_flops())
    idle = sum((2 if both[s] else 1) * (not computed[s]) for s in range(12)) * 3 * 2 * 6 * 32 * 32  # fresh gates
    assert manager.trace.flops == spent + idle


def test_without_guidance_only_attention_is_left_out():
    model, manager = tiny_dit(), CacheManager(make_policy("fastercache:weight=0"))
    out = sample(model, cfg_scale=1.0, cache=manager)
    steps = [s for s in range(10) if s % 2 == 0 or make_sampler("ddim", 10).timesteps[s] >= 681]
    assert np.flatnonzero(manager.trace.executed[:, 0, 0, 0, 0]).tolist() == steps

    both, computed = [True] * 10, [s in steps for s in range(10)]
    assert_close(out, sample_with(Halves(both, computed, 0.0), model, cfg_scale=1.0), rtol=1e-4, atol=1e-5)
