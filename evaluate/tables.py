"""The tables of the paper (arXiv 2602.13357), on any model.

    python -m evaluate table1 --out t1.json                                 methods, alone and corrected
    python -m evaluate table2 --ckpt a.pt b.pt --reference a.npz b.npz      several models, before and after
    python -m evaluate table3                                               every method that runs on the model
    python -m evaluate table4 --gammas 0.5,1,2 --lambdas 0.5,1,2            the two constants of the correction

All rows share the model, the noise and the labels, which are the classes in turn. A model without classes is sampled
without guidance. FID is the Frechet distance to --reference in Inception features; in those of another network it is
FD-NAME. The same distance is taken to the uncached images of the same noise. t-FID is the distance of the cached run to
the uncached one in how features change from one predicted image to the next (evaluate/motion.py); 1000 images serve it
at most. PSNR and SSIM are per image against the uncached run. Latency is the median over batches, of --repeats at
least, without decoding; images/s is the batch over the latency. Rows are timed one after another, so other jobs on the
machine disturb them unevenly. Memory is the peak of a GPU while it samples, weights included. The hit rate is the share
of branch evaluations that did not run.

A published value stands in brackets where the setting is that of the paper. With --out the JSON is written after each
row, and the same command goes on from the rows that are there.
"""

import argparse
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

import pipeline
from adacorr import CacheManager
from adacorr.command import number, numbers, writable
from checkpoint import released_name
from evaluate.bench import Bench, Setting
from evaluate.compare import parse_methods
from evaluate.fidelity import check_size
from evaluate.frechet import ENOUGH
from evaluate.networks import add_features_flags, network_of
from evaluate.pages import columns_of, table
from evaluate.published import OTHER_MODELS, PUBLISHED
from evaluate.reference import REFERENCES, find_reference, reference
from evaluate.results import differing, read_result, write_result
from evaluate.study import EVERY, UNCACHED, Row, Study
from pipeline import ModelOptions, Pipeline
from profiles import check_calibrate, digest
from runtime import Progress, check_range, environment, say

METHODS = ("teacache", "adacache", "lazydit", "first_block", "fastcache")  # of Table I; first_block is FBCache
TRAJECTORIES = 1000  # images whose predictions t-FID looks at
SAME = ("sampler", "num_sampling_steps", "cfg_scale", "cfg_channels", "vae", "seed", "dtype")
SAME += ("num_images", "batch_size", "repeats", "calibrate")

# --------------------------------------------------------------------------------------------------- tables


def distance_name(network: str) -> str:
    """What the distance in a network's features is called."""
    return "FID" if network == "inception" else f"FD-{network}"


def cells(row: Row, known: dict[str, str], network: str) -> dict[str, str]:
    """Every quantity of a row as text by column, the published value in brackets."""
    name = distance_name(network)
    values = {
        name: None if row.distance is None else f"{row.distance:.4g}",
        f"{name} to uncached": f"{row.uncached_distance:.4g}",
        f"t-{name}": None if row.tfid is None else f"{row.tfid:.4g}",
        "PSNR (dB)": f"{float(row.psnr):.1f}",
        "SSIM": f"{row.ssim:.4f}",
        "images/s": row.images_per_second and f"{row.images_per_second:.3g}",
        "hit rate (%)": f"{row.hit_rate:.1%}"[:-1],
        "compute": f"{row.compute:.3f}",
        "cache MB per image": f"{row.cache_bytes_per_image / 1e6:.2f}",
        "memory (GB)": row.memory and f"{row.memory / 1e9:.1f}",
        "latency (ms)": row.latency and f"{row.latency * 1e3:.0f}",
    }
    return {
        column: f"{text} ({known[column]})" if column in known else text
        for column, text in values.items()
        if text is not None
    }


