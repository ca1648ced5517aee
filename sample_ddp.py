"""Sample many images, for FID, on one GPU or on many, into a folder and an ADM-format .npz.

    python sample_ddp.py --num-fid-samples 100 --adacorr              the bundled checkpoint, one process
    torchrun --nproc-per-node 8 sample_ddp.py --preset dit-xl-2-256-ddim-50 --adacorr
    python sample_ddp.py --pack samples/NAME                          make the .npz of a finished folder again

Image i depends on (seed, i) alone: not on the number of processes or nodes, on the batch size or on restarts. The same
command again goes on where the last one ended, also after a kill and on another number of processes; other options in
the same folder are refused. Every finished batch is on disk at once.

Exit codes: 0 done, 1 failed (run it again once the cause is gone), 2 a mistake in the options, 75 stopped by SIGTERM or
SIGUSR1 and to be started again, 130 Ctrl-C. A second Ctrl-C ends at once. torchrun passes none of them on but 0: after
a signal it ends with 1.
"""

import argparse
import io
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import pipeline
import runtime
from adacorr import AdaCorrection, CacheManager
from adacorr.command import Failure, Parser, run_command
from adacorr.compiled import compile_blocks
from adacorr.files import check_writable
from ddp.image_store import STORES, Store, StoreError, pack
from ddp.interrupt import Interrupted, Signals
from ddp.labels import DRAWN, histogram, in_class_order, make_labels, read_labels
from ddp.protocol import PRESETS, describe, folder_name, image_size
from ddp.run_folder import RankLog, RunFolder, RunMismatch, await_session, run_id, statistics, wait_for_ranks
from ddp.worker import Sampling, Writer, plan
from download import model_name
from pipeline import Pipeline
from ranks import PATIENCE, LeaderFailed, NoGPU, Ranks

WARM_UP = 6  # steps of the one image that the cache's memory is measured on: by then every store is in use
QUIET = 30  # seconds between two lines of progress where there is no terminal to draw a bar on
GIB = 2**30


def make_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    lines = [f"  {name:22} FID {p.fid}: {p.source}" for name, p in PRESETS.items()]
    epilog = "presets, with the published FID of 50000 uncached images:\n" + "\n".join(lines)
    parser = Parser("sample_ddp.py", description=__doc__, epilog=epilog, formatter_class=raw, allow_abbrev=False)
    parser.add_argument(
        "--preset", choices=list(PRESETS), metavar="NAME", help="a published protocol, see below; other flags win"
    )
    pipeline.add_model_flags(parser)
    pipeline.add_cache_flags(parser)

    add = parser.add_argument_group("images and output").add_argument
    add("--num-fid-samples", type=int, default=50_000, metavar="N", help="images in all (default %(default)s)")
    add(
        "--labels", default="random", metavar="random|balanced|FILE", help="FILE has the label of image i in line i + 1"
    )
    add("--sample-dir", type=Path, default=Path("samples"), help="the run's folder is made in it (default %(default)s)")
    add("--format", choices=list(STORES), default="png", help="npz-shards: a file for each batch (default %(default)s)")
    add("--no-pack", action="store_true", help="leave out the .npz; --pack DIR makes it later")
    add("--pack", type=Path, metavar="DIR", help="only make the .npz of a finished run folder")
    add("--overwrite", action="store_true", help="delete what the folder holds of a run and begin anew")
    add("--verify", action="store_true", help="decode every image that is there, and make damaged ones again")

    add = parser.add_argument_group("speed and precision").add_argument
    add("--per-proc-batch-size", type=int, default=32, metavar="B", help="images at once (default %(default)s)")
    add("--tf32", action=argparse.BooleanOptionalAction, default=True, help="of a GPU in fp32 (default on)")
    add("--compile", action="store_true", help="torch.compile the blocks: slow to start, then faster")
    add(
        "--deterministic",
        action=argparse.BooleanOptionalAction,
        help="equal to the bit for any batch size, by sampling images one after another; the default on a CPU",
    )
    add("--threads", type=int, metavar="N", help="of each process on a CPU; results are held to it (default 1)")
    add(
        "--grace",
        type=float,
        default=20.0,
        metavar="SECONDS",
        help="finish the batch after a signal if that takes no longer, else drop it (default %(default)s)",
    )
    add("--debug", action="store_true", help="show where an error was raised")
    return parser


