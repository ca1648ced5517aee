"""Sample many images, for FID, on one GPU or on many, into a folder and an ADM-format .npz.

    python sample_ddp.py --num-fid-samples 100 --adacorr              the bundled checkpoint, one process
    torchrun --nproc-per-node 8 sample_ddp.py --preset dit-xl-2-256-ddim-50 --adacorr
    python sample_ddp.py --pack samples/NAME                          make the .npz of a finished folder again

Image i depends on (seed, i) alone: not on the number of processes or nodes, on the batch size or on restarts. The same
command again goes on where the last one ended, also after a kill and on another number of processes; other options in
the same folder are refused. Finished images are on disk at once.

Exit codes: 0 done, 1 failed (run it again once the cause is gone), 2 a mistake in the options, 75 stopped by SIGTERM or
SIGUSR1 and to be started again, 130 Ctrl-C. A second Ctrl-C ends at once. torchrun passes none of them on but 0: after
a signal it ends with 1.
"""

from __future__ import annotations

import argparse
import ctypes
import io
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

# The rest is imported where it is needed: it takes seconds, and neither a mistake nor a signal should wait for it.
from fid_run.labels import DRAWN, LabelFile
from fid_run.presets import PRESETS


def add_own_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this script alone. Those of model, sampler and cache are in pipeline.py."""
    from adacorr.command import number

    add = parser.add_argument_group("images and output").add_argument
    add("--preset", choices=list(PRESETS), metavar="NAME", help="a published protocol, see below; other flags win")
    many = "images in all (default %(default)s)"
    add("--num-fid-samples", type=number(1, 10_000_000), default=50_000, metavar="N", help=many)
    add(
        "--labels", default="random", metavar="random|balanced|FILE", help="FILE has the label of image i in line i + 1"
    )
    add("--sample-dir", type=Path, default=Path("samples"), help="where the run's folder is made (default %(default)s)")
    add("--format", choices=["png", "npz-shards"], default="png", help="npz-shards: one file for each batch")
    add("--no-pack", action="store_true", help="leave out the .npz; --pack DIR makes it later")
    add("--pack", type=Path, metavar="DIR", help="only make the .npz of a finished run folder")
    add("--overwrite", action="store_true", help="delete what the folder holds of a run and begin anew")
    add("--verify", action="store_true", help="decode every image that is there, and make damaged ones again")
    add = parser.add_argument_group("speed and precision").add_argument
    yes_no = argparse.BooleanOptionalAction
    many = "images at once (default %(default)s)"
    add("--per-proc-batch-size", type=number(1, 100_000), default=32, metavar="B", help=many)
    add("--tf32", action=yes_no, default=True, help="of a GPU in fp32 (default on)")
    add("--compile", action="store_true", help="torch.compile the blocks: slow to start, then faster")
    add("--deterministic", action=yes_no, help="one image at a time, for equal bits; the default on a CPU")
    add("--threads", type=number(1, 1024), metavar="N", help="of each process on a CPU; results go by it (default 1)")
    late = "seconds to end a batch after a signal (default 20)"
    add("--grace", type=number(0.0, 86_400.0), default=20.0, metavar="S", help=late)
    add("--debug", action="store_true", help="show where an error was raised")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags, over those of the preset, once all mistakes are out that show without the heavy imports.

    ValueError or OSError names the flag and the value; argparse ends the process.
    """
    from adacorr.command import Parser

    own = Parser("sample_ddp.py", allow_abbrev=False, add_help=False)
    add_own_flags(own)
    args, rest = own.parse_known_args(argv)
    if not {"-h", "--help"} & {*rest}:
        check(args, argv)

    import pipeline

    lines = [f"  {name:22} FID {p.fid}: {p.source}" for name, p in PRESETS.items()]
    epilog = "presets, with the published FID of 50000 uncached images:\n" + "\n".join(lines)
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser("sample_ddp.py", allow_abbrev=False, description=__doc__, epilog=epilog, formatter_class=raw)
    add_own_flags(parser)
    pipeline.add_model_flags(parser)
    pipeline.add_cache_flags(parser)
    if args.preset is not None:
        parser.set_defaults(**PRESETS[args.preset].options)
    return parser.parse_args(rest, args)


def check(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Mistakes that show without a model; reads the label file. ValueError or OSError names the flag and the value."""
    from adacorr.files import check_writable

    if args.pack is not None:
        flags = [word for word in argv if word.startswith("-")]
        if others := [flag for flag in flags if flag.split("=")[0] not in ("--pack", "--debug")]:
            raise ValueError(f"--pack makes the .npz of the whole run as it is: leave out {' '.join(others)}")
        return
    if os.path.lexists(args.sample_dir) and not args.sample_dir.is_dir():
        raise OSError(f"--sample-dir {args.sample_dir} is a file or a link to nowhere, not a folder")
    check_writable("--sample-dir", args.sample_dir / "run.json")
    if args.labels not in DRAWN:
        args.labels = LabelFile.read(args.labels)
        args.labels.labels(args.num_fid_samples)


def main(argv: Sequence[str] | None = None) -> int:
    from adacorr.command import run_command

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a folder may have letters that the terminal has not
    argv = sys.argv[1:] if argv is None else argv
    rank = os.environ.get("RANK", "0")

    def job() -> int:
        from ranks import LeaderFailed, Ranks
        from runtime import Interrupted

        ranks = Ranks.find()
        if ranks.rank > 0 and {"-h", "--help", "--pack"} & {word.partition("=")[0] for word in argv}:
            return 0
        # Rank 0 reads the options, says what is wrong with them, and hands them on. Until it has, the others wait.
        args = parse(argv) if ranks.rank == 0 else None

        from fid_run import job

        try:
            return job.run(args, ranks) if args is None or args.pack is None else job.pack_folder(args.pack)
        except LeaderFailed:
            return 2
        except Interrupted as stop:
            if ranks.rank == 0:
                job.warn(f"{stop}; the same command goes on from here")
            return stop.code

    return run_command("sample_ddp.py" if rank == "0" else f"sample_ddp.py: process {rank}", job, "--debug" in argv)


def end_on_signals() -> None:
    """Until the job is set up, a signal ends this process at once; under a launcher, so does the launcher's end.

    Ranks that wait for each other do so in C++, where no handler of Python's runs: there the system ends them.
    """
    if "RANK" in os.environ:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        with suppress(OSError, AttributeError):  # Linux alone has it
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: SIGTERM when the parent dies
    else:
        for number, code in ((signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)):
            signal.signal(number, lambda *_, code=code: os._exit(code))


if __name__ == "__main__":
    end_on_signals()
    sys.exit(main())
