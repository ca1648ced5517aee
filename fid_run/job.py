"""One job of sample_ddp.py: rank 0 sets it up and finishes it, every rank samples its share."""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import numpy as np
import torch

import pipeline
import profiles
import runtime
from adacorr import CacheManager
from adacorr.command import Failure
from adacorr.compiled import compile_blocks
from adacorr.profile import Profile, save_profile
from checkpoint import decoded_size
from fid_run.images import Store, pack
from fid_run.labels import make_labels
from fid_run.protocol import canonical, describe, differences, folder_name, run_id
from fid_run.record import WAYS_OUT, RunFolder, RunMismatch
from fid_run.worker import Sampling, plan, statistics
from pipeline import Pipeline
from ranks import Ranks, started_again
from runtime import Signals

READY = timedelta(minutes=3)  # for all ranks to see the folder of rank 0 and to lock theirs


@dataclass(frozen=True)
class Job:
    """What rank 0 found out and every rank works by.

    missing (m,) indices; labels (N,) int64 or None; profile: what AdaCorrection knows of the model, or None.
    """

    args: argparse.Namespace
    folder: RunFolder
    store: Store
    missing: np.ndarray
    labels: np.ndarray | None
    profile: Profile | None


def run(args: argparse.Namespace | None, ranks: Ranks) -> None:
    """The whole job on this rank; other ranks than 0 take `args` from there.

    ValueError or OSError for a mistake, Failure for what broke later, LeaderFailed if rank 0 has said why.
    """
    signals, leads = Signals(), ranks.rank == 0
    with ExitStack() as stack:
        ranks.open()
        job = None
        if leads:
            stack.enter_context(signals)
            job, pipe, cache = prepare(args, ranks, stack)
        # The others wait in C++, where no handler of Python's runs: their signals are still the system's.
        job = ranks.from_leader(job)
        if job is None:
            ranks.close()
            return
        if leads:
            stack.enter_context(session(job))
        else:
            set_up(job.args, ranks)
            stack.enter_context(job.folder.join(ranks.rank))
        ranks.barrier(READY)
        ranks.close()  # there is no collective from here on: ranks may lag, fail or end on their own
        if not leads:
            stack.enter_context(signals)
            pipe, cache = load(job.args)
            if job.profile is not None:
                cache = cache.knowing(job.profile)
            # Another node may have another file in the place of a checkpoint or a VAE.
            if lines := differences(job.folder.record["protocol"], describe(job.args, pipe, cache)):
                raise ValueError(f"process {ranks.rank} loads other files than process 0: {'; '.join(lines)}")
        work(job, ranks, signals, pipe, cache)
        if leads:
            job.folder.await_ranks(ranks.world)
            finish(job)


def set_up(args: argparse.Namespace, ranks: Ranks) -> None:
    """Device, threads and kernels, before the first of them runs; fills in the defaults that depend on the device."""
    device = ranks.device(args.device)
    args.device = str(device)
    if args.deterministic is None:
        args.deterministic = device.type == "cpu"
    args.tf32 = args.tf32 and device.type == "cuda"
    if device.type == "cpu":
        if args.deterministic:
            args.threads = args.threads or 1
        if args.threads is not None:
            torch.set_num_threads(args.threads)
    else:
        runtime.allow_tf32(args.tf32)
        if args.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)


def load(args: argparse.Namespace) -> tuple[Pipeline, CacheManager | None]:
    """Model, sampler and cache of this process; ValueError or OSError for a mistake."""
    cache = pipeline.make_cache(args)
    pipe = pipeline.load(pipeline.ModelOptions.of(args))
    if args.compile:
        compile_blocks(pipe.model)
    return pipe, cache


def work(job: Job, ranks: Ranks, signals: Signals, pipe: Pipeline, cache: CacheManager | None) -> None:
    """This rank's share: sample its batches and write them. Failure for what breaks it."""
    args, folder, began = job.args, job.folder, time.perf_counter()
    batches = plan(job.missing, 1 if args.deterministic else args.per_proc_batch_size, ranks.rank, ranks.world)
    sampling = Sampling(pipe, cache, args.seed, job.labels, args.tf32, signals)
    count, line = sum(map(len, batches)), partial(say, "progress")
    progress = runtime.Progress(count, "image", shown=ranks.rank == 0, line=line)

    def write(indices: np.ndarray, made: list[tuple[np.ndarray, dict[str, Any]]]) -> None:
        if not folder.is_current():
            raise Failure(f"{folder.path} was deleted, or its record changed, while the job was at work")
        for index, (image, counts) in zip(indices.tolist(), made, strict=True):
            job.store.write(index, image, None if job.labels is None else int(job.labels[index]), counts)

    try:
        # A batch is written while the next one is sampled. Signals end a batch at its next step, but are raised only
        # when all finished batches are written.
        with progress, signals.deferred(), ThreadPoolExecutor(1) as writer:
            written = writer.submit(lambda: None)
            for indices in batches:
                signals.check()
                made = sampling.batch(indices)
                written.result()
                written = writer.submit(write, indices, made)
                progress.update(len(indices), f"{progress.rate:.3g} images/s a process")
            written.result()
    except torch.OutOfMemoryError as error:
        held = "" if cache is None else f" (the cache held {cache.bytes / 2**30:.2f} GiB)"
        raise Failure(
            f"--per-proc-batch-size {args.per_proc_batch_size} does not fit into the memory of {pipe.device}{held}: "
            "lower it, or give --cache-dtype bf16 or int8; finished images are kept"
        ) from error
    except OSError as error:
        raise Failure(f"{error}; finished images are kept, and the same command goes on from there") from error
    finally:
        own = {"images": progress.done, "seconds": round(time.perf_counter() - began, 3)}
        folder.record["sessions"][-1] |= own  # that of rank 0 is written at the end


