"""Steps that a run takes in place of the sampling loop: equal to the model, guidance and sampler; few operations."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from operations import Operations
from toy import known_model, sample, tiny_dit

from adacorr import AdaCorrection, CacheManager
from adacorr.corrected_run import CorrectedRun
from adacorr.outside import Outside
from adacorr.store import GateSumStore
from diffusion import make_sampler
from models import DiT
from pipeline import ModelOptions, load, sample_latents
from profiles import with_profile

STEPS = 24
BAR = 15  # operations of a skipped step and of one that is taken again


@contextmanager
def by_the_loop(monkeypatch):
    """All steps go through the model and the sampler."""
    with monkeypatch.context() as patch:
        patch.setattr(CorrectedRun, "shorten", lambda run, make: None)
        yield


def both_ways(monkeypatch, model, manager, **arguments):
    """(states, trace) of the short run, and of the sampling loop."""
    short = sample(model, STEPS, cache=manager, **arguments), manager.trace
    with by_the_loop(monkeypatch):
        return short, (sample(model, STEPS, cache=manager, **arguments), manager.trace)


def check(short, loop, tolerance=1e-5):
    (found, trace), (expected, expected_trace) = short, loop
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())
    assert np.array_equal(trace.executed, expected_trace.executed)
    assert (trace.rewound, trace.done) == (expected_trace.rewound, expected_trace.done)
    for name in ("score", "weight"):
        np.testing.assert_allclose(getattr(trace, name), getattr(expected_trace, name), rtol=2e-3)


@pytest.mark.parametrize(("cfg_scale", "labels"), [(1.0, (3, 0, 3)), (1.5, (3,)), (4.0, (3, 0, 3))])
@pytest.mark.parametrize("options", [{}, {"order": 0}, {"order": 4}, {"difference": False}, {"rewind": False}], ids=str)
def test_polynomials_in_images_of_their_own_steps(monkeypatch, model, options, cfg_scale, labels):
    manager = CacheManager(correction=AdaCorrection(gamma=0.3, **options))
    short, loop = both_ways(monkeypatch, model, manager, cfg_scale=cfg_scale, labels=labels)
    check(short, loop)
    executed = short[1].executed[:, 0, 0]
    assert ((executed == 0).all(axis=(1, 2))).any()  # steps that are skipped as a whole,
    if len(labels) > 1 and options.get("order", 2) in (1, 2, 3):
        assert (executed[:, :, 0].any(axis=1) & ~executed[:, :, 0].all(axis=1)).any()  # and for some images only


@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
@pytest.mark.parametrize("schedule", ["2..12..1..21..1.2", "21112...1..2.1", "2.1.1.1.2", "2" + "." * 20 + "1"])
def test_with_a_profile_and_rewinds_near_and_far(monkeypatch, model, schedule, cfg_scale):
    profile = known_model(model, schedule.ljust(STEPS, "."), cfg_scale)
    manager = CacheManager(correction=AdaCorrection(budget=20), profile=profile)
    check(*both_ways(monkeypatch, model, manager, cfg_scale=cfg_scale))


def test_a_model_without_labels(monkeypatch):
    model = tiny_dit(num_classes=0, class_dropout_prob=0.0)
    check(*both_ways(monkeypatch, model, CacheManager(correction=AdaCorrection(gamma=0.3)), cfg_scale=1.0))


@pytest.mark.parametrize("sampler", ["ddim", "unipc:solver_order=3"])
def test_a_learned_variance_is_left_out_and_some_channels_are_not_guided(monkeypatch, sampler):
    """With a sampler that has a memory, too."""
    model = DiT(input_size=8, in_channels=4, hidden_size=32, depth=2, num_heads=2, num_classes=5).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    noise, labels = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([4, 1])
    cache = CacheManager(correction=AdaCorrection(budget=5))

    def draw():
        return sample_latents(
            model, make_sampler(sampler, STEPS), noise, labels, cfg_scale=4.0, cfg_channels="3", cache=cache
        )

    found = draw()
    with by_the_loop(monkeypatch):
        check((found, cache.trace), (draw(), cache.trace))


def test_half_precision_is_within_its_rounding(monkeypatch):
    """A model of 16 bits is followed in float32, so that a short run is nearer to the wide one than the loop is."""
    manager = CacheManager(correction=AdaCorrection(budget=8))
    wide = sample(tiny_dit(), STEPS, cache=manager)
    (short, _), (loop, _) = both_ways(monkeypatch, tiny_dit().bfloat16(), manager)
    missed, allowed = (float((x - wide).square().mean().sqrt()) for x in (short, loop))
    assert 0 < missed < 1.2 * allowed


@pytest.mark.parametrize("sampler", ["ddim:eta=0.5", "ddim:clip=true", "ddpm", "lms"])
def test_what_is_not_linear_goes_through_the_loop(monkeypatch, model, sampler):
    def fail(run, make):
        raise AssertionError("asked for a short run")

    monkeypatch.setattr(CorrectedRun, "shorten", fail)
    sample(model, 8, cache=CacheManager(correction=AdaCorrection()), sampler=sampler)


def test_hooks_on_the_model_are_told_of_every_step(model):
    steps, manager = [], CacheManager(correction=AdaCorrection(budget=5))
    expected = sample(model, STEPS, cache=manager)
    handle = model.register_forward_pre_hook(lambda *_: steps.append(model.cache.step))
    found = sample(model, STEPS, cache=manager)
    handle.remove()
    assert set(steps) == set(range(STEPS))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


# -------------------------------------------------------------------------------------------- operations


@pytest.mark.skipif(torch.__version__ < "2.7", reason="another kernel of attention there, which counts as less")
def test_few_operations_are_dispatched_beside_the_blocks(monkeypatch):
    """4 images, guidance, the shipped profile: bars for steps that are skipped, taken again, or computed."""
    pipe = load(ModelOptions(device="cpu", offline=True))
    cache, operations, events = with_profile(CacheManager.of(None, ""), pipe, "auto"), Operations(), []

    def record(owner, name):
        original = getattr(owner, name)

        def call(*arguments):
            before = operations.total
            result = original(*arguments)
            events.append((name, operations.total - before, len(result)))
            return result

        monkeypatch.setattr(owner, name, call)

    record(Outside, "walk")  # gives the states after so many steps
    record(GateSumStore, "predict")
    steps, total = [], 0

    def observe(step, x, manager):
        nonlocal total
        steps.append((operations.total - total, events.copy()))
        total = operations.total
        events.clear()

    with operations:
        pipe.sample(5, np.arange(4), torch.arange(4), cache, observe=observe, stop=28)
    with Operations() as blocks, torch.no_grad():
        x, c = torch.zeros(4, *pipe.model.pos_embed.shape[1:]), torch.zeros(4, pipe.model.hidden_size)
        for block in pipe.model.blocks:
            x = block(x, c)
    halves = cache.trace.executed[1:28, 0, 0, 0].sum(axis=1)
    assert set(halves) == {0.0, 1.0, 2.0}
    assert cache.trace.rewound > 4 * 28
    for (spent, happened), computed in zip(steps[1:], halves, strict=True):
        walks = [(own, count) for name, own, count in happened if name == "walk"]
        if not computed:  # the first of an interval takes all of them
            assert spent <= BAR * sum(count for _, count in walks)
            continue
        last, _ = walks.pop()  # the computed step itself
        again = sum(own for _, own, _ in happened) - last
        assert again <= BAR * sum(count for _, count in walks)
        assert spent - again <= 1.25 * blocks.total
