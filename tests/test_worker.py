"""worker.py: batches against single runs, images made again, the stop at a signal, writing behind, the plan."""

import errno
import signal
import threading
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toy import Clock, tiny_dit

import pipeline
import runtime
from adacorr import AdaCorrection, CacheManager, make_policy
from adacorr.command import Failure
from checkpoint import Checkpoint
from diffusion import make_sampler
from fid_run import worker
from fid_run.worker import Sampling, plan, written_behind
from pipeline import Pipeline
from runtime import Interrupted, Signals

SEED, STEPS, LONG = 11, 10, 30  # LONG: seconds after which a test that waits has failed
LABELS = np.array([3, 0, 4, 1, 0, 2])
CPU = torch.device("cpu")
CACHES = {
    "uncached": lambda: None,
    "interval": lambda: CacheManager(make_policy("interval:every=2")),
    "adacorr": lambda: CacheManager(correction=AdaCorrection(gamma=0.2)),
}


def make_pipe(sampler="ddim", steps=STEPS, cfg_scale=1.5, **options):
    model = tiny_dit(**options)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    source = Checkpoint(weights, model.config, Path("toy.safetensors"), "toy", "flat", None)
    return Pipeline(model, make_sampler(sampler, steps), None, source, cfg_scale, "all", CPU)


@pytest.fixture(scope="module")
def pipe():
    return make_pipe()


def make(pipe, cache=None, labels=LABELS, alone=True, signals=None, grace=0.0):
    return Sampling(pipe, cache, SEED, labels, alone, False, signals or Signals(), grace)


def sums(lines):
    """Of every number of the lines of a batch, and the most bytes."""
    names = ("flops", "uncached_flops", "hits", "evaluations", "fallbacks")
    return {name: round(sum(line[name] for line in lines)) for name in names}


def recomputed(lines):
    return [line["recomputed"] for line in lines if line["recomputed"]]


def whole(pipe, indices=range(6), cache=None, labels=LABELS):
    """Images made one by one by the pipeline itself, (n, H, W, 3)."""
    images = []
    for i in indices:
        label = None if labels is None else torch.tensor(labels[i : i + 1])
        images.append(pipe.decode(pipe.sample(SEED, np.array([i]), label, cache)))
    return torch.cat(images).numpy()


class Tampered:
    """A sampler whose `step` is followed by `after(i, x)`, which returns the state to go on with."""

    def __init__(self, sampler, after):
        self._sampler, self._after = sampler, after

    def __getattr__(self, name):
        return getattr(self._sampler, name)

    def fresh(self):
        return Tampered(self._sampler.fresh(), self._after)

    linear = None  # what `after` does is not

    def step(self, i, x, out, noise=None):
        return self._after(i, self._sampler.step(i, x, out, noise))


def tamper(pipe, after):
    return replace(pipe, sampler=Tampered(pipe.sampler, after))


# ------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("name", CACHES)
def test_alone_an_image_is_the_same_in_every_batch_and_order(name, sampler):
    pipe, cache = make_pipe(sampler), CACHES[name]()
    expected = whole(pipe, cache=cache)
    assert len(np.unique(expected.reshape(6, -1), axis=0)) == 6
    sampling = make(pipe, cache)
    for batches in ([[0], [1], [2], [3], [4], [5]], [[0, 1], [2, 3], [4, 5]], [[5, 0, 3], [4, 2, 1]]):
        for batch in map(np.array, batches):
            images, lines = sampling.batch(batch)
            assert images.dtype == np.uint8
            assert images.tobytes() == expected[batch].tobytes()
            assert [line["index"] for line in lines] == batch.tolist()
            assert recomputed(lines) == []
            numbers = {"flops", "uncached_flops", "hits", "evaluations", "fallbacks", "cache_bytes"} if cache else set()
            assert all(set(line) == {"index", "seconds", "recomputed", *numbers} for line in lines)
            assert all(line["seconds"] > 0 for line in lines)


# ------------------------------------------------------------------------------------------- lines of the log


