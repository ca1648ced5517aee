"""One job of sample_ddp.py: rank 0 sets it up and finishes it, every rank samples its share."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
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
from fid_run.images import Store, pack
from fid_run.labels import make_labels
from fid_run.presets import PRESETS
from fid_run.protocol import canonical, describe, folder_name, image_size, run_id
from fid_run.record import RunFolder, append, statistics
from fid_run.worker import Sampling, plan, written_behind
from pipeline import Pipeline
from ranks import PATIENCE, Ranks
from runtime import Interrupted, Signals

READY = timedelta(minutes=3)  # for all ranks to see the folder of rank 0 and to lock their logs


@dataclass(frozen=True)
class Job:
    """What rank 0 found out and every rank works by.

    missing (m,) indices; labels (N,) int64 or None; profile: what AdaCorrection knows of the model, or None.
    """

    args: argparse.Namespace
    path: Path
    run: str
    token: str
    session: int
    missing: np.ndarray
    labels: np.ndarray | None
    profile: Profile | None


def run(args: argparse.Namespace | None, ranks: Ranks) -> int:
    """The whole job on this rank -> exit code; other ranks than 0 take `args` from there.

    ValueError or OSError for a mistake, Failure for what broke later, LeaderFailed if rank 0 has said why.
    """
    signals = Signals()
    with ExitStack() as stack:
        ranks.open(torch.device("cpu"), PATIENCE)
        leader = Leader(args, ranks, stack) if ranks.rank == 0 else None
        if leader:
            stack.enter_context(signals)
        # The others wait in C++, where no handler of Python's runs: their signals are still the system's.
        job = ranks.from_leader(leader and leader.prepare)
        if job is None:
            ranks.close()
            return 0
        folder = RunFolder(job.path)
        if leader:
            stack.enter_context(leader.session())
        else:
            set_up(job.args, ranks)
            stack.enter_context(folder.join(job.token, ranks.rank))
        ranks.barrier(READY)
        ranks.close()  # there is no collective from here on: ranks may lag, fail or end on their own
        if not leader:
            stack.enter_context(signals)
        pipe, cache = (leader.pipe, leader.cache) if leader else load(job.args, job.profile)
        work(job, folder, ranks, signals, pipe, cache)
        if leader:
            leader.finish()
    return 0


def set_up(args: argparse.Namespace, ranks: Ranks) -> None:
    """Device, threads and kernels, before the first of them runs; fills in the defaults that depend on the device."""
    device = ranks.device(args.device)
    args.device = str(device)
    if args.deterministic is None:
        args.deterministic = device.type == "cpu"
    args.tf32 = args.tf32 and device.type == "cuda" and args.dtype == "fp32"
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


def load(args: argparse.Namespace, profile: Profile | None = None) -> tuple[Pipeline, CacheManager | None]:
    """Model, sampler and cache of this process; ValueError or OSError for a mistake."""
    cache = pipeline.make_cache(args)
    if profile is not None:
        cache = cache.knowing(profile)
    pipe = pipeline.load(pipeline.ModelOptions.of(args))
    if args.compile:
        compile_blocks(pipe.model)
    return pipe, cache


def work(
    job: Job, folder: RunFolder, ranks: Ranks, signals: Signals, pipe: Pipeline, cache: CacheManager | None
) -> None:
    """This rank's share: sample its batches, write them, keep its log. Failure for what breaks it."""
    args, log = job.args, folder.log(ranks.rank)
    store = Store(folder.images, job.run, image_size(pipe.model.config, pipe.vae), args.format)
    single = args.deterministic and args.format == "png"  # then an image is on disk as soon as it is finished
    batches = plan(job.missing, 1 if single else args.per_proc_batch_size, ranks.rank, ranks.world)
    sampling = Sampling(pipe, cache, args.seed, job.labels, args.deterministic, args.tf32, signals, args.grace)
    progress = runtime.Progress(
        sum(map(len, batches)), "image", shown=ranks.rank == 0, line=lambda text: say("progress", text)
    )

    def write(images: np.ndarray, lines: list[dict[str, Any]]) -> None:
        if not folder.has(job.token):
            raise OSError(f"{folder.path} is gone")
        indices = np.array([line["index"] for line in lines])
        store.write(indices, None if job.labels is None else job.labels[indices], images)
        append(log, [{"session": job.session, "rank": ranks.rank, **line} for line in lines])

    try:
        # Signals are put off until all is written, so that the log knows of every image that is on disk.
        with progress, signals.deferred(), written_behind(write) as submit:
            for batch in batches:
                signals.check()
                images, lines = sampling.batch(batch)
                submit(images, lines)
                progress.update(len(lines), f"{progress.rate:.3g} images/s a process")
    except torch.OutOfMemoryError as error:
        held = "" if cache is None else f" (the cache held {cache.bytes / 2**30:.2f} GiB)"
        raise Failure(
            f"--per-proc-batch-size {args.per_proc_batch_size} does not fit into the memory of {pipe.device}{held}: "
            "lower it, or give --cache-dtype bf16 or --adacorr order=1; finished images are kept"
        ) from error
    except OSError as error:
        if not folder.has(job.token):
            raise Failure(f"{folder.path} was deleted, or its record changed, while the job was at work") from error
        raise Failure(f"{error}; finished images are kept, and the same command goes on from there") from error