def parse(argv: Sequence[str] | None, silent: bool = False) -> argparse.Namespace:
    """The flags, over those of the preset; a mistake ends the process, `silent` where another one says it."""
    parser = make_parser()
    if silent:
        parser.exit = lambda status=0, message=None: sys.exit(status)
    args = parser.parse_args(argv)
    if args.preset is not None:
        parser.set_defaults(**PRESETS[args.preset].options)
        args = parser.parse_args(argv)
    return args


# ------------------------------------------------------------------------------------------ before the work


def check(args: argparse.Namespace, ranks: Ranks) -> torch.device:
    """The device that is asked for, once all mistakes that show without a model are out of the way.

    ValueError or OSError names the flag and the value; on other ranks than 0 it is LeaderFailed: one voice will do.
    """
    try:
        _check(args)
        return ranks.device(args.device)
    except (ValueError, OSError) as error:
        if ranks.rank > 0 and not isinstance(error, NoGPU):
            raise LeaderFailed from None
        raise


def _check(args: argparse.Namespace) -> None:
    runtime.check_range("--num-fid-samples", args.num_fid_samples, 1, 10_000_000)
    runtime.check_range("--per-proc-batch-size", args.per_proc_batch_size, 1, 100_000)
    runtime.check_range("--grace", args.grace, 0.0, 86_400.0)
    if args.threads is not None:
        runtime.check_range("--threads", args.threads, 1, 1024)
    if args.sample_dir.exists() and not args.sample_dir.is_dir():
        raise OSError(f"--sample-dir {args.sample_dir} is a file, not a folder")
    check_writable("--sample-dir", args.sample_dir / "run.json")
    if args.labels not in DRAWN:
        read_labels(Path(args.labels), args.num_fid_samples)


def set_precision(args: argparse.Namespace, device: torch.device) -> None:
    """Threads and kernels, before the first of them runs; fills in the defaults that depend on the device."""
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


def load(args: argparse.Namespace) -> tuple[Pipeline, CacheManager | None]:
    """Model, sampler and cache of this process; ValueError or OSError for a mistake."""
    cache = pipeline.make_cache(args)
    pipe = pipeline.load(pipeline.ModelOptions.of(args))
    if args.compile:
        compile_blocks(pipe.model)
    return pipe, cache


# ------------------------------------------------------------------------------------------------- the work


@dataclass(frozen=True)
class Job:
    """What rank 0 found out and every rank works by. missing (m,) indices; labels (N,) int64 or None."""

    path: Path
    run: str
    session: int
    missing: np.ndarray
    labels: np.ndarray | None


def run(args: argparse.Namespace, ranks: Ranks) -> int:
    """The whole job on this rank -> exit code. ValueError or OSError for a mistake, Failure for what broke later."""
    leader = Leader(args, ranks) if ranks.rank == 0 else None
    with Signals() as signals, ExitStack() as stack:
        device = check(args, ranks)
        args.device = str(device)
        set_precision(args, device)
        ranks.open(device, PATIENCE)
        try:
            job = ranks.from_leader(lambda: leader.prepare(stack))
        finally:
            ranks.close()  # there is no collective from here on: ranks may lag, fail or end on their own
        if job is None:
            return 0
        pipe, cache = (leader.pipe, leader.cache) if leader else load(args)
        if leader is None:
            await_session(RunFolder(job.path), job.session)
            work(args, ranks, signals, job, pipe, cache)
            return 0
        with leader.session():
            work(args, ranks, signals, job, pipe, cache)
            leader.finish()
    return 0


