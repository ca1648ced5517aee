"""Train a class-conditional DiT on images, on a CPU, on a GPU, or on several with torchrun.

    python train.py --data cifar10-train.npz --model DiT-Ti/2 --out runs/x
    python train.py --data photos --image-size 64 --model DiT-S/4 --out runs/y --precision bf16 --compile
    torchrun --nproc-per-node 4 train.py --data cifar10-train.npz --model DiT-S/2 --out runs/z --precision bf16

The same command again goes on from the last checkpoint in --out; sample.py --ckpt runs/x/ema.safetensors draws from
the averaged weights. --data is a folder of class folders, or an .npz of packed images or of latents: see data.py.

The exit code is 0 at the end or after --minutes, 1 after a loss that is not finite, 2 after an error (one line on
stderr), 75 after SIGTERM or SIGUSR1 and 130 after Ctrl-C. A signal during training saves first.
"""

import argparse
import json
import math
import pickle
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import torch.distributed as dist
from filelock import AcquireReturnProxy, FileLock, Timeout
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import runtime
from adacorr.command import Failure, Parser, number
from adacorr.files import check_writable, write_json, written_whole
from checkpoint import save_checkpoint
from data import Data, find_data, order, read_data
from diffusion import NUM_TRAIN
from models import DiT, DiT_models
from objective import Objective
from ranks import PATIENCE, Ranks, end_with_launcher, run_script, started_again
from runtime import Interrupted, Progress, Signals, seed_words

STEP = 1  # the random streams of a seed for the draws of a step; data.ORDER numbers those for the order of images
ENDING = 5.0  # seconds that processes of an earlier start may take to end
TIME_IS_UP = 1  # why a run stops early; the other reasons are numbers of signals, which are higher

# ------------------------------------------------------------------------------------------------- options


def flag(default: Any, text: str, low: float | None = None, high: float | None = None, **how: Any) -> Any:
    """A field that is a flag of the command line, with its help, its range and what else argparse is told."""
    return field(default=default, metadata={"help": text, "range": (low, high), "how": how})


