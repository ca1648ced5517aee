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
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pipeline
from adacorr import CacheManager, parse_correction
from adacorr.files import check_writable, written_whole
from adacorr.spec import parse_spec, parse_value
from checkpoint import released_name
from evaluate.bench import WARM_UP, Bench, Setting
from evaluate.compare import parse_methods
from evaluate.features import ENOUGH
from evaluate.fidelity import psnr, ssim
from evaluate.frechet import frechet_distance, moments
from evaluate.motion import difference_distance, frame_features, trajectory_frames
from evaluate.networks import NAMES, Network, default_network, load_network
from evaluate.pages import head, line
from evaluate.results import read_result, write_result
from fid_run.protocol import image_size
from pipeline import ModelOptions, Pipeline
from profiles import check_calibrate
from runtime import Progress, check_range, environment

METHODS = ("teacache", "adacache", "lazydit", "first_block", "fastcache")  # of Table I; first_block is FBCache
TRAJECTORIES = 1000  # images whose predictions t-FID looks at,
EVERY = 5  # taken after so many steps each
UNCACHED = Setting()
SAME = (
    "sampler",
    "num_sampling_steps",
    "cfg_scale",
    "cfg_channels",
    "vae",
    "seed",
    "dtype",
    "num_images",
    "batch_size",
)
SAME += ("repeats", "calibrate")

# ------------------------------------------------------------------------------------------ published values


def published(columns: str, rows: dict[tuple[str | None, str | None], str]) -> dict[Setting, dict[str, str]]:
    """Values as they were published, by setting and column."""
    names = columns.split(", ")
    return {Setting(*key): dict(zip(names, text.split(), strict=True)) for key, text in rows.items()}


TABLE_1 = published(
    "FID, t-FID, PSNR (dB), SSIM, images/s, hit rate (%), memory (GB), latency (ms)",
    {
        (None, None): "4.42 12.11 25.8 .915 11.6 0 18.3 1012",
        ("teacache", None): "5.09 14.72 23.7 .891 15.9 68.5 12.7 702",
        ("teacache", ""): "4.54 13.22 25.1 .907 15.7 77.9 12.8 714",
        ("adacache", None): "4.75 13.55 24.7 .900 15.0 72.4 14.8 768",
        ("adacache", ""): "4.43 13.02 25.3 .911 14.8 78.1 14.9 770",
        ("lazydit", None): "4.91 14.66 23.5 .892 16.2 64.0 13.8 720",
        ("lazydit", ""): "4.55 13.15 25.1 .908 15.8 75.2 13.9 731",
        ("first_block", None): "4.48 13.22 25.1 .908 14.9 78.6 11.5 745",
        ("first_block", ""): "4.38 12.85 25.5 .913 14.7 82.1 11.6 748",
        ("fastcache", None): "4.46 13.15 25.0 .906 15.6 80.5 11.2 750",
        ("fastcache", ""): "4.37 12.78 25.6 .915 15.5 83.5 10.9 732",
    },
)
TABLE_2 = published("FID", {("fastcache", None): "5.89", ("fastcache", ""): "5.62"})
TABLE_3 = published(
    "FID, images/s, hit rate (%)",
    {("fastcache", ""): "4.37 15.7 83.5", ("teacache", ""): "4.49 15.6 79.7", ("first_block", ""): "4.48 15.5 78.9"},
)
TABLE_4 = published(  # the values at gamma = lambda = 1 are those of FastCache in Table I
    "FID, hit rate (%)",
    {
        ("fastcache", "gamma=0.5"): "4.56 75.2",
        ("fastcache", ""): "4.37 83.5",
        ("fastcache", "gamma=2"): "4.65 81.2",
        ("fastcache", "lambda=0.5"): "4.50 72.3",
        ("fastcache", "lambda=2"): "4.62 79.9",
    },
)
PUBLISHED = {"table1": (256, TABLE_1), "table2": (512, TABLE_2), "table3": (256, TABLE_3), "table4": (256, TABLE_4)}
OTHER_MODELS = (
    "Published FID of other models, before and after correction: DiT-B/2 on FFHQ-256 6.13 and 5.97, DiT-L/2 on "
    "LSUN-Church-256 5.72 and 5.55, whose weights were not released. Not in this code base: PixArt-alpha on "
    "ImageNet-256 7.20 and 6.85, SGDiff on COCO-512 8.65 and 8.10, Stable Diffusion on FFHQ-1024 9.11 and 8.72."
)

# ----------------------------------------------------------------------------------------------------- rows


