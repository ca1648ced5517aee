"""worker.py: batches against single runs, images made again, the stop at a signal, statistics, the plan."""

import signal
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toy import tiny_dit

import pipeline
import runtime
from adacorr import AdaCorrection, CacheManager, make_policy
from adacorr.command import Failure
from checkpoint import Checkpoint
from diffusion import make_sampler
from fid_run import worker
from fid_run.worker import Sampling, plan, statistics
from pipeline import Pipeline
from runtime import Interrupted, Signals

SEED, STEPS = 11, 10
LABELS = np.array([3, 0, 4, 1, 0, 2])
CPU = torch.device("cpu")
CACHES = {
    "uncached": lambda: None,
    "interval": lambda: CacheManager(make_policy("interval:every=2")),
    "adacorr": lambda: CacheManager(correction=AdaCorrection(gamma=0.2)),
}


def make_pipe(sampler="ddim", cfg_scale=1.5, **options):
    model = tiny_dit(**options)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    source = Checkpoint(weights, model.config, Path("toy.safetensors"), "toy", "flat", None)
    return Pipeline(model, make_sampler(sampler, STEPS), None, source, cfg_scale, "all", CPU)


@pytest.fixture(scope="module")
def pipe():
    return make_pipe()


def make(pipe, cache=None, labels=LABELS, signals=None):
    return Sampling(pipe, cache, SEED, labels, False, signals or Signals())


def batch(sampling, indices):
    """Images (n, H, W, 3), and the counts of each."""
    images, counts = zip(*sampling.batch(np.array(indices)), strict=True)
    return np.stack(images), counts


def again(counts):
    return [i for i, own in enumerate(counts) if own.get("made_again")]


def whole(pipe, indices=range(6), cache=None, labels=LABELS):
    """Images made one by one by the pipeline itself, (n, H, W, 3)."""
    images = []
    for i in indices:
        label = None if labels is None else torch.tensor(labels[i : i + 1])
        images.append(pipe.decode(pipe.sample(SEED, np.array([i]), label, cache)))
    return torch.cat(images).numpy()


def tamper(pipe, after):
    """The pipeline with a sampler whose `step` is followed by `after(i, x)`, which returns the state to go on with."""

    class Tampered(type(pipe.sampler)):
        linear = None  # what `after` does is not

        def step(self, i, x, *rest):
            return after(i, super().step(i, x, *rest))

    sampler = pipe.sampler.fresh()
    sampler.__class__ = Tampered
    return replace(pipe, sampler=sampler)


# ------------------------------------------------------------------------------------- batches and their counts


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("name", CACHES)
def test_alone_an_image_is_the_same_in_every_order(name, sampler):
    pipe, cache = make_pipe(sampler), CACHES[name]()
    expected = whole(pipe, cache=cache)
    assert len(np.unique(expected.reshape(6, -1), axis=0)) == 6
    sampling, own = make(pipe, cache), {}
    for indices in (range(6), [5, 0, 3, 4, 2, 1]):
        for i in indices:
            images, counts = batch(sampling, [i])
            assert images.dtype == np.uint8
            assert images.tobytes() == expected[i].tobytes()
            assert own.setdefault(i, counts) == counts
            assert again(counts) == []


@pytest.mark.parametrize("name", ["interval", "adacorr"])
def test_counts_are_those_of_the_single_run(pipe, name):
    cache = CACHES[name]()
    for i in (3, 0):
        (_, (own,)), trace = batch(make(pipe, cache), [i]), cache.trace
        assert (own["flops"], own["uncached_flops"]) == (trace.flops, trace.uncached_flops)
        assert (own["hits"], own["evaluations"]) == (round(trace.hit_rate * trace.executed.size), trace.executed.size)
        assert 0 < own["hits"] < own["evaluations"]
        assert own["cache_bytes"] == cache.bytes > 0


