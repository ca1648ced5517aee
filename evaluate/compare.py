"""Every caching method on one model, alone and under AdaCorrection, swept to the same compute.

    python -m evaluate compare --out docs/compare          # docs/compare.json, .md and .png
    python -m evaluate compare --methods teacache,rfc --levels 0.35,0.15 --out /tmp/some
    python -m evaluate compare --out docs/compare --known /tmp/some.json    # what ran before is not run again

STEM.json is written after each row, so that a run that was stopped goes on with --known STEM.json.

All runs share the model, the noise and the labels. A method's own knob (`Policy.knob`) is moved until it spends each
compute level; where it has variants, the best at that level is kept. Its corrected form keeps that setting, and gamma
is moved until it spends at most 3 % more than the method ("more" marks where it cannot). Settings are searched on the
first few images and then run on all. PSNR and SSIM are per image against the uncached run; `to
solution` is PSNR against DDIM of 1000 steps from the same noise, where fewer steps of DDIM, DPM-Solver++ and UniPC
compete, too. Seconds are medians of --repeats runs after a warm-up, the uncached run taken anew beside each method.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pipeline
import runtime
from adacorr import Algorithm1, CacheManager, available, make_policy, parse_correction
from adacorr.files import check_writable, write_json, written_whole
from adacorr.policy import Knob
from adacorr.spec import hint
from diffusion import make_sampler
from evaluate.fidelity import fidelity

LEVELS = (0.5, 0.35, 0.25, 0.15)
SOLVERS = ("ddim", "dpmsolver++", "dpmsolver++:use_lu_lambdas=true", "unipc")
SAME = ("sampler", "num_sampling_steps", "cfg_scale", "cfg_channels", "seed", "dtype", "num_images", "solution_steps")
NEAR = 0.03  # a compute within this share of the one asked for is close enough to stop a search
REACHED = 0.2  # and one that is further off than this does not stand for the level
TRIES = 8  # runs of one search
NARROW = 0.03  # a knob known this closely, in natural logarithms, is not searched further: compute comes in steps
ENDS = 1.0, 0.03  # compute at the two ends of a knob, as a guess
LOWER = 4  # times that gamma is lowered where all images spend more than the few that it was searched on
GAMMA = Knob("gamma", 1e4, 1e-3)  # more gamma is more compute


@dataclass(frozen=True)
class Setting:
    """One way to sample: the specs of --cache and --adacorr, or a sampler with its steps."""

    cache: str | None = None
    adacorr: str | None = None
    sampler: str | None = None
    steps: int | None = None

    def manager(self) -> CacheManager | None:
        if self.cache is None and self.adacorr is None:
            return None
        policy = None if self.cache is None else make_policy(self.cache)
        correction = None if self.adacorr is None else parse_correction(self.adacorr)
        return CacheManager(policy, correction)

    def __str__(self) -> str:
        if self.sampler is not None:
            return f"--sampler {self.sampler} --num-sampling-steps {self.steps}"
        parts = [f"--cache {self.cache}"] if self.cache else []
        parts += [f"--adacorr {self.adacorr}".strip()] if self.adacorr is not None else []
        return " ".join(parts)


@dataclass
class Row:
    """One line of the tables: what ran, what it spent, how close it came. PSNR and SSIM hold mean, p5 and min."""

    method: str
    form: str  # alone, adacorr or fewer steps
    level: float | None
    setting: Setting
    images: int
    compute: float
    hit_rate: float
    psnr: dict[str, Any]
    ssim: dict[str, Any]
    solution_psnr: dict[str, Any] | None
    bytes_per_image: int
    weights_at_1: float | None = None  # literal form: share of its weights that are 1
    speedup: float | None = None

    @property
    def score(self) -> float:
        return float(self.psnr["mean"])

    def plain(self) -> dict[str, Any]:
        return {**vars(self), "setting": {k: v for k, v in vars(self.setting).items() if v is not None}}


@dataclass
class Bench:
    """The model, the noise and both references; runs settings and remembers them."""

    pipe: pipeline.Pipeline
    seed: int
    labels: Tensor | None
    count: int
    solution_steps: int
    few: int  # images that settings are searched on, the first of all
    rows: dict[tuple[Setting, int], Row] = field(default_factory=dict)
    searched: dict[tuple[str, str], dict[float, Row]] = field(default_factory=dict)  # by method and variant

    @cached_property
    def reference(self) -> Tensor:
        """Images (count, H, W, 3) of the uncached run."""
        return self.pipe.decode(self.states(Setting()))

    @cached_property
    def solution(self) -> Tensor | None:
        """Those of the exact solution, or None without --solution-steps."""
        if not self.solution_steps:
            return None
        return self.pipe.decode(self.states(Setting(sampler="ddim", steps=self.solution_steps)))

    def states(self, setting: Setting, manager: CacheManager | None = None, count: int | None = None) -> Tensor:
        """Final states of the first `count` images, of all by default."""
        pipe, count = self.pipe, count or self.count
        if setting.sampler is not None:
            pipe = replace(pipe, sampler=make_sampler(setting.sampler, setting.steps))
        return pipe.sample(self.seed, np.arange(count), None if self.labels is None else self.labels[:count], manager)

    def run(self, method: str, form: str, setting: Setting, few: bool = False) -> Row:
        """The row of a setting, on all images or on a few; what ran before is not run again."""
        count = min(self.few, self.count) if few else self.count
        if (setting, count) not in self.rows:
            manager = setting.manager()
            images = self.pipe.decode(self.states(setting, manager, count))
            near = fidelity(self.reference[:count], images)
            exact = None if self.solution is None else fidelity(self.solution[:count], images)["psnr"]
            steps = self.pipe.sampler.num_steps
            row = Row(
                method,
                form,
                None,
                setting,
                count,
                compute=setting.steps / steps if manager is None else manager.trace.compute,
                hit_rate=0.0 if manager is None else manager.trace.hit_rate,
                psnr=_summary(near["psnr"]),
                ssim=_summary(near["ssim"]),
                solution_psnr=None if exact is None else _summary(exact),
                bytes_per_image=0 if manager is None else manager.bytes // count,
            )
            if manager is not None and isinstance(manager.correction, Algorithm1):
                row.weights_at_1 = float((manager.trace.weight[1:] == 1).mean())
            self.rows[setting, count] = row
        return self.rows[setting, count]

    def seconds(self, setting: Setting, count: int) -> float:
        """Wall-clock of one run of the first `count` images, decoding left out."""
        wait = torch.cuda.synchronize if self.pipe.device.type == "cuda" else lambda: None
        manager = setting.manager()
        wait()
        start = time.perf_counter()
        self.states(setting, manager, count)
        wait()
        return time.perf_counter() - start


def _summary(scores: dict[str, Any]) -> dict[str, Any]:
    return {key: scores[key] for key in ("mean", "p5", "min")}


# ------------------------------------------------------------------------------------------------- search


def search(
    run: Callable[[float], Row],
    knob: Knob,
    target: float,
    most: float = math.inf,
    tried: dict[float, Row] | None = None,
    first: float | None = None,
) -> Row:
    """The row whose compute is nearest to `target`, and not above `most` if there is one; compute falls along the knob.

    Bisection over whole numbers; false position on logarithmic scales otherwise, with bisection wherever that does not
    halve the interval. `tried` holds what other searches along the same knob have found: it narrows the start, and is
    added to. `first` is a guess to begin with.
    """
    tried = {} if tried is None else tried
    whole = isinstance(knob.low, int) and isinstance(knob.high, int)
    goal = min(target, most)
    slow = False  # the last try did not halve the interval
    for _ in range(TRIES):
        if any(target * (1 - NEAR) <= row.compute <= min(target * (1 + NEAR), most) for row in tried.values()):
            break
        low, high = _interval(tried, knob, goal)
        if whole:
            value = (low + high) // 2
            if abs(high - low) <= 1:
                break
        elif first is not None and first not in tried:
            value = first
        else:
            if _width(low, high) < NARROW:
                break
            share = 0.5 if slow else _share(tried, low, high, goal)
            value = float(f"{low ** (1 - share) * high**share:.4g}")
        tried[value] = run(value)
        slow = not whole and 2 * _width(*_interval(tried, knob, goal)) > _width(low, high)
    if whole:
        for value in _interval(tried, knob, goal):
            tried[value] = tried[value] if value in tried else run(value)
    rows = list(tried.values())
    allowed = [row for row in rows if row.compute <= most] or rows
    return min(allowed, key=lambda row: abs(math.log(row.compute / target)))


def _interval(tried: dict[float, Row], knob: Knob, goal: float) -> tuple[float, float]:
    """The last value along the knob that spends more than the goal and the first after it, or the knob's ends."""
    low, high = knob.low, knob.high
    for value in sorted(tried, reverse=knob.low > knob.high):
        if tried[value].compute > goal:
            low, high = value, knob.high
        elif high == knob.high:
            high = value
    return low, high


