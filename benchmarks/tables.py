"""The measured tables of README.md and docs/: run from the project's root, prints Markdown, writes JSON with --out.

    python -m benchmarks.tables gamma       the one knob, budgets, and what each part is worth
    python -m benchmarks.tables protocol    other step counts, guidance scales, samplers and batch sizes
    python -m benchmarks.tables exact       distance to the 1000-step DDIM solution, against few-step solvers
    python -m benchmarks.tables memory      what a cache holds for one image, by method
    python -m benchmarks.tables codebook    the keys of AdaCache's codebook `dit`, measured on uncached runs

Caching methods are compared by python -m evaluate compare. PSNR is per image, on uint8, against the uncached run
(table `exact`: against the solution) from the same noise.
A speed-up is of one run, against uncached steps right before it.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from adacorr import CacheManager, available, make_policy
from adacorr.command import Parser, number, run_command, writable
from adacorr.files import write_json
from adacorr.policies.adacache import AdaCache
from diffusion import make_sampler
from evaluate.bench import Bench, Setting
from evaluate.pages import head, line, measures
from pipeline import ModelOptions, Pipeline, add_model_flags, load
from profiles import SEED_OFFSET, batches
from runtime import environment

Lines = Iterator[tuple[dict[str, str], dict]]  # cells by column, and what goes into the JSON file

GAMMA = (
    *(f"gamma={gamma}" for gamma in (0.25, 0.5, 1, 2, 4, 8)),
    *(f"budget={budget}" for budget in (5, 6, 7, 8)),
    *("rewind=false", "difference=false", "order=1", "order=3", "gate_error=0.001"),
)
SOLUTION_STEPS = 1000  # of DDIM, in table exact
CACHED = (("ddim", 50), ("ddim", 250), ("dpmsolver++:grid=optimized", 50), ("unipc:grid=optimized", 50))
EVALUATIONS = (5, 6, 8, 9, 10, 12, 15)  # of its few-step solvers
SOLVERS = ("ddim", "dpmsolver++:use_lu_lambdas=true", "dpmsolver++:use_lu_lambdas=true,solver_order=3")
SOLVERS += tuple(
    f"{name}:{grid}solver_order={order}"
    for name in ("dpmsolver++", "unipc")
    for order in (2, 3)
    for grid in ("", "grid=optimized,")
)
PROTOCOLS = {
    "20 steps": {"steps": 20},
    "100 steps": {"steps": 100},
    "250 steps": {"steps": 250},
    "guidance 1": {"cfg_scale": 1.0},
    "guidance 4": {"cfg_scale": 4.0},
    "DDPM, 50 steps": {"sampler": "ddpm"},
    "DDPM, 250 steps": {"sampler": "ddpm", "steps": 250},
    "DPM-Solver++, 20 steps": {"sampler": "dpmsolver++", "steps": 20},
    "batch 1": {"images": 1},
    "batch 16": {"images": 16},
}


def compared(bench: Bench, label: str, setting: Setting, changes: dict) -> tuple[dict[str, str], dict]:
    """The cached run against the uncached one of the same protocol."""
    row = bench.run("adacorr", "adacorr", setting)
    record = {"what": label, "images": bench.count, **changes, "compute": row.compute, "hit_rate": row.hit_rate}
    record |= {"psnr": row.psnr, "ssim": row.ssim["mean"], "speedup": row.speedup}
    record |= {"cache_bytes_per_image": row.bytes_per_image}
    cells = {"": f"`{label}`", **measures(row)}
    return {column: text for column, text in cells.items() if column != "to solution (dB)"}, record


def gamma(pipe: Pipeline, args: argparse.Namespace) -> Lines:
    bench = Bench(pipe, args.seed, args.images, timed=True)
    for setting in (Setting(adacorr=text) for text in GAMMA):
        yield compared(bench, str(setting), setting, {})


def protocol(pipe: Pipeline, args: argparse.Namespace) -> Lines:
    for what, changes in PROTOCOLS.items():
        sampler = make_sampler(changes.get("sampler", args.sampler), changes.get("steps", args.num_sampling_steps))
        other = replace(pipe, sampler=sampler, cfg_scale=changes.get("cfg_scale", pipe.cfg_scale))
        bench = Bench(other, args.seed, changes.get("images", args.images), timed=True)
        yield compared(bench, f"--adacorr, {what}", Setting(adacorr=""), changes)


def exact(pipe: Pipeline, args: argparse.Namespace) -> Lines:
    """PSNR to the 1000-step DDIM solution, by full evaluations (both guidance halves) of the network."""
    bench = Bench(pipe, args.seed, args.images, SOLUTION_STEPS)
    runs = {"uncached DDIM-50": Setting(sampler="ddim", steps=50)}
    runs |= {f"uncached {s}, {n} steps": Setting(sampler=s, steps=n) for n in EVALUATIONS for s in SOLVERS}
    for sampler, steps in CACHED:
        for budget in (6, 6.5, 8, 10.5, 13):
            setting = Setting(adacorr=f"budget={budget}", sampler=sampler, steps=steps)
            runs[f"--adacorr {setting.adacorr}, {sampler}, {steps} steps"] = setting
    for label, setting in runs.items():
        row = bench.run("", "", setting)
        score = row.solution_psnr
        # The compute of an uncached run is its share of the bench's steps, that of a cached run a share of its own.
        evaluations = row.compute * (pipe.sampler.num_steps if setting.adacorr is None else setting.steps)
        cells = {"": f"`{label}`", "full evaluations": f"{evaluations:.2f}"}
        cells["PSNR to the solution, mean / p5 (dB)"] = f"{float(score['mean']):.1f} / {float(score['p5']):.1f}"
        yield cells, {"what": label, "evaluations": evaluations, "psnr": score["mean"], "p5": score["p5"]}


def memory(pipe: Pipeline, args: argparse.Namespace) -> Lines:
    """Bytes that a cache holds after a run of one image; a method that refuses the model says why."""
    bench = Bench(pipe, args.seed, 1)
    methods = [(name, make_policy(name).granularity, Setting(name)) for name in available()]
    methods += [("--adacorr", "step", Setting(adacorr="")), ("--adacorr literal", "block", Setting(adacorr="literal"))]
    for name, granularity, setting in methods:
        try:
            held = bench.sample(setting)[1].bytes
            text = f"{held / 1e6:.2f}"
        except ValueError as error:
            held, text = None, f"refused: {error}"
        cells = {"method": f"`{name}`", "granularity": granularity, "MB per image": text}
        yield cells, {"method": name, "granularity": granularity, "bytes": held}


def codebook(pipe: Pipeline, args: argparse.Namespace) -> Lines:
    """Sextiles of the change per step that AdaCache goes by; the noise is that of calibrations."""
    changes = []

    class Watched(AdaCache):
        def rate(self, change: np.ndarray) -> np.ndarray:
            changes.append(change)
            return super().rate(change)

    for indices, labels in batches(args.images, 8, pipe.model.num_classes):
        pipe.sample(SEED_OFFSET + args.seed, indices, labels, CacheManager(Watched(scale=0.0)))
    found = np.concatenate(changes)
    keys = [round(float(key), 3) for key in np.quantile(found, np.arange(1, 6) / 6)]
    text = "/".join(f"{key:g}:{rate}" for key, rate in zip([*keys, 1], range(6, 0, -1), strict=True))
    cells = {"images": str(args.images), "changes": str(len(found)), "codebook": f"`{text}`"}
    yield cells, {"images": args.images, "changes": len(found), "keys": keys}


def show(lines: Iterable[tuple[dict[str, str], dict]], args: argparse.Namespace) -> None:
    """Print a table line by line, and write its records with the arguments and the environment to --out."""
    records = []
    for cells, record in lines:
        print(*([] if records else [head(cells)]), line(cells.values()), sep="\n", flush=True)
        records.append(record)
    if args.out is not None:
        arguments = vars(args) | {"out": str(args.out)}
        write_json(args.out, {"arguments": arguments, "environment": environment(), "rows": records})


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("benchmarks.tables", description=__doc__)
    tables = {"gamma": gamma, "protocol": protocol, "exact": exact, "memory": memory, "codebook": codebook}
    parser.add_argument("table", choices=list(tables))
    add_model_flags(parser)
    parser.set_defaults(seed=4242)
    parser.add_argument("--images", type=number(1, 10_000), default=20)
    parser.add_argument("--out", type=writable, help="JSON file")
    args = parser.parse_args(argv)
    table = tables[args.table]
    return run_command("benchmarks.tables", lambda: show(table(load(ModelOptions.of(args)), args), args))


if __name__ == "__main__":
    sys.exit(main())
