"""Every caching method on one model, alone and under AdaCorrection, swept to the same compute.

    python -m evaluate compare --out docs/compare          # docs/compare.json, .md and .png
    python -m evaluate compare --methods teacache,rfc --levels 0.35,0.15 --out /tmp/some
    python -m evaluate compare --out docs/compare --known /tmp/some.json    # what ran before is not run again
    python -m evaluate compare --out docs/compare --jobs 2                  # two methods at a time

All runs share the model, the noise and the labels. A method's own knob (`Policy.knob`) is moved until the method spends
each compute level; of its variants the best at that level is kept, and the page reads its curve at the level itself
(evaluate/leaderboard.py). The corrected form keeps that setting, with the largest budget that spends at most 3 % more
than the method. Settings are searched on the first few images and then run on all. PSNR and SSIM are per image against
the uncached run; `to solution` is PSNR against DDIM of 1000 steps from the same noise. Fewer steps of DDIM,
DPM-Solver++ and UniPC are compared, too, of the solvers also on optimised time steps (timesteps.py). The run on all
images is timed, against the first steps of an uncached run right before it.
STEM.json is written after each method: a run that was stopped goes on with --known STEM.json. An earlier STEM.json that
is not among those known is kept as STEM.before.json.
"""

import argparse
import math
import re
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from scipy.optimize import brentq

import pipeline
from adacorr import available, make_policy
from adacorr.command import number
from adacorr.files import check_writable, write_json
from adacorr.policy import Knob
from adacorr.spec import hint, parse_value
from evaluate.bench import NEAR, REACHED, Bench, Row, Rows, Setting
from evaluate.fidelity import check_size
from evaluate.jobs import Job, run_jobs, threads_of
from evaluate.leaderboard import read_comparison, tables, write_page
from evaluate.pages import table
from evaluate.plots import check_matplotlib
from evaluate.results import differing, protocol_line
from profiles import check_calibrate, digest
from runtime import check_range, environment
from timesteps import MOST

LEVELS = (0.5, 0.35, 0.25, 0.15)
SOLVERS = {  # by the name of the row
    "ddim": "ddim",
    "dpmsolver++": "dpmsolver++",
    "dpmsolver++ (log-SNR)": "dpmsolver++:use_lu_lambdas=true",
    "dpmsolver++ (optimised steps)": "dpmsolver++:grid={grid}",
    "unipc": "unipc",
    "unipc (optimised steps)": "unipc:grid={grid}",
}
SAME = ("sampler", "num_sampling_steps", "cfg_scale", "cfg_channels", "vae", "seed", "dtype", "num_images")
SAME += ("solution_steps", "calibrate")
TRIES = 8  # runs of one search
CLOSE = 0.06  # a search ends this close to its level, since a method's curve is read at the level itself
NARROW = 0.03  # a knob known this closely, in natural logarithms, is not searched further: compute comes in steps
ENDS = 1.0, 0.03  # compute at the two ends of a knob, as a guess
CLEAR = 2.0  # dB: a variant that is this far behind the best one although it spends as much is not searched further
LEAST = 2.5  # evaluations that --adacorr needs in any case
say = partial(print, flush=True)

# ------------------------------------------------------------------------------------------------- search