def _share(tried: dict[float, Row], low: float, high: float, goal: float) -> float:
    """How far from `low` to `high` a straight line between the two reaches the goal; ends not run are guessed."""
    above, below = (
        math.log(tried[end].compute if end in tried else guess) for end, guess in zip((low, high), ENDS, strict=True)
    )
    share = (above - math.log(goal)) / (above - below) if above > below else 0.5
    return min(max(share, 0.1), 0.9)


def _width(low: float, high: float) -> float:
    return abs(math.log(high / low))


def reached(row: Row, level: float) -> bool:
    """Whether a row stands for a compute level."""
    return abs(row.compute / level - 1) <= REACHED


def with_option(spec: str, *options: str) -> str:
    """A spec with more options: NAME[:key=value,...]."""
    given = ",".join(filter(None, options))
    return f"{spec}{',' if ':' in spec else ':'}{given}" if given else spec


def sweep(bench: Bench, method: str, level: float, gamma: float | None = None) -> tuple[Row, Row] | None:
    """(alone, corrected) at a compute level, or None where the method cannot spend that little or that much.

    Settings are searched on a few images, then run on all; gamma, searched from the one given, is lowered there until
    no more is spent.
    """
    knob = make_policy(method).knob
    found = []
    for variant in knob.variants:

        def alone(value: float, variant: str = variant) -> Row:
            number = f"{value}" if isinstance(value, int) else f"{value:g}"
            return bench.run(method, "alone", Setting(with_option(method, f"{knob.option}={number}", variant)), True)

        row = search(alone, knob, level, tried=bench.searched.setdefault((method, variant), {}))
        if reached(row, level):
            found.append(row)
    if not found:
        return None
    best = max(found, key=lambda row: row.score)

    def corrected(gamma: float, few: bool = True) -> Row:
        return bench.run(method, "adacorr", Setting(best.setting.cache, f"gamma={gamma:g}"), few)

    found = search(corrected, GAMMA, best.compute, most=best.compute * (1 + NEAR), first=gamma)
    best = bench.run(method, "alone", best.setting)
    gamma = gamma_of(found)
    after = corrected(gamma, few=False)
    for _ in range(LOWER):
        if after.compute <= best.compute * (1 + NEAR):
            break
        gamma = float(f"{gamma * 0.75:.4g}")
        after = corrected(gamma, few=False)
    return best, after