def work(
    args: argparse.Namespace,
    ranks: Ranks,
    signals: Signals,
    job: Job,
    pipe: Pipeline,
    cache: CacheManager | None,
) -> None:
    """This rank's share: sample its batches, write them, keep its log."""
    folder = RunFolder(job.path)
    store = STORES[args.format](folder.images, job.run, image_size(pipe.model.config, pipe.vae))
    batches = plan(job.missing, args.per_proc_batch_size, ranks.rank, ranks.world)
    sampling = Sampling(
        pipe,
        cache,
        args.seed,
        job.labels,
        alone=args.deterministic,
        tf32=args.tf32,
        signals=signals,
        grace=args.grace,
    )
    with RankLog(folder, job.session, ranks.rank, ranks.world) as log:
        progress = Progress(sum(map(len, batches)), len(job.missing), ranks)
        try:
            # Signals are put off until the writer is through, so that the log knows of every image that is written.
            with signals.deferred(), Writer(store.write, log.append) as writer:
                for batch in batches:
                    signals.check()
                    if log.superseded():
                        raise Failure(f"another job has taken over {folder.path}: this one ends")
                    images, entry = sampling.batch(batch)
                    made = entry["indices"]  # fewer than the batch after a signal
                    writer.submit(None if job.labels is None else job.labels[made], images, entry)
                    progress.show(entry)
        except Interrupted as error:
            with suppress(OSError):  # the exception matters more
                log.state("interrupted", str(error))
            raise
        except Exception as error:
            raise translate(error, args, pipe, cache) from error
        finally:
            progress.close()
        log.state("done")


def translate(error: BaseException, args: argparse.Namespace, pipe: Pipeline, cache: CacheManager | None):
    """What broke the loop as a Failure where it is one, with the way out."""
    if isinstance(error, torch.OutOfMemoryError):
        held = "" if cache is None else f", of which the cache held {cache.bytes / GIB:.2f} GiB"
        return Failure(
            f"--per-proc-batch-size {args.per_proc_batch_size} does not fit into the memory of {pipe.device}{held}: "
            f"{knobs(cache)}; finished images are kept"
        )
    if isinstance(error, OSError):
        return Failure(f"{error}; finished images are kept: make room or repair it, and run the same command again")
    return error


class Progress:
    """A bar on a terminal, elsewhere a line now and then; on rank 0 alone, for the whole run by its own pace."""

    def __init__(self, own: int, total: int, ranks: Ranks):
        self.own, self.world = own, min(ranks.world, max(total, 1))
        self.done, self.flops, self.uncached = 0, 0, 0
        self.start = self.said = time.monotonic()
        terminal = sys.stderr.isatty()
        self.silent = ranks.rank != 0 or terminal
        self.bar = tqdm(total=own, unit="image", disable=ranks.rank != 0 or not terminal)

    def show(self, entry: dict[str, Any]) -> None:
        self.done += len(entry["indices"])
        self.flops += entry.get("flops", 0)
        self.uncached += entry.get("uncached_flops", 0)
        now = time.monotonic()
        rate = self.done / (now - self.start)
        text = f"{rate * self.world:.3g} images/s on {self.world} process{'es' * (self.world > 1)}"
        if self.uncached:
            text += f", compute {self.flops / self.uncached:.1%}"
        self.bar.set_postfix_str(text)
        self.bar.update(len(entry["indices"]))
        if not self.silent and (now > self.said + QUIET or self.done == self.own):
            left = tqdm.format_interval((self.own - self.done) / rate)
            say("progress", f"{self.done} of {self.own} of this process, {text}, {left} left")
            self.said = now

    def close(self) -> None:
        self.bar.close()


# ---------------------------------------------------------------------------------------------- rank 0's part