# ---------------------------------------------------------------------------------------------- rank 0's part


def prepare(
    args: argparse.Namespace, ranks: Ranks, stack: ExitStack
) -> tuple[Job | None, Pipeline, CacheManager | None]:
    """All that comes before the first batch; no job if the run is complete. The folder is locked until the stack ends.

    ValueError or OSError for a mistake, and for a folder that holds another run or is in use.
    """
    count = args.num_fid_samples
    if args.overwrite and started_again():
        note("started again by torchrun: --overwrite was for the first start, so what is there is kept")
        args.overwrite = False
    set_up(args, ranks)
    profiles.check_calibrate(args.calibrate, pipeline.make_cache(args))
    pipe, cache = load(args)
    pipe.check_decodes()
    labels = make_labels(args.labels, args.seed, count, pipe.model.num_classes)
    folder = RunFolder(args.sample_dir / folder_name(args, pipe, cache))
    stack.enter_context(folder.lock(note))
    folder.tidy()
    # A run goes on with the profile that it began with, wherever it does.
    measured = args.calibrate == "auto" or args.calibrate.isdecimal()
    own = measured and not args.overwrite and folder.profile.is_file()
    try:
        cache = profiles.with_profile(cache, pipe, str(folder.profile) if own else args.calibrate, note)
    except ValueError as error:
        if own:
            raise RunMismatch(f"{folder.path} holds another run ({error}); {WAYS_OUT}") from error
        raise
    protocol, environment = describe(args, pipe, cache), runtime.environment()
    if args.overwrite:
        folder.clear()
    elif record := folder.check(protocol):
        before = record["sessions"][-1]["environment"]
        for key in ("git", "torch", "device", "pillow"):
            if before.get(key) != environment[key]:
                note(f"{key} was {before.get(key)} in the session before and is {environment[key]} now")
    for name, value in protocol.items():
        say(name, canonical(value))
    say("processes", f"{ranks.world}, {1 if args.deterministic else args.per_proc_batch_size} images at once")
    say("folder", str(folder.path))
    if doubt := pipeline.caveat(pipe.sampler, cache):
        warn(doubt)
    store = Store(folder.images, run_id(protocol), pipe.image_size)
    found, unusable = store.scan(count, args.verify)
    for path, why in [*unusable.items()][:5]:
        note(f"made again: {path}: {why}")
    missing = np.setdiff1d(np.arange(count), np.fromiter(found, np.int64))
    say("images", f"{len(found)} of {count} are there, {len(missing)} to make")
    packed = folder.packed(store.run)
    if len(missing) == 0 and (args.no_pack or packed == count):
        say("complete", f"{folder.path if args.no_pack else folder.npz}; --verify reads all images again")
        return None, pipe, cache
    if packed > count and not args.no_pack:
        warn(f"{folder.npz} holds {packed} images and will be packed anew with the first {count}")
    session = {"count": count, "missing": len(missing), "processes": ranks.world, "preset": args.preset}
    session |= {"batch": args.per_proc_batch_size, "environment": environment}
    folder.begin(protocol, session)
    profile = None if cache is None else cache.profile
    if profile is not None:
        save_profile(folder.profile, profile)
    return Job(args, folder, store, missing, labels, profile), pipe, cache


@contextmanager
def session(job: Job) -> Iterator[None]:
    """Within, the session is open in the record, and an error that ends it is kept there. OSErrors become Failures."""
    try:
        yield
    except BaseException as error:
        why = " ".join(str(error).split()) or type(error).__name__
        with suppress(OSError):  # the exception matters more
            if job.folder.is_current():  # else somebody deleted the folder
                job.folder.end(why)
        if isinstance(error, OSError):
            raise Failure(why) from error
        raise


def finish(job: Job) -> None:
    """See that no image is missing, pack them, and close the session. Failure for one that is missing or damaged."""
    folder, store, count = job.folder, job.store, job.args.num_fid_samples
    found, _ = store.scan(count)
    if missing := count - len(found):
        raise Failure(f"{missing} of {count} images are missing in {folder.path}: run the command of the run again")
    npz = None
    if not job.args.no_pack:
        sha = pack(store.read(count), count, store.size, folder.npz)
        npz = {"count": count, "bytes": folder.npz.stat().st_size, "sha256": sha}
    images, seconds = (sum(s.get(key, 0) for s in folder.record["sessions"]) for key in ("images", "seconds"))
    totals = statistics(found) | {"images_per_second": images / seconds if images else None}  # of rank 0
    folder.end("complete", npz, totals)
    for name, value in totals.items():
        if value:
            say(name, f"{value:.6g}" if isinstance(value, float) else f"{value}")
    if totals["cache_bytes"] and totals["hit_rate"] == 0:
        warn("nothing was skipped: the method asked for every block of every step")
    say("finished", f"{folder.images}" if npz is None else f"{folder.npz}, sha256 {npz['sha256']}")


def store_of(folder: RunFolder, record: dict[str, Any]) -> Store:
    """The images of the run that a folder has this record of."""
    protocol = record["protocol"]
    return Store(folder.images, record["run_id"], decoded_size(protocol["model"], protocol["vae"]))


# -------------------------------------------------------------------------------------------- what is printed


def say(name: str, text: str) -> None:
    try:
        print(f"{name:18} {text}", flush=True)
    except OSError:  # whoever read it has left, or the log's disk is full, which is no reason to stop
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def note(text: str) -> None:
    say("note", text)


def warn(text: str) -> None:
    runtime.say(f"sample_ddp.py: warning: {text}")