def search(
    run: Callable[[float], Row],
    knob: Knob,
    target: float,
    tried: dict[float, Row] | None = None,
    hopeless: Callable[[Row], bool] = lambda row: False,
) -> Row:
    """The row whose compute is nearest to `target`; compute falls along the knob.

    Bisection over whole numbers, Brent's method on logarithmic scales otherwise, until a row is within CLOSE of the
    target, or `hopeless`. `tried` holds rows along the same knob by its value: they narrow the search, and it adds to
    them.
    """
    tried = {} if tried is None else tried

    def excess(value: float) -> float:
        """Logarithm of compute over the target, 0 where the search ends."""
        if value not in tried:
            tried[value] = run(value)
        row = tried[value]
        close = abs(row.compute / target - 1) <= CLOSE
        return 0.0 if close or hopeless(row) else math.log(row.compute / target)

    known = {value: excess(value) for value in tried}
    if 0.0 not in known.values():
        guess = max(math.log(ENDS[0] / target), 0.1), min(math.log(ENDS[1] / target), -0.1)
        known = {knob.low: guess[0], knob.high: guess[1], **known}
        values = sorted(known, reverse=knob.low > knob.high)
        last = max((i for i, value in enumerate(values[:-1]) if known[value] > 0), default=0)
        low, high = values[last], values[: last + 2][-1]  # the target lies between them

        def at(logarithm: float) -> float:
            value = float(f"{math.exp(logarithm):.4g}")
            return known[value] if value in (low, high) else excess(value)

        if isinstance(knob.low, int):
            step = 1 if low <= high else -1
            whole = range(int(low), int(high) + step, step)
            # Runs both neighbours of the target, or ends before.
            while whole and (over := excess(whole[middle := len(whole) // 2])):
                whole = whole[middle + 1 :] if over > 0 else whole[:middle]
        elif known[low] > 0 > known[high]:
            brentq(at, math.log(low), math.log(high), xtol=NARROW, maxiter=TRIES, disp=False)
    return min(tried.values(), key=lambda row: abs(math.log(row.compute / target)))


def tune(bench: Bench, method: str, spec: str, knob: Knob, target: float, best: Row | None) -> Row:
    """`search` on a few images, with the knob's value in the place of {} in the spec of the method.

    Rows of the same knob narrow it, whether another search ran them or they are --known. The search ends where the
    spec is clearly behind the `best` row of another one, though it spends as much.
    """
    pattern = re.compile(re.escape(str(Setting(spec))).replace(r"\{\}", r"([-+.\de]+)"))
    found = [(pattern.fullmatch(str(setting)), row) for (setting, n), row in bench.rows.items() if n == bench.few]
    tried = {float(match[1]): row for match, row in found if match}

    def hopeless(row: Row) -> bool:
        return best is not None and row.compute >= best.compute and row.score < best.score - CLEAR

    def run(value: float) -> Row:
        return bench.run(method, "alone", Setting(spec.replace("{}", f"{value:g}")), few=True)

    return search(run, knob, target, tried, hopeless)


def reached(row: Row, level: float) -> bool:
    """Whether a row stands for a compute level."""
    return abs(row.compute / level - 1) <= REACHED


def sweep(bench: Bench, method: str, level: float) -> tuple[Row, Row] | None:
    """(alone, corrected) at a compute level, or None where the method cannot spend that little or that much.

    Settings are searched on a few images, then run on all.
    """
    knob, best = make_policy(method).knob, None
    for variant in knob.variants:
        spec = ",".join(filter(None, (f"{method}:{knob.option}={{}}", variant)))
        row = tune(bench, method, spec, knob, level, best)
        if reached(row, level) and (best is None or row.score > best.score):
            best = row
    if best is None:
        return None
    alone = bench.run(method, "alone", best.setting)
    return alone, correct(bench, method, alone)


def correct(bench: Bench, method: str, alone: Row) -> Row:
    """The method under AdaCorrection, with the largest budget at which it spends at most NEAR more than alone."""
    most = alone.compute * (1 + NEAR)

    def run(evaluations: float, few: bool = True) -> Row:
        return bench.run(method, "adacorr", Setting(alone.setting.cache, f"budget={evaluations:g}"), few)

    # In halves of an evaluation, of which the gates may leave one unused.
    budget = max(math.floor(2 * most * bench.pipe.sampler.num_steps) / 2 + 0.5, LEAST)
    while run(budget).compute > most and budget > LEAST:
        budget -= 0.5
    return run(budget, few=False)


# --------------------------------------------------------------------------------------------- comparison


def of_itself(levels: list[float], bench: Bench) -> list[Row]:
    """The rows of AdaCorrection without a method, and of Algorithm 1 to the letter."""
    rows = []
    for level in levels:
        budget = max(level * bench.pipe.sampler.num_steps, LEAST)
        row = bench.run("adacorr", "adacorr", Setting(None, f"budget={budget:g}"))
        if reached(row, level):
            rows.append(replace(row, level=level))
            say(f"--adacorr at {level}: {row.score:.1f} dB")
        else:
            say(f"--adacorr at {level}: out of reach")
    return [*rows, bench.run("literal", "adacorr", Setting(None, "literal"))]


def of_method(method: str, levels: list[float], bench: Bench) -> list[Row]:
    """The rows of a method, alone and corrected in turn."""
    rows, remark = [], make_policy(method).remark
    for level in levels:
        pair = sweep(bench, method, level)
        if pair is None:
            say(f"{method} at {level}: out of reach")
            continue
        rows += [replace(row, level=level, method=f"{method} ({remark})" if remark else method) for row in pair]
        say(f"{method} at {level}: {pair[0].setting.cache}: {pair[0].score:.1f} -> {pair[1].score:.1f} dB")
    return rows


def of_solver(name: str, levels: list[float], bench: Bench) -> list[Row]:
    """The rows of a sampler with fewer steps."""
    rows, grid = [], "optimized" if bench.pipe.vae is None else "optimized-latent"
    for level in levels:
        steps = max(1, round(level * bench.pipe.sampler.num_steps))
        if "{grid}" in SOLVERS[name] and not 2 <= steps <= MOST:
            say(f"{name} at {level}: out of reach")
            continue
        row = bench.run(name, "fewer steps", Setting(sampler=SOLVERS[name].format(grid=grid), steps=steps))
        rows.append(replace(row, level=level))
    return rows


def jobs_of(methods: list[str], levels: list[float]) -> list[Job[list[Row]]]:
    """The jobs whose rows, one after the other, are the comparison."""
    named = [partial(of_method, method, levels) for method in methods]
    return [partial(of_itself, levels), *named, *(partial(of_solver, name, levels) for name in SOLVERS)]


# ------------------------------------------------------------------------------------------- command line


def add_flags(parser: argparse.ArgumentParser) -> None:
    pipeline.add_model_flags(parser)
    pipeline.add_calibrate_flag(parser)
    parser.set_defaults(seed=4242)
    add = parser.add_argument_group("comparison").add_argument
    add("--methods", default="all", metavar="NAME,...", help="default: all that have a knob to sweep")
    add("--levels", default=",".join(f"{x:g}" for x in LEVELS), help="compute levels in 0..1 (default %(default)s)")
    add("--num-images", type=number(1, 10_000), default=20, help="labels in turn (default %(default)s)")
    add("--search-images", type=int, default=2, help="settings are searched on so many of them (default %(default)s)")
    add("--solution-steps", type=number(0, 1000), default=1000, help="of DDIM, for the solution, or 0 (default 1000)")
    add("--out", type=Path, required=True, metavar="STEM", help="writes STEM.json and STEM.md, STEM.png with --plot")
    add("--jobs", type=number(1, 256), default=1, help="processes side by side, each with its model (default 1)")
    known = "JSON of earlier runs, whose rows are taken over"
    add("--known", type=Path, nargs="+", default=[], metavar="FILE", help=known)
    add("--plot", action="store_true", help="needs matplotlib")


def parse_methods(text: str) -> list[str]:
    """Names of a list, or all methods that have a knob; ValueError names the first unknown one."""
    known = [name for name in available() if make_policy(name).knob is not None]
    names = known if text == "all" else list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in known:
            raise ValueError(f"--methods: {name!r} is none of {', '.join(known)}{hint(name, known)}")
    return names


def parse_levels(text: str) -> list[float]:
    """Numbers in 0..1, most compute first; ValueError names the first that is none."""
    levels = {item.strip(): parse_value(item.strip()) for item in text.split(",")}
    for item, level in levels.items():
        if not (isinstance(level, float) and 0 < level < 1):
            raise ValueError(f"--levels: {item!r} is no number between 0 and 1; give e.g. 0.5,0.25")
    return sorted(set(levels.values()), reverse=True)


def known_rows(file: Path, identity: dict[str, str], profile: str | None) -> Rows:
    """The rows that an earlier run tried, those under AdaCorrection only if it had the same profile of the model.

    profile: its digest. ValueError for a file of another model, noise or protocol.
    """
    _, content = read_comparison(file)
    if lines := differing(content["identity"], identity):
        raise ValueError(f"--known {file} is of another comparison: {'; '.join(lines)}")
    rows, same = content["tried"], content.get("profile") == profile
    return {(row.setting, row.images): row for row in rows if same or row.setting.adacorr in (None, "literal")}


def make_bench(args: argparse.Namespace, rows: Rows) -> Bench:
    """The bench of a comparison, with the rows that are known. ValueError for a model that does not fit the flags."""
    pipe = pipeline.load(pipeline.ModelOptions.of(args))
    check_size(pipe.image_size, pipe.image_size)
    given = args.seed, args.num_images, args.solution_steps, args.search_images, args.calibrate
    return Bench(pipe, *given, timed=True, rows=rows)


def run(args: argparse.Namespace) -> None:
    """The whole job. ValueError or OSError for a mistake, before anything is sampled."""
    methods, levels = parse_methods(args.methods), parse_levels(args.levels)
    check_range("--num-sampling-steps", args.num_sampling_steps, 2, 1000)  # one step leaves nothing to reuse
    check_range("--search-images", args.search_images, 1, args.num_images)
    check_calibrate(args.calibrate)
    files = {kind: args.out.with_name(f"{args.out.name}.{kind}") for kind in ("json", "md", "png")}
    for file in files.values():
        check_writable("--out", file)
    if args.plot:
        check_matplotlib("--plot")
    bench = make_bench(args, {})
    pipe, machine = bench.pipe, environment()
    for method in methods:  # one that refuses the model or has no profile for it says so now, not after hours
        bench.sample(Setting(method), count=1, stop=1)
    identity = {key: str(getattr(args, key)) for key in SAME} | {"checkpoint_sha256": pipe.checkpoint.sha256}
    profile = digest(bench.cache(Setting(adacorr="")).profile)
    for file in args.known:
        bench.rows |= known_rows(file, identity, profile)
    intro = (
        f"`{' '.join(args.made_with)}`: {protocol_line(pipe, f'{args.num_images} images of seed {args.seed}')}, "
        f"{args.dtype} on {machine['device']}, {time.strftime('%Y-%m-%d')}. Alone → under "
        f"AdaCorrection, at most {NEAR:.0%} more compute. Settings were searched on the first {args.search_images} "
        f"images; seconds are of one run, against uncached steps right before it."
    )
    if args.jobs > 1:
        intro += f" {args.jobs} processes ran side by side; threads of each: {threads_of(args.jobs)}."
    record = {
        "identity": identity,
        "profile": profile,
        "arguments": {k: str(v) for k, v in vars(args).items() if k not in ("made_with", "command")},
        "made_with": args.made_with,
        "environment": machine,
        "intro": intro,
    }
    found: dict[int, list[Row]] = {}  # by the job
    if files["json"].exists() and files["json"].resolve() not in map(Path.resolve, args.known):  # hours of work
        say(f"kept as {files['json'].rename(files['json'].with_suffix('.before.json'))}: the earlier {files['json']}")

    def save() -> list[Row]:
        rows = [row for _, own in sorted(found.items()) for row in own]
        tried = [row.plain() for row in bench.rows.values()]
        content = {**record, "rows": [row.plain() for row in rows], "tried": tried}
        write_json(files["json"], content, indent=None)  # thousands of rows: indents are a sixth of the file
        return rows

    try:
        for number, own in run_jobs(bench, jobs_of(methods, levels), args.jobs, partial(make_bench, args, bench.rows)):
            found[number] = own
            save()
    finally:
        rows = save()  # what a run that is stopped has found is not lost: --known takes it over
    write_page(rows, intro, files["md"], files["png"] if args.plot else None)
    say(table(*next(tables(rows))))
    say(", ".join(str(file) for kind, file in files.items() if kind != "png" or args.plot))