@dataclass(frozen=True)
class Recipe:
    """What makes a run what it is. A resumed run must have the same, but at a constant rate it may take more steps."""

    model: str = flag("DiT-Ti/2", ", ".join(sorted(DiT_models)), choices=DiT_models, metavar="NAME")
    image_size: int | None = flag(None, "crop and resize images to this; by default all must be alike", 1, 4096)
    learn_sigma: bool = flag(False, "predict variances, too, by the hybrid loss")
    label_dropout: float = flag(0.1, "share of null labels, for guidance", 0.0, 1.0)
    flip: bool = flag(True, "mirror half of the images, never latents")
    batch_size: int = flag(256, "images per step, over all ranks", 1, 2**20)
    steps: int = flag(100_000, "of the whole run, all calls together", 1, 10**9)
    lr: float = flag(1e-4, "learning rate of AdamW", 0.0, 10.0)
    schedule: str = flag("constant", "cosine falls to 0 at --steps", choices=["constant", "cosine"])
    warmup_steps: int = flag(0, "of linear warm-up, fewer than --steps")
    weight_decay: float = flag(0.0, "of AdamW", 0.0, 10.0)
    clip: float = flag(1.0, "largest norm of the gradient; 0 never clips", 0.0, 1e9)
    ema_decay: float = flag(0.9999, "of the averaged weights, less at first", 0.0, 1.0)
    seed: int = flag(0, "of weights, order, flips, noise", 0, 2**63 - 1)
    precision: str = flag("fp32", "bf16 is autocast", choices=["fp32", "bf16"])

    def rate(self, step: int) -> float:
        """Learning rate of step 0, 1, ...: up in a straight line, then constant or down to 0 along half a cosine."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.lr
        done = (step - self.warmup_steps) / (self.steps - self.warmup_steps)
        return self.lr * 0.5 * (1 + math.cos(math.pi * done))

    def decay(self, step: int) -> float:
        """Decay of the average at step 0, 1, ...: low at first, so that it does not remember the initial weights."""
        return min(self.ema_decay, (1 + step) / (10 + step))


@dataclass(frozen=True)
class Options(Recipe):
    """All flags: the recipe, and what may change from call to call."""

    data: Path = flag(None, "folder of class folders, or .npz", required=True)
    out: Path = flag(None, "folder of state.pt, ema.safetensors, log.jsonl, run.json", required=True)
    overwrite: bool = flag(False, "begin anew where --out holds a run; otherwise it is resumed")
    minutes: float | None = flag(None, "stop this call cleanly after so long, start-up included", 0.0, 1e6)
    save_every: int = flag(5000, "steps from checkpoint to checkpoint", 1, 10**9, metavar="STEPS")
    log_every: int = flag(50, "steps from line to line of log.jsonl", 1, 10**6, metavar="STEPS")
    compile: bool = flag(False, "torch.compile: slow to start, then faster")
    device: str | None = flag(None, "default: cuda where there is one, else cpu; each rank takes its own")
    debug: bool = flag(False, "show where an error was raised")


def parse(argv: Sequence[str]) -> Options:
    """The flags of a command line."""
    parser = Parser("train.py", description=__doc__)
    for f in fields(Options):
        how = {"default": f.default, "help": f.metadata["help"], **f.metadata["how"]}
        if f.type is bool:
            how["action"] = argparse.BooleanOptionalAction if f.default else "store_true"
        else:
            low, high = f.metadata["range"]
            how["type"] = (get_args(f.type) or [f.type])[0] if low is None else number(low, high)
            how["help"] += "" if f.default is None else " (default %(default)s)"
        parser.add_argument(f"--{f.name.replace('_', '-')}", **how)
    return Options(**vars(parser.parse_args(argv)))


def check(options: Options, ranks: Ranks) -> None:
    """Mistakes that show before anything is read: ValueError or OSError names the flag and the value."""
    runtime.check_range("--warmup-steps", options.warmup_steps, 0, options.steps - 1)
    if options.batch_size % ranks.world:
        raise ValueError(f"--batch-size {options.batch_size} cannot be divided among {ranks.world} ranks")
    patch, size = DiT_models[options.model].keywords["patch_size"], options.image_size
    if size is not None and size % patch:
        raise ValueError(f"--image-size {size} is no multiple of {patch}, the patches of --model {options.model}")
    ranks.device(options.device)
    check_writable("--out", options.out / "state.pt")
    find_data(options.data)


# ------------------------------------------------------------------------------------------------- training


class Trainer:
    """Weights, their average and the optimiser, and one step of them.

    Nothing random is carried on from step to step. What a step draws follows from (seed, step) alone, and the order of
    the images from (seed, epoch): the step in a checkpoint is all the random state there is. Every rank draws for the
    whole batch and takes its own rows, so the number of ranks plays no part either.
    """

    def __init__(self, recipe: Recipe, data: Data, model: DiT, ranks: Ranks, device: torch.device) -> None:
        self.recipe, self.data, self.ranks, self.device = recipe, data, ranks, device
        self.done, self.seconds = 0, 0.0  # steps of the run, and the time they took, all calls together
        self.model = model.to(device).train()
        # Labels are dropped in `batch`: the embedder's own dropout draws from the global generator, which a resumed
        # run and the other ranks cannot know.
        model.y_embedder.eval()
        self.ema = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.weights, self.averages = list(trained.values()), [self.ema[name] for name in trained]
        self.optimizer = torch.optim.AdamW(self.weights, recipe.lr, weight_decay=recipe.weight_decay, fused=True)
        self.objective = Objective(recipe.learn_sigma, device)
        self.net: Any = model
        if ranks.world > 1:
            group = dist.new_group(backend="nccl" if device.type == "cuda" else "gloo")
            self.net = DistributedDataParallel(model, process_group=group, gradient_as_bucket_view=True)
        self.generator = torch.Generator(device)
        self.images, self.labels = data.images, data.labels.to(device)
        if device.type == "cuda" and data.images.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
            self.images = data.images.to(device)

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """This rank's rows of a step: x_0 and noise (n, C, H, W), timesteps and labels (n,)."""
        recipe, size = self.recipe, self.recipe.batch_size
        share = size // self.ranks.world
        mine = slice(self.ranks.rank * share, (self.ranks.rank + 1) * share)
        self.generator.manual_seed(int(seed_words(recipe.seed, STEP, step).generate_state(1, np.uint64)[0]) >> 1)
        drawn = {"generator": self.generator, "device": self.device}
        t = torch.randint(NUM_TRAIN, (size,), **drawn)[mine]
        mirrored, dropped = torch.rand(2, size, **drawn)[:, mine]
        noise = torch.randn(size, *self.images.shape[1:], **drawn)[mine]

        index = torch.from_numpy(order(recipe.seed, len(self.images), step * size, size)[mine])
        here = self._send(index)
        x0 = self.images[here] if self.images.device == self.device else self._send(self.images[index])
        if not self.data.latent:
            x0 = x0.float() / 127.5 - 1
            if recipe.flip:
                x0 = torch.where((mirrored < 0.5).view(-1, 1, 1, 1), x0.flip(3), x0)
        labels = self.labels[here].masked_fill(dropped < recipe.label_dropout, self.model.num_classes)
        return x0, noise, t, labels

    def _send(self, tensor: Tensor) -> Tensor:
        """To the device without waiting for it."""
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def update(self, step: int) -> Tensor:
        """Step 0, 1, ... of the run -> this rank's loss and the norm of the gradient, (2,) on the device."""
        recipe = self.recipe
        x0, noise, t, labels = self.batch(step)
        x_t = self.objective.diffuse(x0, t, noise)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
            out = self.net(x_t, t, labels)
        loss = self.objective(out, x0, x_t, t, noise)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.weights, recipe.clip or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, self.weights, 1 - recipe.decay(step))
        return torch.stack([loss.detach(), norm])

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `write_state` has written."""
        self.done, self.seconds = state["step"], state["seconds"]
        self.model.load_state_dict(state["model"])
        for name, tensor in self.ema.items():
            tensor.copy_(state["ema"][name])
        self.optimizer.load_state_dict(state["optimizer"])


def train(options: Options, trainer: Trainer, deadline: float, signals: Signals) -> int:
    """Steps until --steps, the deadline (time.perf_counter) or a signal; returns TIME_IS_UP, the signal or 0.

    Losses stay on the device until a line is logged. Failure names the first step whose loss or gradient is not finite,
    before anything of it is saved.
    """
    ranks, out = trainer.ranks, options.out
    leader, logged, loss, began = ranks.rank == 0, trainer.done, math.nan, time.perf_counter() - trainer.seconds
    pending = torch.zeros(options.log_every, 2, device=trainer.device)  # loss and norm of the steps not yet logged

    def said() -> str:
        return f"loss {loss:.4f}, {progress.rate * options.batch_size:,.0f} images/s"

    show = {"shown": leader, "line": partial(print, flush=True)}
    with Progress(options.steps, "step", str(out), done=trainer.done, **show) as progress:
        for step in range(trainer.done, options.steps):
            pending[step - logged] = trainer.update(step)
            done = trainer.done = step + 1
            stop = ranks.highest(signals.number or TIME_IS_UP * (time.perf_counter() > deadline))
            last = done == options.steps or stop > 0
            save = last or done % options.save_every == 0
            if save or done % options.log_every == 0:
                values = ranks.mean(pending[: done - logged].cpu())
                with ranks.said_once():
                    check_finite(values, logged, out)
                loss, logged, trainer.seconds = values[:, 0].mean().item(), done, time.perf_counter() - began
                if leader:
                    log(out / "log.jsonl", trainer, values.double().mean(0).tolist())
            if save and leader:
                write_state(out, trainer)
            progress.update(1, said)
            if last:
                break
    return stop


def check_finite(values: Tensor, before: int, out: Path) -> None:
    """Failure for the first step whose loss or norm is not; values (n, 2) of steps before + 1, ..., before + n."""
    wrong = (~values.isfinite()).nonzero()
    if len(wrong):
        row, column = wrong[0].tolist()
        what = f"{('loss', 'gradient')[column]} is {values[row, column].item()} at step {before + row + 1}"
        kept = f"{out / 'state.pt'} is left as it was" if (out / "state.pt").exists() else "nothing was saved yet"
        raise Failure(f"the {what}; {kept}; try a lower --lr, --warmup-steps or --precision fp32")


# ------------------------------------------------------------------------------------------------- files


def log(path: Path, trainer: Trainer, means: list[float]) -> None:
    """One line of log.jsonl: means since the line before, totals since the first step."""
    done, recipe = trainer.done, trainer.recipe
    line = {"step": done, "loss": means[0], "grad_norm": means[1], "lr": recipe.rate(done - 1)}
    line |= {"images": done * recipe.batch_size, "seconds": round(trainer.seconds, 3)}
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


def write_state(out: Path, trainer: Trainer) -> None:
    """state.pt, all that a resumed run needs, and then ema.safetensors; each appears whole or not at all."""
    data, model, done = trainer.data, trainer.model, trainer.done
    options = {f.name: getattr(trainer.recipe, f.name) for f in fields(Recipe)}
    state = {"step": done, "seconds": trainer.seconds, "options": options, "data": data.digest, "config": model.config}
    state |= {"class_names": data.class_names, "model": model.state_dict()}
    state |= {"ema": trainer.ema, "optimizer": trainer.optimizer.state_dict()}
    with written_whole(out / "state.pt") as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # torch's word for a disk that is full
            raise OSError(f"{out / 'state.pt'} cannot be written: {error}") from error
    save_checkpoint(out / "ema.safetensors", trainer.ema, model.config, class_names=data.class_names, step=str(done))


def read_state(out: Path, recipe: Recipe) -> dict[str, Any] | None:
    """The checkpoint to go on from, or None; ValueError if it is another run's, with each option that differs."""
    path = out / "state.pt"
    if not path.exists():
        if (out / "ema.safetensors").exists():
            raise ValueError(f"--out {out} holds ema.safetensors without state.pt: take another, or --overwrite")
        return None
    fixed = [f.name for f in fields(Recipe) if f.name != "steps" or recipe.schedule == "cosine"]
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        pairs = {name: (state["options"][name], getattr(recipe, name)) for name in fixed}
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError) as error:
        why = str(error).partition("\n")[0]
        raise ValueError(f"{path} cannot be resumed ({why}): move it away, or --overwrite") from error
    differing = [f"{name} was {there!r}, is {here!r}" for name, (there, here) in pairs.items() if there != here]
    if differing:
        way = "give them as they were, or --overwrite to begin anew"
        raise ValueError(f"--out {out} holds a run with other options: {'; '.join(differing)}; {way}")
    return state