@pytest.mark.parametrize("alone", [True, False])
def test_hits_by_hand(pipe, alone):
    # Every second step, counted from the last, and the first: 0, 1, 3, 5, 7, 9, so that 4 of 10 steps are hits, in
    # 3 layers with 2 branches of 2 halves of 3 images.
    sampling = make(pipe, CACHES["interval"](), alone=alone)
    for _ in range(2):  # a second batch starts at zero
        total = sums(sampling.batch(np.array([3, 0, 1]))[1])
        assert (total["hits"], total["evaluations"]) == (4 * 3 * 2 * 2 * 3, 10 * 3 * 2 * 2 * 3)
        assert total["uncached_flops"] == sum(pipe.model.branch_flops()) * 10 * 3 * 2 * 3
        assert total["fallbacks"] == 0


@pytest.mark.parametrize("name", ["interval", "adacorr"])
def test_alone_the_line_of_an_image_is_that_of_its_single_run(pipe, name):
    cache, indices = CACHES[name](), np.array([3, 0, 1])
    _, lines = make(pipe, cache).batch(indices)
    for i, line in zip(indices, lines, strict=True):
        whole(pipe, [i], cache)
        trace = cache.trace
        assert (line["flops"], line["uncached_flops"]) == (trace.flops, trace.uncached_flops)
        assert (line["hits"], line["evaluations"]) == (round(trace.hit_rate * trace.executed.size), trace.executed.size)
        assert 0 < line["hits"] < line["evaluations"]
        assert line["cache_bytes"] == cache.bytes > 0


def test_together_the_cache_holds_all_images_at_once(pipe):
    cache = CACHES["adacorr"]()
    whole(pipe, [3], cache)
    one = cache.bytes
    _, lines = make(pipe, cache, alone=False).batch(np.array([3, 0, 1]))
    assert [line["cache_bytes"] for line in lines] == [cache.bytes] * 3
    assert cache.bytes > 2 * one
    assert sums(lines)["flops"] == cache.trace.flops


def test_fallbacks_are_summed_over_the_images(pipe):
    cache = CACHES["adacorr"]()

    def after(step, x):
        cache.trace.fallbacks += step == 4  # once in each of the two runs
        return x

    assert sums(make(tamper(pipe, after), cache).batch(np.array([0, 1]))[1])["fallbacks"] == 2


# ------------------------------------------------------------------------------------ images that are made again


@contextmanager
def overflowing(model, faults, value=np.nan):
    """Within, the model's output for an image is lost in a step: {index: step}. Labels tell images apart."""
    times, labels = make_sampler("ddim", STEPS).timesteps, {int(LABELS[i]): step for i, step in faults.items()}
    assert len(labels) == len(faults)

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


def fault(index, step):
    return {
        "index": index,
        "seed": SEED,
        "label": int(LABELS[index]),
        "after": step if step == "the VAE" else f"step {step}",
    }


@pytest.mark.parametrize(
    ("name", "step", "value"),
    [("uncached", 0, np.nan), ("interval", 4, np.inf), ("adacorr", 4, np.nan), ("adacorr", STEPS - 1, -np.inf)],
)
@pytest.mark.parametrize("alone", [True, False])
def test_an_image_that_is_lost_is_made_again_in_float32_without_the_cache(pipe, name, alone, step, value):
    half = replace(pipe, model=make_pipe().model.to(torch.bfloat16))
    sampling, indices = make(half, CACHES[name](), alone=alone), np.array([0, 2, 3])
    with overflowing(half.model, {}):  # a hook on the model, as below: without one steps may be rounded otherwise
        before, lines = sampling.batch(indices)
    assert recomputed(lines) == []
    with overflowing(half.model, {2: step}, value):
        after, lines = sampling.batch(indices)
    assert recomputed(lines) == [fault(2, step)]
    assert (after[[0, 2]] == before[[0, 2]]).all()
    exact = whole(pipe, [2])[0]
    assert (after[1] == exact).all()
    assert (before[1] != exact).any()


def test_an_image_that_a_block_loses_is_made_again(pipe):
    half, indices, calls = replace(pipe, model=make_pipe().model), np.array([0, 2, 3]), []

    def lose(block, args, out):
        calls.append(len(out))
        if len(calls) == 1:
            out[1, 0, 0] = np.nan
        return out

    sampling = make(half, CACHES["adacorr"](), alone=False)
    before, _ = sampling.batch(indices)
    half.model.blocks[1].register_forward_hook(lose)  # no hook on the model: the run takes its steps by itself
    after, lines = sampling.batch(indices)
    assert recomputed(lines) == [fault(2, 0)]
    assert (after[1] == whole(pipe, [2])[0]).all()
    assert (after[[0, 2]] == before[[0, 2]]).all()