def test_statistics_by_hand(pipe):
    # Every second step, counted from the last, and the first: 0, 1, 3, 5, 7, 9, so that 4 of 10 steps are hits, in
    # 3 layers with 2 branches of 2 halves.
    sampling = make(pipe, CACHES["interval"]())
    counts = [dict(own) for indices in ([3, 0, 1], [2]) for own in batch(sampling, indices)[1]]
    assert all(own["hits"] == 4 * 3 * 2 * 2 for own in counts)
    assert all(own["uncached_flops"] == sum(pipe.model.branch_flops()) * 10 * 3 * 2 for own in counts)
    counts[1] |= {"made_again": True, "fallbacks": 2}
    totals = statistics(dict(enumerate(counts)))
    assert (totals["images"], totals["hit_rate"], totals["made_again"], totals["fallbacks"]) == (4, 0.4, [1], 2)
    assert totals["compute"] == counts[0]["flops"] / counts[0]["uncached_flops"]
    assert totals["saved_flops"] == round(4 * (counts[0]["uncached_flops"] - counts[0]["flops"]))
    assert totals["cache_bytes"] == counts[0]["cache_bytes"] > 2 * counts[3]["cache_bytes"]  # of three images at once
    uncached = statistics({0: {}, 1: {}})
    assert (uncached["images"], uncached["compute"], uncached["hit_rate"], uncached["saved_flops"]) == (2, 1.0, 0.0, 0)


# ------------------------------------------------------------------------------------ images that are made again