@dataclass
class Row:
    """What one way to sample spent, how good its images are and how near to the uncached ones."""

    checkpoint: str  # its file's name
    checkpoint_sha256: str
    setting: Setting
    images: int
    distance: float | None  # to the reference
    uncached_distance: float  # to the uncached images
    tfid: float | None
    psnr: float | str  # dB, mean over the images that differ from the uncached ones; "inf" where none does
    identical: int  # images that do not differ
    ssim: float
    compute: float
    hit_rate: float
    cache_bytes_per_image: int
    memory: int | None  # bytes: the peak of a GPU while it samples
    latency: float | None  # seconds of one batch
    images_per_second: float | None

    @property
    def key(self) -> tuple[str, Setting]:
        """What the row is of."""
        return self.checkpoint_sha256, self.setting

    @property
    def method(self) -> str | None:
        """Name of the caching method."""
        return None if self.setting.cache is None else parse_spec(self.setting.cache)[0]

    def plain(self) -> dict[str, Any]:
        """The row for JSON."""
        correction = None if self.setting.adacorr is None else parse_correction(self.setting.adacorr)
        known = {} if correction is None else {"gamma": correction.gamma, "lambda": correction.spatial_weight}
        return {**vars(self), "setting": asdict(self.setting), "method": self.method, **known}

    @classmethod
    def of(cls, plain: dict[str, Any]) -> "Row":
        """The row that `plain` describes."""
        values = {f.name: plain[f.name] for f in fields(cls)}
        return cls(**values | {"setting": Setting(**plain["setting"])})