def test_each_image_has_a_step_of_its_own(pipe):
    half = replace(pipe, model=make_pipe().model)
    with overflowing(half.model, {0: 7, 2: 1}):
        for alone in (True, False):
            images, lines = make(half, alone=alone).batch(np.array([2, 3, 0]))
            assert recomputed(lines) == [fault(2, 1), fault(0, 7)]
            assert images.tobytes() == whole(pipe, [2, 3, 0]).tobytes()


class Decoder:
    """A VAE whose pixels have no value in some of its calls."""

    def __init__(self, broken):
        self.calls, self.broken = 0, broken

    def decode(self, z):
        self.calls += 1
        lost = torch.full_like(z, self.calls in self.broken, dtype=torch.bool)
        return SimpleNamespace(sample=torch.where(lost, torch.nan, z * pipeline.VAE_SCALE))


@pytest.mark.parametrize("alone", [True, False])
def test_pixels_of_the_vae_that_have_no_value_are_never_written(pipe, alone):
    """They would be 0: the image is made again, and if that does not help, the run fails."""
    indices, expected = np.array([0, 2, 3]), whole(pipe, [0, 2, 3])
    images, lines = make(replace(pipe, vae=Decoder({2})), alone=alone).batch(indices)
    assert recomputed(lines) == [fault(2, "the VAE")]
    assert np.abs(images.astype(int) - expected).max() <= 1
    with pytest.raises(Failure, match="image 2 .* is infinite or undefined after the VAE, and also"):
        make(replace(pipe, vae=Decoder({2, 3})), alone=alone).batch(indices)


def test_a_state_that_recovers_is_made_again_too(pipe):
    """What comes after a step without a number is no image of this noise, even if every number looks fine."""
    lost = []

    def after(i, x):
        if i == 3 and not lost:
            lost.append(x)
            return torch.full_like(x, np.inf)
        return torch.zeros_like(x) if i == 4 and len(lost) == 1 and not lost.append(x) else x

    images, lines = make(tamper(pipe, after)).batch(np.array([5]))
    assert recomputed(lines) == [fault(5, 3)]
    assert images.tobytes() == whole(pipe, [5]).tobytes()


def test_the_model_is_loaded_once_for_all_that_is_made_again(pipe, monkeypatch):
    loaded, build = [], worker.build_model
    monkeypatch.setattr(worker, "build_model", lambda source: loaded.append(source) or build(source))
    half = replace(pipe, model=make_pipe().model)
    sampling = make(half)
    sampling.batch(np.array([1]))
    assert loaded == []
    with overflowing(half.model, {0: 2, 2: 2}):
        sampling.batch(np.array([0, 2]))
        sampling.batch(np.array([2]))
    assert loaded == [pipe.checkpoint]


@pytest.mark.parametrize(("labels", "shown"), [(LABELS, "label 4"), (None, "label None")])
def test_an_image_that_stays_lost_fails_the_run(labels, shown):
    pipe = make_pipe() if labels is not None else make_pipe(cfg_scale=1.0, num_classes=0)
    broken = tamper(pipe, lambda i, x: x * np.nan if i == 6 else x)
    with pytest.raises(Failure, match=f"image 2 .seed 11, {shown}. is infinite or undefined after step 6") as error:
        make(broken, labels=labels).batch(np.array([2]))
    assert "uncached in fp32" in str(error.value)
    assert "\n" not in str(error.value)


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
            sampling.batch(np.array([0]))
        assert seen == [given] * STEPS + [("highest", False)] * STEPS
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == given
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


# ------------------------------------------------------------------------------------------------- the stop


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(runtime, "time", clock)
    monkeypatch.setattr(worker, "time", clock)
    return clock


def stopped(pipe, clock, at, grace, images=1, warned_seconds=1.0, batches=1):
    """(steps done, images made) if SIGTERM comes in step number `at`; steps take a second."""
    steps = 0

    def after(i, x):
        nonlocal steps
        steps += 1
        clock.now += warned_seconds if steps > at else 1.0
        if steps == at:
            signal.raise_signal(signal.SIGTERM)
        return x

    made = 0

    def job():
        nonlocal made
        with Signals() as signals, signals.deferred():
            sampling = make(tamper(pipe, after), signals=signals, grace=grace)
            for _ in range(batches):
                made += len(sampling.batch(np.arange(images))[1])

    with pytest.raises(Interrupted, match="SIGTERM"):
        job()
    return steps, made


