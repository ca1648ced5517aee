"""Sample many images, for FID, on one GPU or on many, into a folder and an ADM-format .npz.

    python sample_ddp.py --num-fid-samples 100 --adacorr              the bundled checkpoint, one process
    torchrun --nproc-per-node 8 sample_ddp.py --preset dit-xl-2-256-ddim-50 --adacorr

Image i depends on (seed, i) alone: not on the number of processes or nodes, on the batch size or on restarts. The same
command again goes on where the last one ended, also after a kill and on another number of processes. Other options in
the same folder are refused. docs/fid.md describes the folder and the presets, docs/faults.md each fault.

Exit codes: 0 done, 1 failed (run it again once the cause is gone), 2 a mistake in the options, 75 stopped by SIGTERM or
SIGUSR1 and to be started again, 130 Ctrl-C. A second Ctrl-C ends at once. torchrun passes none of them on but 0: after
a signal it ends with 1.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pipeline
from adacorr.command import Parser, number
from adacorr.files import check_writable
from fid_run import job
from fid_run.labels import DRAWN, LabelFile
from ranks import end_with_launcher, run_script

# The options of published protocols. docs/fid.md has the sources, and the FID of each without a cache.
RELEASE = {"model": "DiT-XL/2", "vae": "ema", "cfg_scale": 1.5, "cfg_channels": "3", "labels": "random"}
PRESETS = {
    "dit-xl-2-256-ddpm-250": {**RELEASE, "image_size": 256, "sampler": "ddpm", "num_sampling_steps": 250},
    "dit-xl-2-512-ddpm-250": {**RELEASE, "image_size": 512, "sampler": "ddpm", "num_sampling_steps": 250},
    "dit-xl-2-256-ddim-50": {**RELEASE, "image_size": 256, "sampler": "ddim", "num_sampling_steps": 50},
}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags, over those of the preset; reads the label file. ValueError or OSError names the flag and the value."""
    parser = Parser("sample_ddp.py", description=__doc__)
    yes_no = argparse.BooleanOptionalAction
    add = parser.add_argument_group("images and output").add_argument
    add("--preset", choices=[*PRESETS], help="options of a published protocol; other flags win")
    many = "images in all (default %(default)s)"
    add("--num-fid-samples", type=number(1, 10_000_000), default=50_000, metavar="N", help=many)
    lines = "FILE has the label of image i in line i + 1"
    add("--labels", default="random", metavar="random|balanced|FILE", help=lines)
    add("--sample-dir", type=Path, default=Path("samples"), help="where the run's folder is made (default %(default)s)")
    add("--no-pack", action="store_true", help="leave out the .npz; the same command without it makes it later")
    add("--overwrite", action="store_true", help="delete what the folder holds of a run and begin anew")
    add("--verify", action="store_true", help="decode every existing image, and sample damaged ones again")
    add = parser.add_argument_group("speed and precision").add_argument
    many = "images at once (default %(default)s)"
    add("--per-proc-batch-size", type=number(1, 100_000), default=32, metavar="B", help=many)
    add("--tf32", action=yes_no, default=True, help="TF32 for what is float32 on a GPU, also the VAE (default on)")
    add("--compile", action="store_true", help="torch.compile the blocks: slow to start, then faster")
    add("--deterministic", action=yes_no, help="one image at a time, for equal bits; the default on a CPU")
    threads = "of each process on a CPU; part of the protocol (default 1)"
    add("--threads", type=number(1, 1024), metavar="N", help=threads)
    add("--debug", action="store_true", help="show where an error was raised")
    pipeline.add_model_flags(parser)
    pipeline.add_cache_flags(parser)
    args = parser.parse_args(argv)
    if args.preset is not None:
        parser.set_defaults(**PRESETS[args.preset])
        args = parser.parse_args(argv)
    if os.path.lexists(args.sample_dir) and not args.sample_dir.is_dir():
        raise OSError(f"--sample-dir {args.sample_dir} is a file or a link to nowhere, not a folder")
    check_writable("--sample-dir", args.sample_dir / "run.json")
    if args.labels not in DRAWN:
        args.labels = LabelFile.read(args.labels, args.num_fid_samples)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    return run_script("sample_ddp.py", argv, parse, job.run)


if __name__ == "__main__":
    end_with_launcher()
    sys.exit(main())