def tabulate(command: str, rows: Sequence[Row], known: Sequence[dict[str, str]], network: str) -> list[dict[str, str]]:
    """A line of text by column for each row; in Table III one for each method, before → after correction."""
    name, lines = distance_name(network), []
    shown = name, f"{name} to uncached", "images/s", "hit rate (%)"  # of Table III
    for row, values in zip(rows, known, strict=True):
        text = cells(row, values, network)
        if command == "table3":
            text = {column: text[column] for column in shown if column in text}
            if row.setting.adacorr is not None:
                before = lines.pop()
                text = {column: f"{before[column]} → {after}" for column, after in text.items()}
            alone = Setting(row.setting.cache).named.replace("--cache ", "") if row.setting.cache else "`uncached`"
            lines.append({"method": alone, **text})
        else:
            model = {"model": row.checkpoint} if command == "table2" else {}
            lines.append({**model, "setting": row.setting.named if row.setting != UNCACHED else "uncached", **text})
    return lines


def unlike(study: Study, size: int) -> list[str]:
    """What the published values are of and the study is not."""
    pipe, sampler = study.bench.pipe, study.bench.pipe.sampler
    same = {
        f"the released DiT-XL/2 at {size} px": pipe.checkpoint.path.name == released_name("DiT-XL/2", size),
        "DDIM of 50 steps": sampler.spec == "ddim" and sampler.num_steps == 50,
        "guidance 1.5": pipe.cfg_scale == 1.5,
        "50,000 images": study.bench.count == 50_000,
        "FID to a reference": study.network.name == "inception" and study.reference is not None,
    }
    return [what for what, is_so in same.items() if not is_so]


def notes(args: argparse.Namespace, studies: Sequence[Study], refused: dict[str, str]) -> list[str]:
    """What a reader must know beside the table."""
    size, bench = PUBLISHED[args.command][0], studies[0].bench
    guidance = ", ".join(dict.fromkeys(f"{study.bench.pipe.cfg_scale:g}" for study in studies))
    texts = [
        f"{args.sampler} of {args.num_sampling_steps} steps, guidance {guidance}, {bench.count} images of seed "
        f"{args.seed} in batches of {studies[0].batch}, {args.dtype}, features {studies[0].network.name} "
        f"({studies[0].network.convention})."
    ]
    if bench.count < ENOUGH:
        texts.append(f"Distances of {bench.count} images are noticeably too large: compare them within the table only.")
    for study in studies:
        if other := unlike(study, size):
            name = study.bench.pipe.checkpoint.path.name
            texts.append(f"{name}: not comparable with the published values, which are of {', '.join(other)}.")
        else:
            texts.append(
                "In brackets: published. The paper does not define t-FID, hit rate and memory, nor what its PSNR and "
                "SSIM refer to; FID alone compares."
            )
    if args.command == "table2":
        texts.append(OTHER_MODELS)
    if bench.cache(Setting(adacorr="")).profile is not None:
        texts.append(
            "--adacorr goes by a profile of the model, whose schedule says how many steps are computed, whatever "
            "method is corrected and whatever lambda is. With --calibrate off it goes by measured offsets, which "
            "lambda weighs."
        )
    return texts + [f"{method} does not run here: {why}." for method, why in refused.items()]


# --------------------------------------------------------------------------------------------- command line


def add_flags(parser: argparse.ArgumentParser) -> None:
    command = parser.get_default("command")
    if command == "table2":
        parser.conflict_handler = "resolve"  # --ckpt takes several there
    pipeline.add_model_flags(parser)
    pipeline.add_calibrate_flag(parser)
    parser.set_defaults(seed=4242)
    group = parser.add_argument_group("table")
    add = group.add_argument
    if command == "table1":
        given = "methods with their options, separated by spaces; names alone also by commas (default: all five)"
        add("--methods", nargs="+", default=METHODS, metavar="METHOD[:key=value,...]", help=given)
    if command == "table2":
        add("--ckpt", nargs="+", metavar="FILE", help="one or more; the bundled one by default")
        add("--cache", default="fastcache", metavar="METHOD[:key=value,...]", help="(default %(default)s)")
    if command == "table4":
        add("--cache", metavar="METHOD[:key=value,...]", help="default: AdaCorrection alone, and its literal form")
        many = {"type": numbers(0.0, 1e6), "default": "0.5,1,2", "metavar": "N,..."}
        add("--gammas", **many, help="at lambda 1 (default %(default)s)")
        add("--lambdas", **many, help="at gamma 1 (default %(default)s)")
    add("--num-images", type=number(2, 1_000_000), default=10, help="default %(default)s; the paper's tables: 50000")
    add("--batch-size", type=number(1, 100_000), default=5, help="images at once (default %(default)s)")
    names = ", ".join(REFERENCES)
    add("--reference", nargs="+", default=[], metavar="REF", help=f"{names}, images or statistics, one for each --ckpt")
    add_features_flags(group)
    add("--repeats", type=number(0, 1000), default=3, help="batches that are timed, or 0 (default %(default)s)")
    add("--out", type=writable, metavar="FILE.json", help="the table as JSON; an unfinished one is resumed")
    add("--overwrite", action="store_true", help="begin anew where --out exists")