def gamma_of(row: Row) -> float:
    return float(row.setting.adacorr.partition("=")[2])


def compare(bench: Bench, methods: list[str], levels: list[float], say: Callable[[str], None]) -> Iterator[Row]:
    """All rows, in the order of the table."""
    own = {}  # --adacorr by itself, whose gamma is where that of a corrected method is searched from
    tried: dict[float, Row] = {}
    for level in levels:
        row = search(
            lambda g: bench.run("adacorr", "adacorr", Setting(None, f"gamma={g:g}"), True), GAMMA, level, tried=tried
        )
        row = own[level] = bench.run("adacorr", "adacorr", row.setting)
        say(f"--adacorr at {level}: {f'{row.score:.1f} dB' if reached(row, level) else 'out of reach'}")
    for method in methods:
        for level in levels:
            pair = sweep(bench, method, level, gamma_of(own[level]))
            if pair is None:
                say(f"{method} at {level}: out of reach")
                continue
            for row in pair:
                yield replace(row, level=level)
            say(f"{method} at {level}: {pair[0].setting.cache}: {pair[0].score:.1f} -> {pair[1].score:.1f} dB")
    for level, row in own.items():
        if reached(row, level):
            yield replace(row, level=level)
    yield bench.run("literal", "adacorr", Setting(None, "literal"))
    for level in levels:
        for sampler in SOLVERS:
            steps = max(1, round(level * bench.pipe.sampler.num_steps))
            name = sampler.replace(":use_lu_lambdas=true", " (log-SNR)")
            yield replace(bench.run(name, "fewer steps", Setting(sampler=sampler, steps=steps)), level=level)
    say("fewer steps: done")


