"""The paper's Figures 2 and 5, measured on a model: FILE.json holds the numbers, FILE.png the picture.

    python -m evaluate figure2 --out figure2.json
    python -m evaluate figure5 --setting teacache:threshold=0.2+adacorr --out figure5.json

figure2  Spatial variation over the image: Eq. 2 before its mean over tokens, which is the standard deviation over
         channels of each token of a layer's input. The run is uncached. With guidance its conditional half is shown.
figure5  Three maps by layer and step of a run with a cache, means over images. A skipped layer has no activations.
         Offset and drift are therefore what the uncached network sees: in each step all its layers are given the
         state that the cached run had reached.
           offset    Eq. 3 at lambda 1, of each layer's input against its input in the step before
           drift     relative L2 distance of each layer's output from that of the uncached run in the same step
           hit rate  share of branches (attention, MLP; both guidance halves) of which nothing was executed
"""

import argparse
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pipeline
from adacorr import CacheManager
from adacorr.command import number, writable
from adacorr.offset import channel_deviation, offset_score, spatial_variation, temporal_deviation
from evaluate.bench import Setting
from evaluate.plots import check_matplotlib, picture_beside, save
from evaluate.results import protocol_line, write_result
from models import DiT
from pipeline import Pipeline
from profiles import check_calibrate, with_profile
from runtime import Progress, check_range, say

SHOWN = 5  # steps of figure2 by default
Given = tuple[Tensor, ...]  # what the network is called with: input, timesteps, labels


# ------------------------------------------------------------------------------------------ what is measured


def run_and_record(
    pipe: Pipeline, seed: int, count: int, cache: CacheManager | None, progress: Progress
) -> tuple[Tensor, list[Given]]:
    """(final states, what the network was given first in each step) of the first `count` images.

    A run that takes steps again calls the network more than once in a step; the first call has all images.
    """
    given: list[Given] = []
    finished = 0

    def see(model: DiT, arguments: Given) -> None:
        if len(given) == finished:
            given.append(arguments)

    def observe(step: int, x: Tensor, cache: CacheManager | None) -> None:
        nonlocal finished
        finished = step + 1
        progress.update()

    images = np.arange(count)
    handle = pipe.model.register_forward_pre_hook(see)
    try:
        x = pipe.sample(seed, images, pipe.labels_in_turn(images), cache, observe)
    finally:
        handle.remove()
    return x, given


@torch.inference_mode()
def layer_states(model: DiT, given: Given) -> list[Tensor]:
    """The input of each block and the output of the last for a call of the model: depth + 1 of (rows, T, D)."""
    states: list[Tensor] = []
    watched = [*model.blocks, model.final_layer]
    handles = [m.register_forward_pre_hook(lambda _, arguments: states.append(arguments[0])) for m in watched]
    try:
        model(*given)
    finally:
        for handle in handles:
            handle.remove()
    return states


def variation_maps(
    pipe: Pipeline, seed: int, count: int, layer: int, steps: list[int], progress: Progress
) -> tuple[Tensor, np.ndarray]:
    """(images uint8 (n, H, W, 3), channel deviation of a layer's input (n, steps, rows, columns of tokens))."""
    x, given = run_and_record(pipe, seed, count, None, progress)
    maps = [channel_deviation(layer_states(pipe.model, given[step])[layer][:count]) for step in steps]
    side = pipe.model.input_size // pipe.model.patch_size
    return pipe.decode(x), torch.stack(maps, dim=1).unflatten(2, (side, side)).cpu().numpy()


def drift_maps(pipe: Pipeline, seed: int, count: int, cache: CacheManager, progress: Progress) -> dict[str, np.ndarray]:
    """offset, drift and hit_rate (steps, layers) of a cache, see the module's text; the first step's offset is nan."""
    _, cached = run_and_record(pipe, seed, count, cache, progress)
    hit_rate = (cache.trace.executed == 0).mean(axis=(2, 3, 4))
    _, uncached = run_and_record(pipe, seed, count, None, progress)
    offset, drift = np.full(hit_rate.shape, np.nan), np.zeros(hit_rate.shape)
    before: list[Tensor] = []
    for step, calls in enumerate(zip(cached, uncached, strict=True)):
        # Both guidance halves of an image count as its tokens: (n, halves * T, D).
        here, there = (
            [h.float().unflatten(0, (-1, count)).transpose(0, 1).flatten(1, 2) for h in layer_states(pipe.model, call)]
            for call in calls
        )
        for layer, old in enumerate(before[:-1]):
            score = offset_score(temporal_deviation(here[layer], old), spatial_variation(here[layer]))
            offset[step, layer] = score.mean().item()
        for layer, (out, expected) in enumerate(zip(here[1:], there[1:], strict=True)):
            moved, size = (torch.linalg.vector_norm(h, dim=(1, 2)) for h in (out - expected, expected))
            drift[step, layer] = (moved / size).mean().item()
        before = here
        progress.update(2)
    return {"offset": offset, "drift": drift, "hit_rate": hit_rate}


# --------------------------------------------------------------------------------------------------- drawing