class Leader:
    """What only rank 0 does: it decides whether the folder fits, says what is missing, and finishes the run."""

    def __init__(self, args: argparse.Namespace, ranks: Ranks):
        self.args, self.ranks = args, ranks

    def prepare(self, stack: ExitStack) -> Job | None:
        """All that comes before the first batch; None if the run is complete. The lock is held until `stack` ends."""
        args = self.args
        self.pipe, self.cache = load(args)
        self.labels = make_labels(args.labels, args.seed, args.num_fid_samples, self.pipe.model.num_classes)
        self.environment = runtime.environment()
        self.protocol = describe(args, self.pipe, self.cache)
        self.run = run_id(self.protocol)
        self.folder = RunFolder(args.sample_dir / folder_name(args, self.pipe, self.cache, self.protocol))
        size = image_size(self.pipe.model.config, self.pipe.vae)
        self.store = STORES[args.format](self.folder.images, self.run, size)
        self.folder.check_writable()
        record = None if args.overwrite else self.folder.check(self.protocol)
        self._say_protocol()
        if doubt := pipeline.caveat(self.pipe.sampler, self.cache):
            warn(doubt)
        if record is not None:
            self._say_changes(record["sessions"][-1]["environment"])
        for note in stack.enter_context(self.folder.lock()):
            say("note", note)
        if args.overwrite:
            clear(self.folder)
        elif self._is_complete():
            return None
        missing = self._look_around()
        self._check_room(len(missing))
        if self.cache is not None and len(missing):
            self._measure_memory()
        self.number = self.folder.begin(self.protocol, self._describe_session(len(missing)))
        self.folder.keep_labels(self.labels)
        return Job(self.folder.path, self.run, self.number, missing, self.labels)

    def _say_protocol(self) -> None:
        args, pipe, p = self.args, self.pipe, self.protocol
        size = self.store.size
        say("model", f"{model_name(pipe.model.config)} from {p['checkpoint']['name']}, {size} x {size}")
        channels = "" if pipe.cfg_scale == 1 else f" on {'all' if pipe.cfg_channels == 'all' else 3} channels"
        say("sampler", f"{p['sampler']['spec']}, {p['sampler']['steps']} steps, guidance {pipe.cfg_scale:g}{channels}")
        say("cache", "none" if self.cache is None else self.cache.spec)
        if args.preset is not None:
            preset = PRESETS[args.preset]
            changed = [f"{k} {getattr(args, k)}" for k, v in preset.options.items() if getattr(args, k) != v]
            fid = f"{args.preset}, published without a cache: FID {preset.fid} ({preset.source})"
            say("preset", fid if not changed else f"{args.preset}, but for {', '.join(changed)}")
        kind = " ".join([args.dtype, *["TF32"] * args.tf32, *["compiled"] * args.compile])
        kind += f", {args.threads} thread{'s' * (args.threads > 1)} each" if args.threads else ""
        kind += ", one image at a time" if args.deterministic else f", {args.per_proc_batch_size} images at once"
        say("processes", f"{self.ranks.world} on {pipe.device.type}, {kind}")
        say("folder", str(self.folder.path))
        if in_class_order(self.labels):
            warn(
                f"--labels {args.labels} is sorted by class: the Inception Score takes splits in this order; shuffle it"
            )

    def _say_changes(self, before: dict[str, Any]) -> None:
        """What is different from the session before, though not of the protocol: it may round otherwise."""
        for key in ("git", "torch", "device", "pillow"):
            if before.get(key) != self.environment[key]:
                say("note", f"{key} was {before.get(key)} in the session before and is {self.environment[key]} now")

    def _is_complete(self) -> bool:
        """Whether the run ended in success with all that is asked for now."""
        count, wants = self.args.num_fid_samples, not self.args.no_pack
        if self.args.verify or not self.folder.succeeded(self.run, count, npz=wants):
            return False
        say("complete", f"{count} images{f', {self.folder.npz}' if wants else ''}; --verify reads all of them again")
        return True

    def _look_around(self) -> np.ndarray:
        """Indices (m,) that are to be made, after what a kill left behind was cleared away."""
        cleaned, scan = self.store.clean(), self.store.scan(self.args.num_fid_samples, self.args.verify)
        if cleaned:
            say("note", f"{cleaned} unfinished file{'s' * (cleaned > 1)} of a killed process removed")
        tell("damaged, made again", scan.damaged)
        tell("not of this run, not used", scan.foreign)
        for path in self.store.set_aside(scan):
            say("note", f"such a file stood where an image goes: it is now {path}")
        self.store.discard(scan)
        missing, count = scan.missing, self.args.num_fid_samples
        say("images", f"{count - len(missing)} of {count} are there, {len(missing)} to make")
        return missing

    def _check_room(self, missing: int) -> None:
        """A warning if the disk will not hold what is to come, by the size of the pixels."""
        pixels = 3 * self.store.size**2
        need = pixels * (missing + self.args.num_fid_samples * (not self.args.no_pack))
        free = shutil.disk_usage(self.folder.path).free
        if need > free:
            warn(f"{self.args.sample_dir} has {free / GIB:.1f} GiB free, and the run may need {need / GIB:.1f} GiB")

    def _measure_memory(self) -> None:
        """Say how much the cache will hold, from the first steps of one image; ValueError if that does not fit."""
        args, pipe = self.args, self.pipe
        labels = None if self.labels is None else torch.from_numpy(self.labels[:1])
        pipe.sample(args.seed, np.zeros(1, dtype=np.int64), labels, self.cache, stop=WARM_UP)
        each, images = self.cache.bytes, 1 if args.deterministic else args.per_proc_batch_size
        need, free = each * images, free_memory(pipe.device)
        say("cache memory", f"{each / 2**20:.1f} MiB an image, {need / 2**20:.1f} MiB for {images} at once")
        sharing = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if pipe.device.type == "cpu" else 1
        if need * sharing > free:
            fits = int(free / (each * sharing))
            raise ValueError(
                f"--per-proc-batch-size {images} needs {need * sharing / GIB:.2f} GiB for the cache, and {pipe.device} "
                f"has {free / GIB:.2f} GiB free: " + (f"at most {fits} fit; " if fits else "") + knobs(self.cache)
            )

    def _describe_session(self, missing: int) -> dict[str, Any]:
        args = self.args
        return {
            "count": args.num_fid_samples,
            "missing": missing,
            "processes": self.ranks.world,
            "batch": args.per_proc_batch_size,
            "preset": args.preset,
            "labels": histogram(self.labels, self.pipe.model.num_classes),
            "environment": self.environment,
        }

    @contextmanager
    def session(self) -> Iterator[None]:
        """Within, the session is open; what ends it goes into the record."""
        state, message = "failed", ""
        try:
            yield
            state = "complete"
        except (KeyboardInterrupt, Interrupted) as error:
            state, message = "interrupted", str(error)
            raise
        except BaseException as error:
            message = " ".join(str(error).split())
            raise
        finally:
            if state != "complete":  # else `finish` has closed it
                with suppress(OSError):  # the exception matters more
                    self.folder.end(state, statistics(self.folder, self.args.num_fid_samples), message=message)

    def finish(self) -> None:
        """Wait for the other ranks, see that nothing is missing, pack, and set the mark of success."""
        args, count = self.args, self.args.num_fid_samples
        problems = wait_for_ranks(self.folder, self.number, self.ranks.world)
        missing = len(self.store.scan(count).missing)
        if missing:
            raise Failure(
                f"{'; '.join([*problems, f'{missing} of {count} images are missing'])}: run the same command again "
                "to make them, the others are kept"
            )
        for problem in problems:  # of a rank that had nothing left to do
            say("note", problem)
        sha = None if args.no_pack else pack_images(self.folder, self.store, count, self.labels)
        totals = statistics(self.folder, count)
        self.folder.end("complete", totals)
        self.folder.succeed(count, sha)
        report(totals, self.folder, sha)