def lock(out: Path) -> AcquireReturnProxy:
    """The lock of the folder, held until it is released. ValueError if another run works there."""
    out.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(out / "lock").acquire(timeout=ENDING)
    except Timeout:
        raise ValueError(f"--out {out} is in use by another run: wait for its end, or take another folder") from None


def prepare_folder(out: Path, start: int, overwrite: bool) -> None:
    """Clear what an overwritten run left, or one that was killed while it wrote or after its last checkpoint."""
    leftovers = [*out.glob(".*.tmp")]
    if overwrite:
        leftovers += [out / "state.pt", out / "ema.safetensors"]
    for path in leftovers:
        path.unlink(missing_ok=True)
    path, kept = out / "log.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(ValueError, KeyError, TypeError):  # of a line that was cut short
            kept += [f"{line}\n"] if json.loads(line)["step"] <= start else []
    with written_whole(path) as temporary:
        temporary.write_text("".join(kept))


# ------------------------------------------------------------------------------------------------- the job


def run(options: Options | None, ranks: Ranks) -> None:
    """The whole job on this rank; other ranks than 0 take the options from there.

    ValueError or OSError for a mistake, Failure for what broke later, LeaderFailed if rank 0 has said why.
    """
    began, signals, leads = time.perf_counter(), Signals(), ranks.rank == 0
    with ExitStack() as stack:
        ranks.open()
        if leads:
            stack.enter_context(signals)
            check(options, ranks)
            if options.overwrite and started_again():  # --overwrite was for the first start
                options = replace(options, overwrite=False)
            stack.enter_context(lock(options.out))
        # The others wait in C++, where no handler of Python's runs: their signals are still the system's.
        options = ranks.from_leader(options)
        if not leads:
            stack.enter_context(signals)
        work(options, ranks, signals, began)