def time_rows(bench: Bench, rows: list[Row], repeats: int, count: int, say: Callable[[str], None]) -> None:
    """Fill in the speed-up of each row on `count` images, method by method with the uncached run beside it."""
    bench.pipe.sample(bench.seed, np.arange(count), None if bench.labels is None else bench.labels[:count], stop=4)
    for method in dict.fromkeys(row.method for row in rows):
        own = [row for row in rows if row.method == method]
        spent: dict[str, list[float]] = {}
        for _ in range(repeats):
            for name, setting in [("", Setting()), *((str(row.setting), row.setting) for row in own)]:
                spent.setdefault(name, []).append(bench.seconds(setting, count))
        for row in own:
            row.speedup = statistics.median(spent[""]) / statistics.median(spent[str(row.setting)])
        say(f"timed {method}")


# ------------------------------------------------------------------------------------------------- output


def summary_table(rows: list[Row], levels: list[float]) -> str:
    """PSNR of each method at each level, alone and corrected."""
    lines = [
        "| PSNR (dB) at compute | " + " | ".join(f"{level:g}" for level in levels) + " |",
        "|---" * (len(levels) + 1) + "|",
    ]
    for method in dict.fromkeys(row.method for row in rows if row.level is not None):
        cells = []
        for level in levels:
            here = [row for row in rows if row.method == method and row.level == level]
            own, computes = ({row.form: getattr(row, what) for row in here} for what in ("score", "compute"))
            if "alone" in own:
                more = computes["adacorr"] > computes["alone"] * (1 + NEAR)
                cells.append(f"{own['alone']:.1f} → {own['adacorr']:.1f}{' (more)' if more else ''}")
            else:
                cells.append(f"{next(iter(own.values())):.1f}" if own else "out of reach")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def level_table(rows: list[Row]) -> str:
    """Every measure of the rows of one level."""
    lines = [
        "| | compute | hit rate | PSNR mean / p5 / min (dB) | to solution (dB) | SSIM | speed-up | MB per image |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        psnr = " / ".join(f"{float(row.psnr[key]):.1f}" for key in ("mean", "p5", "min"))
        exact = "" if row.solution_psnr is None else f"{float(row.solution_psnr['mean']):.1f}"
        speed = "" if row.speedup is None else f"{row.speedup:.2f}x"
        lines.append(
            f"| `{row.setting}` | {row.compute:.3f} | {row.hit_rate:.3f} | {psnr} | {exact} | "
            f"{float(row.ssim['mean']):.4f} | {speed} | {row.bytes_per_image / 1e6:.2f} |"
        )
    return "\n".join(lines)


def markdown(rows: list[Row], levels: list[float], intro: str) -> str:
    """The whole page."""
    parts = ["# Every method at equal compute", intro, summary_table(rows, levels)]
    for level in levels:
        own = [row for row in rows if row.level == level]
        parts += [f"## Compute {level:g}", level_table(own)]
    literal = [row for row in rows if row.method == "literal"]
    if literal:
        share = literal[0].weights_at_1
        parts += [
            "## Algorithm 1 to the letter",
            f"Every block is computed, then blended; {share:.1%} of the correction weights after the first step are 1.",
            level_table(literal),
        ]
    return "\n\n".join(parts) + "\n"


def plot(rows: list[Row], path: Path) -> None:
    """PSNR against compute, an arrow from each method to its corrected form (Figure 3 of the paper)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot(xscale="log", xlabel="compute (executed share of block FLOPs)")
    axes.set_ylabel("PSNR to the uncached run (dB)")
    colours = [f"C{i}" for i in range(10)] + ["black", "gold", "navy", "tomato"]
    methods = list(dict.fromkeys(row.method for row in rows if row.form == "alone"))
    for method, colour in zip(methods, colours, strict=False):
        pairs = [[r for r in rows if r.method == method and r.form == form] for form in ("alone", "adacorr")]
        for before, after in zip(*pairs, strict=True):
            ends = {"xytext": (before.compute, before.score), "xy": (after.compute, after.score)}
            axes.annotate("", **ends, arrowprops={"arrowstyle": "->", "color": colour, "alpha": 0.5})
        x, y = [r.compute for r in pairs[0]], [r.score for r in pairs[0]]
        axes.plot(x, y, "o", color=colour, markerfacecolor="white", label=method)
        axes.plot([r.compute for r in pairs[1]], [r.score for r in pairs[1]], "o", color=colour, markersize=4)
    for name, style in (("adacorr", "k*-"), ("ddim", "--"), ("dpmsolver++ (log-SNR)", "-."), ("unipc", ":")):
        own = sorted((r.compute, r.score) for r in rows if r.method == name and r.level is not None)
        if own:
            style_options = {} if name == "adacorr" else {"color": "grey"}
            label = "--adacorr alone" if name == "adacorr" else f"fewer steps: {name}"
            axes.plot(*zip(*own, strict=True), style, label=label, **style_options)
    axes.set_xticks(LEVELS, [f"{level:g}" for level in LEVELS])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small", title="hollow: alone, filled: corrected")
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


# ------------------------------------------------------------------------------------------- command line


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "compare",
        help="every caching method, alone and under AdaCorrection, at equal compute",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    pipeline.add_model_flags(parser)
    parser.set_defaults(seed=4242, run=run)
    group = parser.add_argument_group("comparison")
    add = group.add_argument
    add("--methods", default="all", metavar="NAME,...", help="default: all that have a knob to sweep")
    add("--levels", default=",".join(f"{x:g}" for x in LEVELS), help="compute levels in 0..1 (default %(default)s)")
    add("--num-images", type=int, default=20, help="labels in turn (default %(default)s)")
    add("--search-images", type=int, default=5, help="settings are searched on so many of them (default %(default)s)")
    add("--solution-steps", type=int, default=1000, help="DDIM steps of the solution; 0 leaves it out (default 1000)")
    add("--repeats", type=int, default=3, help="timed runs of each row; 0 leaves times out (default %(default)s)")
    add("--timed-images", type=int, metavar="N", help="the first N are timed, in one batch (default all)")
    add("--out", type=Path, required=True, metavar="STEM", help="writes STEM.json and STEM.md, STEM.png with --plot")
    add(
        "--known",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="JSON of earlier runs, whose rows are taken over",
    )
    add("--plot", action="store_true", help="needs matplotlib")


def parse_methods(text: str) -> list[str]:
    """Names of a list, or all methods that have a knob; ValueError names the first unknown one."""
    known = [name for name in available() if make_policy(name).knob is not None]
    if text == "all":
        return known
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise ValueError(f"--methods: {name!r} is none of {', '.join(known)}{hint(name, known)}")
    return list(dict.fromkeys(names))


def parse_levels(text: str) -> list[float]:
    """Numbers in 0..1, most compute first; ValueError names the first that is none."""
    levels = []
    for item in text.split(","):
        try:
            level = float(item)
        except ValueError:
            level = math.nan
        if not 0 < level < 1:
            raise ValueError(f"--levels: {item.strip()!r} is no number between 0 and 1; give e.g. 0.5,0.25")
        levels.append(level)
    return sorted(set(levels), reverse=True)


def known_rows(file: Path, identity: dict[str, str]) -> dict[tuple[Setting, int], Row]:
    """All rows that an earlier run tried; ValueError for a file of another model, noise or protocol."""
    try:
        content = json.loads(file.read_text())
        rows = [Row(**{**row, "setting": Setting(**row["setting"])}) for row in content["tried"]]
        theirs = content["identity"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--known {file} is no result of a comparison: {type(error).__name__} {error}") from None
    differing = [f"{k} {theirs.get(k)!r} there, {v!r} here" for k, v in identity.items() if theirs.get(k) != v]
    if differing:
        raise ValueError(f"--known {file} is of another comparison: {'; '.join(differing)}")
    return {(row.setting, row.images): row for row in rows}


def run(args: argparse.Namespace) -> None:
    """The whole job. ValueError or OSError for a mistake, before anything is sampled."""
    methods, levels = parse_methods(args.methods), parse_levels(args.levels)
    runtime.check_range("--num-sampling-steps", args.num_sampling_steps, 2, 1000)  # one step leaves nothing to reuse
    runtime.check_range("--num-images", args.num_images, 1, 10_000)
    runtime.check_range("--search-images", args.search_images, 1, args.num_images)
    runtime.check_range("--solution-steps", args.solution_steps, 0, 1000)
    runtime.check_range("--repeats", args.repeats, 0, 1000)
    if args.timed_images is None:
        args.timed_images = args.num_images
    runtime.check_range("--timed-images", args.timed_images, 1, args.num_images)
    files = {kind: args.out.with_name(f"{args.out.name}.{kind}") for kind in ("json", "md", "png")}
    for file in files.values():
        check_writable("--out", file)
    if args.plot:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise ValueError("--plot needs matplotlib: pip install matplotlib, or leave --plot out") from None
    pipe = pipeline.load(pipeline.ModelOptions.of(args))
    labels = torch.arange(args.num_images) % pipe.model.num_classes if pipe.model.num_classes else None

    def say(text: str) -> None:
        print(text, flush=True)

    for method in methods:  # one that refuses the model or has no profile for it says so now, not after hours
        first = None if labels is None else labels[:1]
        pipe.sample(args.seed, np.arange(1), first, CacheManager(make_policy(method)), stop=1)
    bench = Bench(pipe, args.seed, labels, args.num_images, args.solution_steps, args.search_images)
    identity = {key: str(getattr(args, key)) for key in SAME} | {"checkpoint_sha256": pipe.checkpoint.sha256}
    for file in args.known:
        bench.rows |= known_rows(file, identity)
    settings = {key: str(value) for key, value in vars(args).items() if key not in ("run", "made_with", "command")}
    environment = runtime.environment()

    def save() -> None:
        content = {
            "identity": identity,
            "arguments": settings,
            "made_with": args.made_with,
            "environment": environment,
            "rows": [row.plain() for row in rows],
            "tried": [row.plain() for row in bench.rows.values()],
        }
        write_json(files["json"], json.loads(json.dumps(content)))

    rows: list[Row] = []
    for row in compare(bench, methods, levels, say):
        rows.append(row)
        save()  # what a run that is stopped has found is not lost: --known takes it over
    if args.repeats:
        time_rows(bench, rows, args.repeats, args.timed_images, say)
        save()
    intro = (
        f"`{' '.join(args.made_with)}`: {pipe.checkpoint.path.name}, {args.sampler} of {args.num_sampling_steps} "
        f"steps, guidance {args.cfg_scale:g}, {args.num_images} images of seed {args.seed}, {args.dtype} on "
        f"{environment['device']}, {time.strftime('%Y-%m-%d')}. Alone → under AdaCorrection, at most "
        f"{NEAR:.0%} more compute. Settings were searched on the first {args.search_images} images"
        f"{f'; each row was timed {args.repeats} time(s) on the first {args.timed_images}' if args.repeats else ''}."
    )
    with written_whole(files["md"]) as temporary:
        temporary.write_text(markdown(rows, levels, intro))
    if args.plot:
        plot(rows, files["png"])
    say(summary_table(rows, levels))
    say(", ".join(str(file) for kind, file in files.items() if kind != "png" or args.plot))