# ---------------------------------------------------------------------------------------------- rank 0's part


class Leader:
    """What only rank 0 does: it decides whether the folder fits, says what is missing, and finishes the run."""

    def __init__(self, args: argparse.Namespace, ranks: Ranks, stack: ExitStack) -> None:
        self.args, self.ranks, self.stack = args, ranks, stack

    def prepare(self) -> Job | None:
        """All that comes before the first batch; None if the run is complete. The lock is held until the stack ends."""
        args, count = self.args, self.args.num_fid_samples
        set_up(args, self.ranks)
        profiles.check_calibrate(args.calibrate)
        pipe, cache = load(args)
        labels = make_labels(args.labels, args.seed, count, pipe.model.num_classes)
        name = folder_name(args, pipe, cache, run_id(describe(args, pipe, cache)))
        self.folder = folder = RunFolder(args.sample_dir / name)
        # A run goes on with the profile that it began with, wherever it does.
        own = args.calibrate == "auto" and not args.overwrite and folder.profile.is_file()
        calibrate = str(folder.profile) if own else args.calibrate
        cache = profiles.with_profile(cache, pipe, calibrate, lambda text: say("note", text))
        self.pipe, self.cache = pipe, cache
        protocol, environment = describe(args, pipe, cache), runtime.environment()
        run = run_id(protocol)
        self.store = Store(folder.images, run, image_size(pipe.model.config, pipe.vae), args.format)
        record = None if args.overwrite else folder.check(protocol)
        self._say(protocol, labels)
        for key in ("git", "torch", "device", "pillow") if record else ():
            if (before := record["sessions"][-1]["environment"].get(key)) != environment[key]:
                say("note", f"{key} was {before} in the session before and is {environment[key]} now")
        self.stack.enter_context(folder.lock(lambda text: say("note", text)))
        if left := folder.tidy():
            say("note", f"unfinished files of killed processes removed: {left}")
        if args.overwrite:
            clear(folder)
        else:
            folder.check(protocol)  # again: another job may have been here before the lock was free
        missing = look_around(self.store, count, args.verify)
        packed = folder.packed(run)
        if len(missing) == 0 and not args.verify and (args.no_pack or packed == count):
            say("complete", f"{folder.path if args.no_pack else folder.npz}; --verify reads all images again")
            return None
        if packed > count and not args.no_pack:
            warn(f"{folder.npz} holds {packed} images and will be packed anew with the first {count}")
        session = {"count": count, "missing": len(missing), "processes": self.ranks.world, "preset": args.preset}
        session |= {"batch": args.per_proc_batch_size, "environment": environment}
        if labels is not None:
            session["labels"] = np.bincount(labels, minlength=pipe.model.num_classes).tolist()
        token, profile = folder.begin(protocol, labels, session), None if cache is None else cache.profile
        if profile is not None:
            save_profile(folder.profile, profile)
        return Job(args, folder.path, run, token, len(folder.record["sessions"]), missing, labels, profile)

    def _say(self, protocol: dict[str, Any], labels: np.ndarray | None) -> None:
        args = self.args
        for name, value in protocol.items():
            say(name, canonical(value))
        if args.preset is not None:
            _, fid, source = PRESETS[args.preset]
            changed = [
                f"{k} {getattr(args, k)}" for k, v in PRESETS[args.preset].options.items() if getattr(args, k) != v
            ]
            published = f"published without a cache: FID {fid} ({source})"
            say("preset", f"{args.preset}, {'but for ' + ', '.join(changed) if changed else published}")
        say("processes", f"{self.ranks.world}, {1 if args.deterministic else args.per_proc_batch_size} images at once")
        say("folder", str(self.folder.path))
        if labels is not None and len(labels) >= 10 and labels[0] < labels[-1] and (np.diff(labels) >= 0).all():
            warn("--labels is sorted by class: the Inception Score takes splits in this order; shuffle it")
        if doubt := pipeline.caveat(self.pipe.sampler, self.cache):
            warn(doubt)

    @contextmanager
    def session(self) -> Iterator[None]:
        """Within, the session is open; what ends it goes into the record. OSErrors become Failures."""
        try:
            yield
        except BaseException as error:
            message = " ".join(str(error).split())
            state = "interrupted" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "failed"
            with suppress(OSError):  # the exception matters more
                if self.folder.has(self.folder.record["sessions"][-1]["token"]):  # else somebody deleted the folder
                    self.folder.end(state, statistics(self.folder, self.args.num_fid_samples), message)
            if isinstance(error, OSError):
                raise Failure(message) from error
            raise

    def finish(self) -> None:
        """Wait for the other ranks, see that nothing is missing, pack, and set the mark of success."""
        self.folder.await_ranks(self.ranks.world)
        sha = finish(self.folder, self.store, self.args.num_fid_samples, not self.args.no_pack)
        self.folder.end("complete", totals := statistics(self.folder, self.args.num_fid_samples))
        self.folder.succeed(self.store.run, self.args.num_fid_samples, sha)
        report(totals, self.folder, sha)