@pytest.mark.parametrize(
    ("at", "grace", "images", "steps", "made"),
    [
        (4, 0.0, 1, 4, 0),  # at once
        (4, 5.5, 1, 4, 0),  # 6 s to come
        (4, 6.5, 1, 10, 1),
        (10, 0.5, 1, 10, 1),  # in the last step
        (4, 6.5, 2, 4, 0),  # 6 s of this image and 10 s of the next
        (4, 16.5, 2, 20, 2),
        (14, 6.5, 2, 20, 2),
        (14, 5.5, 2, 14, 1),  # the first was through
    ],
)
def test_a_batch_is_finished_if_that_fits_into_the_grace(pipe, clock, at, grace, images, steps, made):
    assert stopped(pipe, clock, at, grace, images) == (steps, made)


def test_a_batch_that_becomes_slow_is_dropped_after_all(pipe, clock):
    # Two steps of 2 s after the warning: 4 s are spent of 6.5, and 4 steps of 8 s / 6 on average are yet to come.
    assert stopped(pipe, clock, at=4, grace=6.5, warned_seconds=2.0) == (5, 0)
    assert stopped(pipe, clock, at=4, grace=8.5, warned_seconds=1.2) == (10, 1)


def test_what_comes_after_the_last_step_is_known_from_the_batch_before(pipe, clock, monkeypatch):
    """On a GPU the host is through with the steps long before they are done."""
    decode = Pipeline.decode

    def slow(self, x):
        clock.now += 30.0
        return decode(self, x)

    monkeypatch.setattr(Pipeline, "decode", slow)
    assert stopped(pipe, clock, at=14, grace=20.0, batches=2) == (14, 1)
    assert stopped(pipe, clock, at=14, grace=36.5, batches=2) == (20, 2)


# ------------------------------------------------------------------------------------------ writing and the plan


class Disk:
    """Notes what is written; each write waits for a `release` of the gate."""

    def __init__(self, fail=(), free=1000):
        self.written, self.fail, self.gate = [], fail, threading.Semaphore(free)

    def write(self, number, word):
        assert self.gate.acquire(timeout=LONG)
        if number in self.fail:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.written.append((number, word))

    def job(self, count, error=None):
        """Submit batches 0..count-1, then raise the error; returns how many were taken."""
        self.taken = 0
        with written_behind(self.write) as submit:
            for number in range(count):
                submit(number, "word")
                self.taken += 1
            threading.Timer(0.1, self.gate.release).start()
            if error is not None:
                raise error


def test_the_sampler_does_not_wait_for_the_disk_unless_it_is_ahead():
    disk = Disk(free=0)
    with written_behind(disk.write) as submit:
        submit(0, "a")
        assert disk.written == []  # nothing is on disk yet, and here we are
        second = threading.Thread(target=submit, args=(1, "b"), daemon=True)
        second.start()
        second.join(0.1)
        assert second.is_alive()
        disk.gate.release()
        second.join(LONG)
        assert not second.is_alive()
        disk.gate.release()
    assert disk.written == [(0, "a"), (1, "b")]


@pytest.mark.parametrize("error", [KeyError(), KeyboardInterrupt(), Interrupted(signal.SIGTERM)], ids=repr)
@pytest.mark.parametrize("fail", [(), {0}], ids=["whole", "broken"])
def test_an_error_of_the_sampler_comes_first_and_what_was_made_is_on_disk(error, fail):
    disk = Disk(fail, free=0)
    with pytest.raises(type(error)):
        disk.job(1, error)
    assert disk.written == ([] if fail else [(0, "word")])


@pytest.mark.parametrize(("fail", "count"), [(1, 50), (2, 3)], ids=["at the next batch", "at the end"])
def test_an_error_in_writing_stops_the_sampler(fail, count):
    disk = Disk({fail})
    with pytest.raises(OSError, match="No space left"):
        disk.job(count)
    assert disk.taken <= fail + 2
    assert disk.written[:fail] == [(number, "word") for number in range(fail)]


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