def clear(folder: RunFolder) -> None:
    """--overwrite: delete what the folder holds of the run that it has a record of. Other files stay."""
    try:
        record = folder.open()
        STORES[record["protocol"]["format"]](folder.images, record["run_id"], 1).clear()
    except (RunMismatch, KeyError):  # no record that tells which images are the run's: they will be set aside
        pass
    folder.clear()


# ------------------------------------------------------------------------------------------------- the end


def pack_images(folder: RunFolder, store: Store, count: int, labels: np.ndarray | None) -> str:
    """Pack all images of a run into its .npz and return the sha256; Failure for one that is damaged, or a full disk."""
    try:
        return pack(store.read(count), count, store.size, labels, folder.npz)
    except StoreError as error:
        raise Failure(str(error)) from error


def pack_folder(path: Path) -> int:
    """--pack: make the .npz of a run folder in which every image is there."""
    folder = RunFolder(path)
    record = folder.open()
    protocol, session = record["protocol"], record["sessions"][-1]
    count, size = session["count"], image_size(protocol["model"], protocol["vae"])
    store = STORES[protocol["format"]](folder.images, record["run_id"], size)
    with Signals(), folder.lock() as notes:
        for note in notes:
            say("note", note)
        scan = store.scan(count)
        tell("damaged", scan.damaged)
        if len(scan.missing):
            raise Failure(
                f"{len(scan.missing)} of {count} images are missing in {path}: end the run first, by the command "
                f"{' '.join(session['environment']['argv'])}"
            )
        sha = pack_images(folder, store, count, folder.read_labels(count))
        folder.succeed(count, sha)
        report(statistics(folder, count), folder, sha)
    return 0