def figure2(content: dict[str, Any], images: Tensor) -> Any:
    """A row for each final image (n, H, W, 3): itself, then its maps. Each step has its own colour scale."""
    from matplotlib.figure import Figure

    maps = np.array(content["variation"])  # (n, steps, rows, columns)
    n, steps = maps.shape[:2]
    figure = Figure(figsize=(1.5 * (steps + 1) + 0.3, 1.5 * n + 1.5), layout="compressed")
    grid = figure.subplots(n, steps + 1, squeeze=False, subplot_kw={"xticks": [], "yticks": []})
    for axes, image in zip(grid[:, 0], images.numpy(), strict=True):
        axes.imshow(image)
    grid[0, 0].set_title("final image", fontsize="small")
    for i, (step, t) in enumerate(zip(content["steps"], content["timesteps"], strict=True)):
        column, values = grid[:, i + 1], maps[:, i]
        column[0].set_title(f"step {step}, t = {t:g}", fontsize="small")
        for axes, own in zip(column, values, strict=True):
            drawn = axes.imshow(own, vmin=values.min(), vmax=values.max())
        bar = figure.colorbar(drawn, ax=column, location="bottom")
        bar.ax.tick_params(labelsize="small")
    title = f"Spatial variation (Eq. 2) of the input of layer {content['layer']}, uncached"
    unit = "standard deviation over channels, in units of the activations"
    figure.suptitle(f"{title}: {unit}\n{content['protocol']}", fontsize="small")
    return figure


def figure5(content: dict[str, Any], maps: dict[str, np.ndarray]) -> Any:
    """Three heat maps (steps, layers): layers up. What is zero or was not measured stays blank on a log scale."""
    from matplotlib.figure import Figure

    titles = {
        "offset": "offset S (Eq. 3, lambda 1)\nin units of the activations",
        "drift": "drift (L2 distance over L2 norm of\nthe uncached output)",
        "hit_rate": "hit rate (share of branches\nthat were not executed)",
    }
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        scale = {"vmin": 0, "vmax": 1} if key == "hit_rate" else {"norm": "log" if (maps[key] > 0).any() else None}
        drawn = axes.imshow(maps[key].T, origin="lower", aspect="auto", interpolation="nearest", **scale)
        axes.set(xlabel="step", ylabel="layer")
        axes.set_title(title, fontsize="small")
        axes.yaxis.get_major_locator().set_params(integer=True)
        figure.colorbar(drawn, ax=axes)
    title = f"{content['setting']}, mean over images; offset and drift as the uncached network sees its states"
    figure.suptitle(f"{title}\n{content['protocol']}", fontsize="small")
    return figure


# ---------------------------------------------------------------------------------------------- command line


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the figure that `command` among the parser's defaults names."""
    pipeline.add_model_flags(parser)
    parser.set_defaults(seed=4242)
    group = parser.add_argument_group("figure")
    add = group.add_argument
    if parser.get_default("command") == "figure2":
        add("--num-images", type=number(1, 64), default=4, help="1..64, labels in turn (default %(default)s)")
        add("--layer", type=int, help="from 0 (default: the middle one)")
        add("--steps", type=int, nargs="+", metavar="STEP", help=f"sampling steps from 0 (default: {SHOWN} of the run)")
    else:
        add("--num-images", type=number(1, 64), default=8, help="1..64, labels in turn (default %(default)s)")
        spec = "METHOD[:key=value,...][+adacorr[:key=value,...]], adacorr or literal (default adacorr)"
        add("--setting", default="adacorr", metavar="SPEC", help=spec)
        pipeline.add_calibrate_flag(group)
    add("--out", type=writable, required=True, metavar="FILE.json", help="writes FILE.json and FILE.png")


def measure_figure2(args: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """Numbers and drawing; ValueError for a mistake, before anything is sampled."""
    last = args.num_sampling_steps - 1
    steps = sorted(set(args.steps or np.linspace(0, last, SHOWN).round().astype(int).tolist()))
    for step in steps:
        check_range("--steps", step, 0, last)
    pipe = pipeline.load(pipeline.ModelOptions.of(args))
    depth = len(pipe.model.blocks)
    layer = depth // 2 if args.layer is None else args.layer
    check_range("--layer", layer, 0, depth - 1)
    with Progress(args.num_sampling_steps, "step", line=say) as progress:
        images, maps = variation_maps(pipe, args.seed, args.num_images, layer, steps, progress)
    content = {"protocol": _protocol(args, pipe), "layer": layer, "steps": steps}
    content |= {"timesteps": pipe.sampler.timesteps[steps].tolist(), "variation": maps.tolist()}
    return content, figure2(content, images)


def measure_figure5(args: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """Numbers and drawing; ValueError for a mistake, before anything is sampled."""
    setting = Setting.of(args.setting)
    cache = CacheManager.of(setting.cache, setting.adacorr)
    check_calibrate(args.calibrate, cache)
    check_range("--num-sampling-steps", args.num_sampling_steps, 2, 1000)  # one step leaves nothing to reuse
    pipe = pipeline.load(pipeline.ModelOptions.of(args))
    cache = with_profile(cache, pipe, args.calibrate)
    with Progress(4 * args.num_sampling_steps, "step", line=say) as progress:
        maps = drift_maps(pipe, args.seed, args.num_images, cache, progress)
    content = {"protocol": _protocol(args, pipe), "setting": cache.spec}
    content |= {key: np.where(np.isnan(values), None, values).tolist() for key, values in maps.items()}
    return content, figure5(content, maps)


def _protocol(args: argparse.Namespace, pipe: Pipeline) -> str:
    return protocol_line(pipe, f"{args.num_images} image{'s' if args.num_images > 1 else ''} of seed {args.seed}")


def run(args: argparse.Namespace) -> None:
    """Measure and draw. ValueError or OSError for a mistake, before the work."""
    check_matplotlib(args.command)
    picture = picture_beside(args.out)
    content, figure = (measure_figure2 if args.command == "figure2" else measure_figure5)(args)
    write_result(args, **content, images=[picture.name])
    save(figure, picture)
    print(picture)