@contextmanager
def overflowing(model, faults, value=np.nan):
    """Within, the model's output for an image is lost in a step: {index: step}. Labels tell images apart."""
    times, labels = make_sampler("ddim", STEPS).timesteps, {int(LABELS[i]): step for i, step in faults.items()}

    def hook(_, args, out):
        _, t, y = args
        for row, label in enumerate(y[: len(y) // 2].tolist()):
            if label in labels and t[0] == times[labels[label]]:
                out[row, 1, 2, 3] = value
        return out

    handle = model.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("name", "step", "value"),
    [("uncached", 0, np.nan), ("interval", 4, np.inf), ("adacorr", 4, np.nan), ("adacorr", STEPS - 1, -np.inf)],
)
def test_an_image_that_is_lost_is_made_again_in_float32_without_the_cache(pipe, name, step, value):
    half = replace(pipe, model=make_pipe().model.to(torch.bfloat16))
    sampling, indices = make(half, CACHES[name]()), [0, 2, 3]
    with overflowing(half.model, {}):  # a hook on the model, as below: without one steps may be rounded otherwise
        before, counts = batch(sampling, indices)
    assert again(counts) == []
    with overflowing(half.model, {2: step}, value):
        after, counts = batch(sampling, indices)
    assert again(counts) == [1]
    assert (after[[0, 2]] == before[[0, 2]]).all()
    assert (after[1] == whole(pipe, [2])[0]).all()
    assert (before[1] != after[1]).any()


def test_an_image_that_a_block_loses_is_made_again(pipe):
    half, indices, calls = replace(pipe, model=make_pipe().model), [0, 2, 3], []

    def lose(block, args, out):
        calls.append(len(out))
        if len(calls) == 1:
            out[1, 0, 0] = np.nan
        return out

    sampling = make(half, CACHES["adacorr"]())
    before, _ = batch(sampling, indices)
    half.model.blocks[1].register_forward_hook(lose)  # no hook on the model: the run takes its steps by itself
    after, counts = batch(sampling, indices)
    assert again(counts) == [1]
    assert (after[1] == whole(pipe, [2])[0]).all()
    assert (after[[0, 2]] == before[[0, 2]]).all()


class Decoder:
    """A VAE whose pixels have no value in some of its calls."""

    def __init__(self, broken):
        self.calls, self.broken = 0, broken

    def decode(self, z):
        self.calls += 1
        lost = torch.full_like(z, self.calls in self.broken, dtype=torch.bool)
        return SimpleNamespace(sample=torch.where(lost, torch.nan, z * pipeline.VAE_SCALE))


def test_pixels_of_the_vae_that_have_no_value_are_never_written(pipe):
    """They would be 0: the image is made again, and if that does not help, the run fails."""
    indices, expected = [0, 2, 3], whole(pipe, [0, 2, 3])
    images, counts = batch(make(replace(pipe, vae=Decoder({2}))), indices)
    assert again(counts) == [1]
    assert np.abs(images.astype(int) - expected).max() <= 1
    with pytest.raises(Failure, match="image 2 .* is infinite or undefined, also when"):
        batch(make(replace(pipe, vae=Decoder({2, 3}))), indices)


def test_a_state_that_recovers_is_made_again_too(pipe):
    """What comes after a step without a number is no image of this noise, even if every number looks fine."""
    lost = []

    def after(i, x):
        if i == 3 and not lost:
            lost.append(x)
            return torch.full_like(x, np.inf)
        return torch.zeros_like(x) if i == 4 and len(lost) == 1 and not lost.append(x) else x

    images, counts = batch(make(tamper(pipe, after)), [5])
    assert again(counts) == [0]
    assert images.tobytes() == whole(pipe, [5]).tobytes()


def test_the_model_is_loaded_once_for_all_that_is_made_again(pipe, monkeypatch):
    loaded, build = [], worker.build_model
    monkeypatch.setattr(worker, "build_model", lambda source: loaded.append(source) or build(source))
    half = replace(pipe, model=make_pipe().model)
    sampling = make(half)
    batch(sampling, [1])
    assert loaded == []
    with overflowing(half.model, {0: 7, 2: 2}):
        assert again(batch(sampling, [3, 0, 2])[1]) == [1, 2]
        batch(sampling, [2])
    assert loaded == [pipe.checkpoint]


@pytest.mark.parametrize(("labels", "shown"), [(LABELS, "label 4"), (None, "label None")])
def test_an_image_that_stays_lost_fails_the_run(labels, shown):
    pipe = make_pipe() if labels is not None else make_pipe(cfg_scale=1.0, num_classes=0)
    broken = tamper(pipe, lambda i, x: x * np.nan if i == 6 else x)
    with pytest.raises(Failure, match=f"image 2 .seed 11, {shown}. is infinite or undefined, also .* in fp32"):
        batch(make(broken, labels=labels), [2])


@pytest.mark.parametrize("tf32", [True, False])
@pytest.mark.parametrize("persistent", [True, False])
def test_what_is_made_again_is_rounded_as_float32(pipe, tf32, persistent):
    seen = []

    def after(i, x):
        seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        lost = i == 2 and (persistent or len(seen) <= STEPS)
        return x * np.nan if lost else x

    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    sampling = make(tamper(pipe, after))
    sampling.tf32 = tf32
    given = ("high" if tf32 else "highest", tf32)
    try:
        runtime.allow_tf32(tf32)
        with pytest.raises(Failure) if persistent else nullcontext():
            batch(sampling, [0])
        assert seen == [given] * STEPS + [("highest", False)] * STEPS
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == given
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


# ------------------------------------------------------------------------------------------ the stop and the plan


@pytest.mark.parametrize("name", CACHES)
def test_a_signal_ends_a_batch_at_its_next_step(pipe, name):
    steps = []

    def after(i, x):
        steps.append(i)
        if i == 3:
            signal.raise_signal(signal.SIGTERM)
        return x

    with pytest.raises(Interrupted, match="SIGTERM"), Signals() as signals, signals.deferred():
        batch(make(tamper(pipe, after), CACHES[name](), signals=signals), [0, 1])
    assert max(steps) == 3


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_every_missing_image_is_planned_once(world):
    for batch, count in product((1, 4, 32), (0, 1, 2, 5, 7, 8, 9, 64, 100)):
        missing = np.sort(np.random.default_rng(count).permutation(1000)[:count])
        plans = [plan(missing, batch, rank, world) for rank in range(world)]
        batches = [b for own in plans for b in own]
        assert sorted(i for b in batches for i in b.tolist()) == missing.tolist()
        assert all(1 <= len(b) <= batch for b in batches)
        loads = [sum(map(len, own)) for own in plans]
        assert max(loads) - min(loads) <= batch
        assert max(loads) <= max(batch, -(-count // world)) or len(batches) > world
        for b in batches:  # neighbours among those that are missing
            start = int(np.searchsorted(missing, b[0]))
            assert b.tolist() == missing[start : start + len(b)].tolist()


def test_plans_by_hand():
    missing = np.arange(100, 110)
    plans = [[b.tolist() for b in plan(missing, 2, rank, 2)] for rank in (0, 1)]
    assert plans == [[[100, 101], [104, 105], [108, 109]], [[102, 103], [106, 107]]]
    plans = [[b.tolist() for b in plan(missing[:5], 32, rank, 2)] for rank in (0, 1)]
    assert plans == [[[100, 101, 102]], [[103, 104]]]  # not all of them on one rank