def report(totals: dict[str, Any], folder: RunFolder, sha: str | None) -> None:
    """The numbers of a finished run, over all its sessions, in a few aligned lines."""
    say("images", f"{totals['images'] + totals['unaccounted']} in {folder.images}")
    for name, rank in {"": totals, **totals["ranks"]}.items():
        if not rank["images"] or (name and len(totals["ranks"]) == 1):
            continue
        text = f"{rank['images']} images, {rank['images_per_second']:.3g}/s{'' if name else ' a process'}"
        if rank["cache_bytes"]:
            text += f", hit rate {rank['hit_rate']:.1%}, compute {rank['compute']:.1%}"
            text += f", {rank['saved_flops'] / 1e12:.4g} TFLOPs saved, cache {rank['cache_bytes'] / 2**20:.1f} MiB"
        say(f"process {name}" if name else "in all", text)
    if totals["fallbacks"]:
        say("fallbacks", f"{totals['fallbacks']} decisions to compute, because a measured offset was not finite")
    for fault in totals["recomputed"]:
        say("recomputed", "image {index} (seed {seed}, label {label}) was not finite after step {step}".format(**fault))
    if totals["images"] and totals["cache_bytes"] and totals["hit_rate"] == 0:
        warn("nothing was skipped: the method asked for every block of every step")
    if sha is not None:
        say("packed", f"{folder.npz}, sha256 {sha}")


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def knobs(cache: CacheManager | None) -> str:
    """What can be turned when memory is short."""
    words = ["lower --per-proc-batch-size"]
    if cache is not None and cache.dtype == torch.float32:
        words.append("halve the cache by --cache-dtype bf16")
    if cache is not None and isinstance(cache.correction, AdaCorrection) and cache.correction.order > 1:
        words.append("store less by --adacorr order=1")
    return ", or ".join(words)


def say(name: str, text: str) -> None:
    try:
        print(f"{name:12} {text}", flush=True)
    except BrokenPipeError:  # whoever read it has left, which is no reason to stop
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def warn(text: str) -> None:
    print(f"sample_ddp.py: warning: {text}", file=sys.stderr, flush=True)


def tell(what: str, files: dict[Path, str], most: int = 5) -> None:
    """Name files and why, the first of them where they are many."""
    for path, why in list(files.items())[:most]:
        say("note", f"{what}: {path}: {why}")
    if len(files) > most:
        say("note", f"{what}: and {len(files) - most} more")


def main(argv: Sequence[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a folder may have letters that the terminal has not
    ranks = Ranks.find()
    args = parse(argv, silent=ranks.rank > 0)

    def job() -> int:
        try:
            return run(args, ranks) if args.pack is None else pack_folder(args.pack)
        except LeaderFailed:
            return 2
        except Interrupted as stop:
            if ranks.rank == 0:
                print(f"sample_ddp.py: {stop}; the same command goes on from here", file=sys.stderr)
            return stop.code

    name = "sample_ddp.py" if ranks.world == 1 else f"sample_ddp.py: process {ranks.rank}"
    return run_command(name, job, args.debug)


if __name__ == "__main__":
    sys.exit(main())