@dataclass
class Cost:
    """What the batches of one setting spent."""

    seconds: list[float] = field(default_factory=list)  # of whole batches
    images: list[int] = field(default_factory=list)
    shares: list[tuple[float, float]] = field(default_factory=list)  # compute and hit rate of each batch
    cache_bytes_per_image: int = 0
    memory: int | None = None

    def add(self, images: int, cache: CacheManager | None, memory: int | None) -> None:
        self.images.append(images)
        self.shares.append((1.0, 0.0) if cache is None else (cache.trace.compute, cache.trace.hit_rate))
        self.cache_bytes_per_image = max(self.cache_bytes_per_image, 0 if cache is None else cache.bytes // images)
        self.memory = memory if self.memory is None else max(self.memory, memory)

    @property
    def means(self) -> list[float]:
        """Compute and hit rate of all images."""
        return np.average(self.shares, axis=0, weights=self.images).tolist()


@dataclass
class Study:
    """A model with its noise, on which settings are measured.

    network       gives the features
    reference     mean and covariance of the reference's features, None without one
    batch         images at once, at most bench.count
    repeats       batches that are timed at least; 0 leaves times out
    trajectories  images that t-FID is taken on
    spool         file of the uncached images, which may be too many for the memory
    """

    bench: Bench
    network: Network
    reference: tuple[np.ndarray, np.ndarray] | None
    batch: int
    repeats: int
    trajectories: int
    spool: Path
    frames: Tensor | None = field(default=None, init=False)  # features of what the uncached run predicts on its way

    def key(self, setting: Setting) -> tuple[str, Setting]:
        """That of the setting's row."""
        return self.bench.pipe.checkpoint.sha256, setting

    @property
    def timed_again(self) -> int:
        """Batches that are sampled for their time alone."""
        return max(self.repeats - self.bench.count // self.batch, 0)

    def units(self, settings: Sequence[Setting]) -> int:
        """Images that are sampled for the rows of `settings`."""
        own = self.bench.count + self.timed_again * self.batch
        cached = sum(setting != UNCACHED for setting in settings)
        return len(settings) * own + (cached + bool(cached)) * self.trajectories

    def measure(self, setting: Setting, progress: Progress) -> Row:
        """The row of a setting. The uncached one comes first: it leaves its images in `spool`."""
        if self.repeats:
            self.bench.sample(setting, self.batch, stop=WARM_UP)
        cost = Cost()
        batches = self._sample(setting, cost, progress)
        scores = self._keep(batches) if setting == UNCACHED else self._compare(batches)
        for _ in range(self.timed_again):
            cost.seconds.append(self.bench.sample(setting, self.batch)[2])
            progress.update(self.batch)
        scores["tfid"] = self._tfid(setting, progress) if self.trajectories else None
        latency = statistics.median(cost.seconds) if self.repeats else None
        checkpoint, (compute, hit_rate) = self.bench.pipe.checkpoint, cost.means
        return Row(
            checkpoint.path.name,
            checkpoint.sha256,
            setting,
            self.bench.count,
            **scores,
            compute=compute,
            hit_rate=hit_rate,
            cache_bytes_per_image=cost.cache_bytes_per_image,
            memory=cost.memory,
            latency=latency,
            images_per_second=latency and self.batch / latency,
        )

    def _keep(self, batches: Iterator[tuple[int, Tensor]]) -> dict[str, Any]:
        """Write the uncached images to `spool`, and score them."""
        size = image_size(self.bench.pipe.model.config, self.bench.pipe.vae)
        with written_whole(self.spool) as temporary:
            shape = self.bench.count, size, size, 3
            kept = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)
            for first, images in batches:
                kept[first : first + len(images)] = images.numpy()
            kept.flush()
        near = {"psnr": "inf", "identical": self.bench.count, "ssim": 1.0}
        return {"distance": self._to_reference(self.uncached_moments), "uncached_distance": 0.0, **near}

    def _compare(self, batches: Iterator[tuple[int, Tensor]]) -> dict[str, Any]:
        """Score cached images beside the uncached ones."""
        features, near = [], []
        for first, images in batches:
            before = self._kept(first, len(images))
            near.append(torch.stack([psnr(before, images), ssim(before, images)]))
            features.append(self.network.features(images).pool)
        own, (decibels, similar) = moments(torch.cat(features)), torch.cat(near, dim=1)
        finite = decibels[decibels.isfinite()]
        return {
            "distance": self._to_reference(own),
            "uncached_distance": frechet_distance(*own, *self.uncached_moments),
            "psnr": finite.mean().item() if len(finite) else "inf",
            "identical": len(decibels) - len(finite),
            "ssim": similar.mean().item(),
        }

    def _sample(self, setting: Setting, cost: Cost, progress: Progress) -> Iterator[tuple[int, Tensor]]:
        """(first image, images (n, H, W, 3) uint8) of each batch; adds to `cost`."""
        device = self.bench.pipe.device
        for first, count in self._batches(self.bench.count):
            memory = None
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            x, cache, seconds = self.bench.sample(setting, count, first=first)
            if device.type == "cuda":
                memory = torch.cuda.max_memory_allocated(device)
            if count == self.batch:
                cost.seconds.append(seconds)
            cost.add(count, cache, memory)
            yield first, self.bench.pipe.decode(x)
            progress.update(count, str(setting) or "uncached")

    def _batches(self, count: int) -> Iterator[tuple[int, int]]:
        """(first image, number of images) of each batch."""
        for first in range(0, count, self.batch):
            yield first, min(self.batch, count - first)

    def _kept(self, first: int, count: int) -> Tensor:
        """Uncached images (count, H, W, 3) from `first` on."""
        return torch.from_numpy(np.load(self.spool, mmap_mode="r")[first : first + count].copy())

    @cached_property
    def uncached_moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and covariance of the uncached images' features."""
        parts = [self.network.features(self._kept(*batch)).pool for batch in self._batches(self.bench.count)]
        return moments(torch.cat(parts))

    def _to_reference(self, own: tuple[np.ndarray, np.ndarray]) -> float | None:
        return None if self.reference is None else frechet_distance(*own, *self.reference)

    def _tfid(self, setting: Setting, progress: Progress) -> float:
        if setting == UNCACHED:
            return 0.0
        if self.frames is None:
            self.frames = self._trajectories(UNCACHED, progress)
        return difference_distance(self._trajectories(setting, progress), self.frames)

    def _trajectories(self, setting: Setting, progress: Progress) -> Tensor:
        """Features (n, F, D) of what a run predicts along its way."""
        bench, parts = self.bench, []
        for first, count in self._batches(self.trajectories):
            indices = np.arange(first, first + count)
            labels, cache = bench.labels(indices), bench.cache(setting)
            frames = trajectory_frames(bench.pipe, bench.seed, indices, labels, cache, EVERY)
            parts.append(frame_features(self.network, frames))
            progress.update(count)
        return torch.cat(parts)


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


def tabulate(command: str, rows: Sequence[Row], known: Sequence[dict[str, str]], network: str) -> dict[str, Any]:
    """Columns and rows of text, as they are printed."""
    name, lines = distance_name(network), []
    shown = name, f"{name} to uncached", "images/s", "hit rate (%)"  # of Table III
    for row, values in zip(rows, known, strict=True):
        text = cells(row, values, network)
        if command == "table3":
            text = {column: text[column] for column in shown if column in text}
            if row.setting.adacorr is not None:
                text = {name: f"{lines[-1][name]} → {after}" for name, after in text.items()}
                lines.pop()
            lines.append({"method": f"`{row.setting.cache or 'uncached'}`", **text})
        else:
            model = {"model": row.checkpoint} if command == "table2" else {}
            lines.append({**model, "setting": f"`{row.setting}`" if row.setting != UNCACHED else "uncached", **text})
    return {"columns": list(lines[0]) if lines else [], "rows": [list(text.values()) for text in lines]}


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
    command, several = parser.get_default("command"), {}
    if command == "table2":
        parser.conflict_handler = "resolve"  # --ckpt and --reference take several there
        several = {"nargs": "+"}
    pipeline.add_model_flags(parser)
    pipeline.add_calibrate_flag(parser)
    parser.set_defaults(seed=4242)
    add = parser.add_argument_group("table").add_argument
    if command == "table1":
        given = "methods with their options, separated by spaces; names alone also by commas"
        add(
            "--methods",
            nargs="+",
            default=METHODS,
            metavar="METHOD[:key=value,...]",
            help=f"{given} (default: all five)",
        )
    if command == "table2":
        add("--ckpt", nargs="+", metavar="FILE", help="one or more; the bundled one by default")
        add("--cache", default="fastcache", metavar="METHOD[:key=value,...]", help="(default %(default)s)")
    if command == "table4":
        add("--cache", metavar="METHOD[:key=value,...]", help="default: AdaCorrection alone, and its literal form")
        add("--gammas", default="0.5,1,2", metavar="N,...", help="at lambda 1 (default %(default)s)")
        add("--lambdas", default="0.5,1,2", metavar="N,...", help="at gamma 1 (default %(default)s)")
    add("--num-images", type=int, default=10, help="2 to 1000000 (default %(default)s; the paper's tables: 50000)")
    add("--batch-size", type=int, default=5, help="images at once (default %(default)s)")
    add("--reference", type=Path, **several, metavar="FILE", help="images or statistics for FID, one for each --ckpt")
    choice = f"{', '.join(NAMES)} (default: cifar10 at 32 px, else inception)"
    add("--features", metavar="NAME", help=f"network of the distances: {choice}")
    add("--weights", type=Path, metavar="FILE", help="of that network")
    add("--repeats", type=int, default=3, help="batches that are timed; 0 leaves times out (default %(default)s)")
    add("--out", type=Path, metavar="FILE.json", help="what was measured; an unfinished file is gone on with")
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
        changes = [
            f"{key}={x:g}" for key in ("gamma", "lambda") for x in numbers(f"--{key}s", getattr(args, f"{key}s"))
        ]
        for cache, prefix in forms:
            plain = prefix.removesuffix(":")  # gamma and lambda are 1 unless given
            settings += [Setting(cache, plain if text.endswith("=1") else prefix + text) for text in changes]
    for setting in settings:
        CacheManager.of(setting.cache, setting.adacorr)
    return list(dict.fromkeys(settings))


def numbers(flag: str, text: str) -> list[float]:
    """Numbers of a list in rising order; ValueError names the first word that is none."""
    found = []
    for word in text.split(","):
        value = parse_value(word.strip())
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1e6:
            raise ValueError(f"{flag}: {word!r} is no number in 0..1000000; give e.g. 0.5,1,2")
        found.append(float(value))
    return sorted(set(found))


def load(options: ModelOptions) -> Pipeline:
    """The pipeline of the options; a model without classes gets no guidance, whatever they ask for."""
    pipe = pipeline.load(replace(options, cfg_scale=1.0))
    return replace(pipe, cfg_scale=options.cfg_scale if pipe.model.num_classes else 1.0)


def known_rows(path: Path, command: str, identity: dict[str, Any]) -> list[Row]:
    """The rows that an earlier run of the command left; ValueError for a file of another table or setting."""
    content = read_result(path, command)
    theirs = content["identity"]
    differing = [f"{k} {theirs.get(k)!r} there, {v!r} here" for k, v in identity.items() if theirs.get(k) != v]
    if differing:
        raise ValueError(f"--out {path} is of another run: {'; '.join(differing)}; give --overwrite, or another --out")
    return [Row.of(plain) for plain in content["rows"]]


def studies_of(args: argparse.Namespace, folder: Path) -> tuple[list[Study], list[str]]:
    """A study of each model, with the uncached images in `folder`, and the digests of their references."""
    several = args.command == "table2"
    ckpts = (args.ckpt if several else [args.ckpt]) or [None]
    references = (args.reference if several or not args.reference else [args.reference]) or []
    if references and len(references) != len(ckpts):
        raise ValueError(f"--reference: {len(references)} given for {len(ckpts)} --ckpt; give one for each, or none")
    options, trajectories = ModelOptions.of(args), 0 if args.command == "table3" else min(args.num_images, TRAJECTORIES)
    pipes = [load(replace(options, ckpt=ckpt)) for ckpt in ckpts]
    if len({pipe.checkpoint.sha256 for pipe in pipes}) < len(pipes):
        raise ValueError("--ckpt: two of the files hold the same weights; give each once")
    sizes = [image_size(pipe.model.config, pipe.vae) for pipe in pipes]
    name = args.features or default_network(sizes[0])
    network = load_network(name, args.weights, pipes[0].device, offline=args.offline)
    studies, digests = [], []
    for i, pipe in enumerate(pipes):
        black = torch.zeros(1, sizes[i], sizes[i], 3, dtype=torch.uint8)
        network.features(black)  # ValueError for a size that the network is not for
        reference = None
        if references:
            from evaluate.fid import reference_statistics

            *reference, _, digest = reference_statistics(references[i], network)
            digests.append(digest)
        bench = Bench(pipe, args.seed, args.num_images, calibrate=args.calibrate)
        stem = args.command if args.out is None else args.out.stem
        spool = folder / f"{stem}.uncached-{pipe.checkpoint.sha256[:8]}.npy"
        batch = min(args.batch_size, args.num_images)
        studies.append(Study(bench, network, reference, batch, args.repeats, trajectories, spool))
    return studies, digests


def refusals(study: Study, settings: Sequence[Setting], allowed: bool) -> dict[str, str]:
    """Methods that refuse the model, for want of a profile most often, and why: each is asked for one step.

    Unless that is `allowed`, the first refusal is raised.
    """
    refused = {}
    for setting in settings:
        if setting.adacorr is None:
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
    check_range("--num-images", args.num_images, 2, 1_000_000)
    check_range("--batch-size", args.batch_size, 1, 100_000)
    check_range("--repeats", args.repeats, 0, 1000)
    check_range("--cfg-scale", args.cfg_scale, 0.0, 100.0)
    check_calibrate(args.calibrate)
    settings = plan(args)
    if args.out is not None:
        check_writable("--out", args.out)
    with ExitStack() as stack:
        folder = args.out.parent if args.out else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        studies, digests = studies_of(args, folder)
        refused = {}
        for study in studies:
            refused |= refusals(study, settings, allowed=args.command == "table3")
        sweep(args, studies, [setting for setting in settings if setting.cache not in refused], digests, refused)


def sweep(
    args: argparse.Namespace,
    studies: Sequence[Study],
    settings: Sequence[Setting],
    digests: Sequence[str],
    refused: dict[str, str],
) -> None:
    """Measure what --out does not hold yet, row by row, and print the table."""
    network = studies[0].network
    identity = {
        "checkpoint_sha256": [study.bench.pipe.checkpoint.sha256 for study in studies],
        "reference_sha256": list(digests),
        "guidance": [study.bench.pipe.cfg_scale for study in studies],
        "features": network.name,
        "features_sha256": network.sha256,
        **{key: getattr(args, key) for key in SAME},
        "device": f"{studies[0].bench.pipe.device.type} of {environment()['device']}",
    }
    taken_over = args.out is not None and args.out.exists() and not args.overwrite
    rows = {row.key: row for row in known_rows(args.out, args.command, identity)} if taken_over else {}
    missing = [[setting for setting in settings if study.key(setting) not in rows] for study in studies]
    for study, own in zip(studies, missing, strict=True):
        if own and own[0] != UNCACHED and not study.spool.exists():
            own.insert(0, UNCACHED)
    texts = notes(args, studies, refused)

    def save() -> dict[str, Any]:
        """The table as far as it goes; rows of settings that are not asked for now stay in the file."""
        found, known = [], []
        for study in studies:
            size, values = PUBLISHED[args.command]
            values = {} if unlike(study, size) else values
            own = [rows[study.key(setting)] for setting in settings if study.key(setting) in rows]
            found += own
            known += [values.get(replace(row.setting, cache=row.method), {}) for row in own]
        table = tabulate(args.command, found, known, network.name)
        if args.out is not None:
            others = [row for row in rows.values() if row not in found]
            plain = [row.plain() for row in [*found, *others]]
            write_result(
                args.out, args.command, args.made_with, identity=identity, rows=plain, table=table, notes=texts
            )
        return table

    table = save()
    total, left = (sum(map(Study.units, studies, parts)) for parts in ([settings] * len(studies), missing))
    say = partial(print, file=sys.stderr, flush=True)
    with Progress(total, "image", args.command, done=total - left, line=say) as progress:
        for study, own in zip(studies, missing, strict=True):
            for setting in own:
                row = study.measure(setting, progress)
                rows[row.key] = row
                table = save()
            study.spool.unlink(missing_ok=True)
    print(head(table["columns"]), *map(line, table["rows"]), "", *texts, sep="\n")