def plan(args: argparse.Namespace) -> list[Setting]:
    """The settings of a table; ValueError for one that is not valid."""
    if args.command == "table1":
        words = [name for word in args.methods for name in (word.split(",") if ":" not in word else [word])]
        pairs = [Setting(spec, form) for spec in words for form in (None, "")]
        settings = [UNCACHED, *pairs, Setting(adacorr=""), Setting(adacorr="literal")]
    elif args.command == "table2":
        settings = [UNCACHED, Setting(args.cache), Setting(args.cache, "")]
    elif args.command == "table3":
        settings = [UNCACHED, *(Setting(name, form) for name in parse_methods("all") for form in (None, ""))]
    else:
        settings = [UNCACHED]
        forms = [(args.cache, "")] if args.cache else [(None, ""), (None, "literal:")]
        changes = [f"{key}={x:g}" for key in ("gamma", "lambda") for x in sorted(getattr(args, f"{key}s"))]
        for cache, prefix in forms:
            plain = prefix.removesuffix(":")  # gamma and lambda are 1 unless given
            settings += [Setting(cache, plain if text.endswith("=1") else prefix + text) for text in changes]
    for setting in settings:
        CacheManager.of(setting.cache, setting.adacorr)
    return list(dict.fromkeys(settings))


def load(options: ModelOptions) -> Pipeline:
    """The pipeline of the options; a model without classes gets no guidance, whatever they ask for."""
    pipe = pipeline.load(replace(options, cfg_scale=1.0))
    return replace(pipe, cfg_scale=options.cfg_scale if pipe.model.num_classes else 1.0)


def known_rows(path: Path, command: str, identity: dict[str, Any]) -> list[Row]:
    """The rows that an earlier run of the command left; ValueError for a file of another table or setting."""
    content = read_result(path, command)
    if lines := differing(content["identity"], identity):
        raise ValueError(f"--out {path} is of another run: {'; '.join(lines)}; give --overwrite, or another --out")
    return [Row.of(plain) for plain in content["rows"]]


def studies_of(args: argparse.Namespace, folder: Path) -> list[Study]:
    """A study of each model, with the uncached images in `folder`."""
    ckpts = (args.ckpt if args.command == "table2" else [args.ckpt]) or [None]
    if args.reference and (given := len(args.reference)) != len(ckpts):
        raise ValueError(f"--reference: {given} given for {len(ckpts)} --ckpt; give one for each, or none")
    paths = [find_reference(name, args.offline) for name in args.reference]
    options, trajectories = ModelOptions.of(args), 0 if args.command == "table3" else min(args.num_images, TRAJECTORIES)
    pipes = [load(replace(options, ckpt=ckpt)) for ckpt in ckpts]
    if len({pipe.checkpoint.sha256 for pipe in pipes}) < len(pipes):
        raise ValueError("--ckpt: two of the files hold the same weights; give each once")
    sizes = [pipe.image_size for pipe in pipes]
    network = network_of(args, sizes[0], pipes[0].device)
    studies = []
    for i, pipe in enumerate(pipes):
        check_size(sizes[i], sizes[i])
        black = torch.zeros(1, sizes[i], sizes[i], 3, dtype=torch.uint8)
        network.features(black)  # ValueError for a size that the network is not for
        real = reference(paths[i], network, pool=False) if paths else None
        bench = Bench(pipe, args.seed, args.num_images, calibrate=args.calibrate)
        stem = args.command if args.out is None else args.out.stem
        spool = folder / f"{stem}.uncached-{pipe.checkpoint.sha256[:8]}.npy"
        batch = min(args.batch_size, args.num_images)
        studies.append(Study(bench, network, real, batch, args.repeats, trajectories, spool))
    return studies