def work(options: Options, ranks: Ranks, signals: Signals, began: float) -> None:
    """All that comes once rank 0 has checked the options and locked the folder; `began` on the clock of the process."""
    out = options.out
    say = partial(print, flush=True) if ranks.rank == 0 else lambda *_: None
    with ranks.said_once():
        device = ranks.device(options.device)
        state = None if options.overwrite else read_state(out, options)
        if state is not None and state["step"] >= options.steps:
            say(f"{out} is done: {state['step']} steps; give more --steps or another --out")
            ranks.close()
            return
        data = read_data(options.data, options.image_size)
        if state is not None and state["data"] != data.digest:
            raise ValueError(f"--out {out} was trained on other data than {options.data}: give that, or --overwrite")
        torch.manual_seed(int(seed_words(options.seed, STEP, 0xFFFFFFFF).generate_state(1)[0]))  # of the first weights
        model = DiT_models[options.model](
            input_size=data.images.shape[3],
            in_channels=data.images.shape[1],
            num_classes=data.num_classes,
            learn_sigma=options.learn_sigma,
            class_dropout_prob=options.label_dropout,
        )
    found = data.digest, state and state["step"]
    if ranks.from_leader(found) != found:
        raise ValueError("this process finds other data or another state.pt than process 0")
    ranks.barrier(PATIENCE)
    if device.type == "cuda":
        runtime.allow_tf32(True)
    trainer = Trainer(options, data, model, ranks, device)
    if options.compile:
        trainer.net = torch.compile(trainer.net, dynamic=False)
    if state is not None:
        trainer.load(state)
    start, state = trainer.done, None  # the state is as large as everything on the device
    record = {
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()},
        "environment": runtime.environment(),
        "data": {"images": list(data.images.shape), "classes": data.num_classes, "sha256": data.digest},
        "model": model.config,
        "parameters": sum(p.numel() for p in trainer.weights),
        "ranks": ranks.world,
    }
    if ranks.rank == 0:
        prepare_folder(out, start, options.overwrite)
        write_json(out / "run.json", record)
    say(f"{'model':8} {options.model}, {record['parameters'] / 1e6:.2f} M parameters")
    say(f"{'data':8} {len(data.images)} of {tuple(data.images.shape[1:])} in {data.num_classes} classes")
    say(f"{'device':8} {device}, {ranks.world} rank{'s' * (ranks.world > 1)}, {options.precision}")
    say(f"{'resumed' if start else 'new':8} at step {start}, in {out}")
    deadline = math.inf if options.minutes is None else began + 60 * options.minutes
    with signals.deferred():
        stop = train(options, trainer, deadline, signals)
        ranks.close()
        say(f"{'saved':8} {out / 'ema.safetensors'} and state.pt at step {trainer.done} of {options.steps}")
    if stop > TIME_IS_UP:  # another rank was sent the signal
        raise Interrupted(stop)


def main(argv: Sequence[str] | None = None) -> int:
    return run_script("train.py", argv, parse, run)


if __name__ == "__main__":
    end_with_launcher()
    sys.exit(main())