def look_around(store: Store, count: int, verify: bool) -> np.ndarray:
    """Indices (m,) int64 of images that are to be made, with unusable files out of their way."""
    places, unusable = store.scan(count, verify)
    moved = store.set_aside(unusable)
    tell("set aside", [f"{path}: {unusable[path]}" for path in moved])
    tell("not used", [f"{path}: {why}" for path, why in unusable.items() if path not in moved])
    missing = np.setdiff1d(np.arange(count), np.fromiter(places, np.int64))
    say("images", f"{count - len(missing)} of {count} are there, {len(missing)} to make")
    return missing


def clear(folder: RunFolder) -> None:
    """--overwrite: delete what the folder holds of the run that it has a record of. Other files stay."""
    with suppress(ValueError):  # no record that tells which images are the run's: they will be set aside
        if record := folder.read():
            store_of(folder, record).clear()
    folder.clear()


def store_of(folder: RunFolder, record: dict[str, Any]) -> Store:
    protocol = record["protocol"]
    return Store(folder.images, record["run_id"], image_size(protocol["model"], protocol["vae"]), protocol["format"])


# ------------------------------------------------------------------------------------------------- the end


def finish(folder: RunFolder, store: Store, count: int, packed: bool) -> str | None:
    """Pack the images, which must all be there: the sha256 of the .npz, None without one."""
    if missing := count - len(store.scan(count)[0]):
        raise Failure(f"{missing} of {count} images are missing in {folder.path}: run the command of the run again")
    return pack(store.read(count), count, store.size, folder.npz) if packed else None


def pack_folder(path: Path) -> int:
    """--pack: make the .npz of a run folder in which every image is there."""
    folder = RunFolder(path)
    if (record := folder.read()) is None:
        raise ValueError(f"{path} is no run folder: it has no run.json")
    store, count = store_of(folder, record), record["sessions"][-1]["count"]
    with Signals(), folder.lock(lambda text: say("note", text)):
        sha = finish(folder, store, count, True)
        folder.succeed(store.run, count, sha)
        report(statistics(folder, count), folder, sha)
    return 0


def report(totals: dict[str, Any], folder: RunFolder, sha: str | None) -> None:
    """The numbers of a finished run, over all its sessions."""
    for name, value in totals.items():
        if value:
            say(name, f"{value:.6g}" if isinstance(value, float) else f"{value}")
    if totals["cache_bytes"] and totals["hit_rate"] == 0:
        warn("nothing was skipped: the method asked for every block of every step")
    say("finished", f"{folder.images}" if sha is None else f"{folder.npz}, sha256 {sha}")


def say(name: str, text: str) -> None:
    try:
        print(f"{name:18} {text}", flush=True)
    except OSError:  # whoever read it has left, or the log's disk is full, which is no reason to stop
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def warn(text: str) -> None:
    if sys.stderr is not None:  # it is None where the caller closed it
        print(f"sample_ddp.py: warning: {text}", file=sys.stderr, flush=True)


def tell(what: str, items: list[Any], most: int = 5) -> None:
    """A line for each of the first items, and one for the rest."""
    for item in items[:most]:
        say("note", f"{what}: {item}")
    if len(items) > most:
        say("note", f"{what}: and {len(items) - most} more")