def refusals(studies: Sequence[Study], settings: Sequence[Setting], allowed: bool) -> dict[str, str]:
    """Methods that refuse a model, for want of a profile most often, and why: each is asked for one step.

    Unless that is `allowed`, the first refusal is raised.
    """
    refused = {}
    for study, setting in product(studies, (setting for setting in settings if setting.adacorr is None)):
        try:
            study.bench.sample(setting, 1, stop=1)
        except ValueError as error:
            if setting == UNCACHED or not allowed:
                raise
            refused[setting.cache] = str(error)
    return refused


def run(args: argparse.Namespace) -> None:
    """The whole job. ValueError or OSError for a mistake, before anything is sampled."""
    check_range("--num-sampling-steps", args.num_sampling_steps, EVERY + 1, 1000)
    check_range("--cfg-scale", args.cfg_scale, 0.0, 100.0)
    check_calibrate(args.calibrate)
    settings = plan(args)
    with ExitStack() as stack:
        folder = args.out.parent if args.out else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        studies = studies_of(args, folder)
        refused = refusals(studies, settings, allowed=args.command == "table3")
        sweep(args, studies, [setting for setting in settings if setting.cache not in refused], refused)


def sweep(
    args: argparse.Namespace, studies: Sequence[Study], settings: Sequence[Setting], refused: dict[str, str]
) -> None:
    """Measure what --out does not hold yet, row by row, and print the table."""
    network = studies[0].network
    identity = {
        "checkpoint_sha256": [study.bench.pipe.checkpoint.sha256 for study in studies],
        "reference_sha256": [study.reference.sha256 for study in studies if study.reference],
        "guidance": [study.bench.pipe.cfg_scale for study in studies],
        "profile": [digest(study.bench.cache(Setting(adacorr="")).profile) for study in studies],
        "features": network.name,
        "features_sha256": network.sha256,
        **{key: getattr(args, key) for key in SAME},
        "device": f"{studies[0].bench.pipe.device.type} of {environment()['device']}",
    }
    taken_over = args.out is not None and args.out.exists() and not args.overwrite
    rows = {row.key: row for row in known_rows(args.out, args.command, identity)} if taken_over else {}
    asked = [study.key(setting) for study in studies for setting in settings]
    missing = [[setting for setting in settings if study.key(setting) not in rows] for study in studies]
    for study, own in zip(studies, missing, strict=True):
        if own and own[0] != UNCACHED and not study.spool.exists():
            own.insert(0, UNCACHED)
    texts = notes(args, studies, refused)
    size, values = PUBLISHED[args.command]
    comparable = {study.bench.pipe.checkpoint.sha256 for study in studies if not unlike(study, size)}

    def save() -> list[dict[str, str]]:
        """The table as far as it goes; rows of settings that are not asked for now stay in the file."""
        found = [rows[key] for key in asked if key in rows]
        others = [row for key, row in rows.items() if key not in asked]
        known = [values.get(replace(row.setting, cache=row.method), {}) for row in found]
        known = [own if row.checkpoint_sha256 in comparable else {} for row, own in zip(found, known, strict=True)]
        lines = tabulate(args.command, found, known, network.name)
        plain = [row.plain() for row in [*found, *others]]
        write_result(args, identity=identity, rows=plain, table=columns_of(lines), notes=texts)
        return lines

    lines = save()
    total, left = (sum(map(Study.units, studies, parts)) for parts in ([settings] * len(studies), missing))
    with Progress(total, "image", args.command, done=total - left, line=say) as progress:
        for study, own in zip(studies, missing, strict=True):
            for setting in own:
                row = study.measure(setting, progress)
                rows[row.key] = row
                lines = save()
            study.spool.unlink(missing_ok=True)
    print(table(**columns_of(lines)), "", *texts, sep="\n")
