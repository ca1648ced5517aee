"""Train a class-conditional DiT on images, on a CPU, on a GPU, or on several with torchrun.

    python train.py --data cifar10-train.npz --model DiT-Ti/2 --out runs/x
    python train.py --data photos --image-size 64 --model DiT-S/4 --out runs/y --precision bf16 --compile
    torchrun --nproc-per-node 4 train.py --data cifar10-train.npz --model DiT-S/2 --out runs/z --precision bf16

The same command again goes on from the last checkpoint in --out; sample.py --ckpt runs/x/ema.safetensors draws from
the averaged weights. --data is one of

    folder     a folder for each class, with images in it
    .npz       packed images: jpeg, offsets, labels, classes (files one after another, the places where they begin)
    .npz       latents (N, C, H, W), of unit variance, and labels (N,), encoded beforehand

The exit code is 0 at the end or after --minutes, 1 after a loss that is not finite, 2 after an error (one line on
stderr), 130 after Ctrl-C and 143 after SIGTERM, both of which save first.
"""

import argparse
import hashlib
import io
import json
import math
import pickle
import signal
import sys
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import pipeline
import runtime
import sample
from adacorr.command import Parser
from adacorr.files import check_writable, write_json, written_whole
from diffusion import NUM_TRAIN, make_sampler, respace, respaced_schedule
from download import Checkpoint, build_model, save_checkpoint
from models import DiT, DiT_models
from ranks import Ranks

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
ORDER, STEP = 0, 1  # what a random stream is for
QUIET = 30  # seconds between two lines of progress where there is no terminal to draw a bar on
SAMPLE_STEPS, SAMPLE_CFG = 25, 1.5
# Options that make a run what it is: a resumed one must have the same. --steps joins them with the cosine schedule.
FIXED = (
    *("model", "image_size", "batch_size", "lr", "weight_decay", "schedule", "warmup_steps", "ema_decay", "clip"),
    *("label_dropout", "flip", "learn_sigma", "precision", "seed"),
)


class NonFinite(Exception):
    """A loss or a gradient that is infinite or undefined."""


def make_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    names = f"{', '.join(sorted(DiT_models))} (default %(default)s)"
    parser = Parser("train.py", description=__doc__, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument_group("data and model").add_argument
    add("--data", type=Path, required=True, help="folder of class folders, or .npz")
    add("--model", choices=sorted(DiT_models), metavar="NAME", default="DiT-Ti/2", help=names)
    add("--image-size", type=int, help="crop and resize images to this; the default takes them as they are, all alike")
    add("--learn-sigma", action="store_true", help="predict variances, too, by the hybrid loss")
    add("--label-dropout", type=float, default=0.1, help="share of null labels, for guidance (default %(default)s)")
    add("--flip", action=argparse.BooleanOptionalAction, default=True, help="mirror half of the images, never latents")

    add = parser.add_argument_group("training").add_argument
    add("--batch-size", type=int, default=256, help="images per step, over all ranks (default %(default)s)")
    add("--steps", type=int, default=100_000, help="of the whole run, all calls together (default %(default)s)")
    add("--minutes", type=float, help="stop this call cleanly after so long, start-up included, to be resumed")
    add("--lr", type=float, default=1e-4, help="of AdamW (default %(default)s)")
    add("--schedule", choices=["constant", "cosine"], default="constant", help="cosine falls to 0 at --steps")
    add("--warmup-steps", type=int, default=0, help="of linear warm-up (default %(default)s)")
    add("--weight-decay", type=float, default=0.0, help="(default %(default)s)")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient; 0 never clips (default %(default)s)")
    add("--ema-decay", type=float, default=0.9999, help="of the averaged weights, less at first (default %(default)s)")
    add("--seed", type=int, default=0, help="of weights, order, flips, noise (default %(default)s)")
    add("--precision", choices=["fp32", "bf16"], default="fp32", help="bf16 is autocast (default %(default)s)")
    add("--compile", action="store_true", help="torch.compile: slow to start, then faster")
    add("--device", help="default: cuda where there is one, else cpu; each rank takes its own")

    add = parser.add_argument_group("output").add_argument
    add("--out", type=Path, required=True, help="folder of state.pt, ema.safetensors, log.jsonl, run.json, samples/")
    add("--overwrite", action="store_true", help="begin anew where --out holds a run; otherwise it is resumed")
    add("--save-every", type=int, default=5000, metavar="STEPS", help="checkpoint (default %(default)s)")
    add("--log-every", type=int, default=50, metavar="STEPS", help="a line of log.jsonl (default %(default)s)")
    add("--sample-every", type=int, default=0, metavar="STEPS", help="a grid of samples; 0, the default, is never")
    add("--debug", action="store_true", help="show where an error was raised")
    return parser


# ------------------------------------------------------------------------------------------------- data


@dataclass
class Data:
    """All there is to train on, decoded once."""

    images: Tensor  # (N, 3, H, W) uint8, or latents (N, C, H, W) float32
    labels: Tensor  # (N,) int64
    class_names: list[str] | None
    num_classes: int
    digest: str  # sha256 of what was read: decoders differ from machine to machine, files do not

    @property
    def latent(self) -> bool:
        return self.images.is_floating_point()


def read_data(path: Path, image_size: int | None = None) -> Data:
    """The folder or .npz; ValueError for what cannot be read or is of mixed sizes, OSError if it is not there."""
    if path.is_dir():
        return read_folder(path, image_size)
    if not path.exists():
        raise FileNotFoundError(f"--data {path} does not exist")
    readers = (({"jpeg", "offsets", "labels", "classes"}, read_packed), ({"latents", "labels"}, read_latents))
    if not zipfile.is_zipfile(path):
        raise ValueError(f"--data {path} is neither a folder of class folders nor a .npz")
    try:
        with np.load(path, allow_pickle=False) as file:
            for needed, read in readers:
                if needed <= set(file.files):
                    return read(path, {key: file[key] for key in needed}, image_size)
            held = ", ".join(file.files) or "nothing"
    except (EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"--data {path} is damaged, copy it again: {error}") from error
    raise ValueError(
        f"--data {path} holds {held}; packed images are jpeg, offsets, labels, classes, and latents are latents, labels"
    )


def read_folder(path: Path, image_size: int | None) -> Data:
    """PATH/CLASS/IMAGE, classes in alphabetical order; files that are no images by their names are passed over."""
    classes = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    files, labels = [], []
    for label, folder in enumerate(classes):
        found = sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise ValueError(f"--data {path}: the class folder {folder.name} holds no {', '.join(IMAGE_SUFFIXES)}")
        files += found
        labels += [label] * len(found)
    if not files:
        raise ValueError(f"--data {path} holds no class folders; put the images into one folder for each class")
    digest = hashlib.sha256()

    def contents() -> Iterable[tuple[str, bytes]]:
        for file in files:
            content = file.read_bytes()
            digest.update(f"{file.relative_to(path).as_posix()} {len(content)}\n".encode() + content)
            yield str(file), content

    images = stack_images(contents(), len(files), image_size)
    names = [folder.name for folder in classes]
    return Data(images, torch.tensor(labels), names, len(names), digest.hexdigest())


def read_packed(path: Path, arrays: dict[str, np.ndarray], image_size: int | None) -> Data:
    """Image i is the file jpeg[offsets[i]:offsets[i + 1]], of class classes[labels[i]]."""
    names = [str(name) for name in arrays["classes"]]
    labels = check_labels(path, arrays["labels"], len(arrays["offsets"]) - 1, len(names))
    offsets, packed = arrays["offsets"].astype(np.int64), arrays["jpeg"]
    if packed.dtype != np.uint8 or offsets[0] != 0 or offsets[-1] != len(packed) or (np.diff(offsets) <= 0).any():
        raise ValueError(f"--data {path}: offsets do not lead from 0 to the {len(packed)} bytes of jpeg")
    spans = zip(offsets[:-1], offsets[1:], strict=True)
    contents = ((f"{path}, image {i}", packed[start:end].tobytes()) for i, (start, end) in enumerate(spans))
    images = stack_images(contents, len(labels), image_size)
    return Data(images, labels, names, len(names), digest_arrays(packed, offsets, labels.numpy()))


def read_latents(path: Path, arrays: dict[str, np.ndarray], image_size: int | None) -> Data:
    """Latents as the model is to see them; there are as many classes as the highest label says."""
    latents = arrays["latents"]
    if image_size is not None:
        raise ValueError("--image-size is for images: latents come encoded at their size")
    if latents.ndim != 4 or latents.shape[2] != latents.shape[3] or latents.dtype.kind != "f":
        raise ValueError(f"--data {path}: latents {latents.shape} {latents.dtype} are not (N, C, H, H) of floats")
    if not np.isfinite(latents).all():
        raise ValueError(f"--data {path}: the latents hold infinite or undefined values; encode them again")
    labels = check_labels(path, arrays["labels"], len(latents), None)
    count = 1 + int(labels.max())
    digest = digest_arrays(latents, labels.numpy())
    return Data(torch.from_numpy(latents.astype(np.float32)), labels, None, count, digest)


def check_labels(path: Path, labels: np.ndarray, count: int, num_classes: int | None) -> Tensor:
    """Labels (N,) int64; ValueError unless there is one for each of the `count` images, within range."""
    if count < 1:
        raise ValueError(f"--data {path} holds no images")
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise ValueError(f"--data {path}: labels {labels.shape} {labels.dtype} are not {count} whole numbers")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (num_classes is not None and high >= num_classes):
        bound = "" if num_classes is None else num_classes - 1
        raise ValueError(f"--data {path}: label {low if low < 0 else high} is outside 0..{bound}")
    return torch.from_numpy(labels.astype(np.int64))


def digest_arrays(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.shape} {array.dtype}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def stack_images(contents: Iterable[tuple[str, bytes]], count: int, size: int | None) -> Tensor:
    """Names and files of `count` images -> (count, 3, H, H) uint8; with `size` cropped and resized to it."""
    images = first = None
    for i, (name, content) in enumerate(tqdm(contents, "images", count, disable=None, leave=False)):
        try:
            with Image.open(io.BytesIO(content)) as opened:
                image = opened.convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:
            raise ValueError(f"{name} cannot be read as an image: {error}") from error
        if size is not None and image.size != (size, size):
            image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
        if images is None:
            if image.width != image.height:
                raise ValueError(f"{name} is {image.width} x {image.height}, not square: give --image-size")
            first, images = name, np.empty((count, 3, image.height, image.width), np.uint8)
        if (image.height, image.width) != images.shape[2:]:
            sizes = f"{name} is {image.width} x {image.height}, but {first} is {images.shape[3]} x {images.shape[2]}"
            raise ValueError(f"{sizes}: give --image-size to crop and resize them all")
        images[i] = np.asarray(image).transpose(2, 0, 1)
    return torch.from_numpy(images)


# ------------------------------------------------------------------------------------------- randomness

# Nothing random is ever carried on from step to step. Whatever a step draws follows from (seed, step) alone, and the
# order of the images from (seed, epoch): the step in a checkpoint is all the random state there is. Every rank draws
# for the whole batch and takes its own rows, so the number of ranks plays no part either.


def words(seed: int, stream: int, counter: int) -> np.random.SeedSequence:
    # The high half of the seed comes last, as in pipeline.gaussian: lengths must not depend on its size.
    return np.random.SeedSequence([seed & 0xFFFFFFFF, stream, counter, seed >> 32])


class Order:
    """Positions 0, 1, 2, ... -> images: one permutation of all `count` images after another, an epoch each."""

    def __init__(self, seed: int, count: int) -> None:
        self.seed, self.count = seed, count
        self._epoch, self._images = -1, np.empty(0, np.int64)

    def __call__(self, start: int, length: int) -> np.ndarray:
        """The images at positions start..start + length - 1: (length,) int64. They may span epochs."""
        parts = []
        while length > 0:
            epoch, place = divmod(start, self.count)
            if epoch != self._epoch:
                generator = np.random.Generator(np.random.Philox(words(self.seed, ORDER, epoch)))
                self._epoch, self._images = epoch, generator.permutation(self.count)
            part = self._images[place : place + length]
            parts.append(part)
            start, length = start + len(part), length - len(part)
        return np.concatenate(parts)


# ------------------------------------------------------------------------------------------- loss, rates


class Objective:
    """Mean squared error of the predicted noise and, with `learn_sigma`, the variational bound for the variances.

    The sum is L_hybrid = L_simple + 0.001 L_vlb of Nichol & Dhariwal 2021, Eq. 16: L_vlb is a sum over 1000 timesteps,
    of which a row is one, so that the factors cancel. In the bound the predicted noise is a constant.
    """

    def __init__(self, learn_sigma: bool, device: torch.device | str = "cpu") -> None:
        beta, abar, before = respaced_schedule(respace(NUM_TRAIN))
        posterior = beta * (1 - before) / (1 - abar)  # Ho et al. 2020, Eq. 7
        posterior[0] = posterior[1]  # 0 has no logarithm; the samplers put the same for it
        rows = [
            np.sqrt(abar),
            np.sqrt(1 - abar),
            beta * np.sqrt(before) / (1 - abar),
            np.log(posterior),
            np.log(beta),
        ]
        self.learn_sigma = learn_sigma
        self.table = torch.tensor(np.stack(rows), dtype=torch.float32, device=device)  # (5, 1000)

    def _at(self, t: Tensor) -> Tensor:
        return self.table[:, t].view(5, -1, 1, 1, 1)  # (5, N, 1, 1, 1)

    def diffuse(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps: (N, C, H, W)."""
        signal, sigma = self._at(t)[:2]
        return signal * x0 + sigma * noise

    def __call__(self, out: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The loss, a scalar, of the network's output (N, C or 2C, H, W)."""
        out, channels = out.float(), x0.shape[1]
        eps, v = out[:, :channels], out[:, channels:]
        loss = (eps - noise).square().mean()
        if self.learn_sigma:
            loss = loss + self.bound(eps.detach(), v, x0, x_t, t).mean()
        return loss

    def bound(self, eps: Tensor, v: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The term of L_vlb at each row's timestep, in bits per dimension: (N,).

        For t > 0 the divergence of p(x_{t-1} | x_t) from q(x_{t-1} | x_t, x_0), for t = 0 minus the log likelihood of
        x_0 among 256 levels of [-1, 1]. The log variance of p goes from the posterior's at v = -1 to log beta at 1.
        """
        signal, sigma, mean_x0, log_posterior, log_beta = self._at(t)
        share = (v + 1) / 2
        log_variance = share * log_beta + (1 - share) * log_posterior
        error = x0 - (x_t - sigma * eps) / signal  # of the predicted x_0, which is the mean at t = 0
        divergence = log_variance - log_posterior - 1 + (log_posterior - log_variance).exp()
        divergence = 0.5 * (divergence + (mean_x0 * error).square() * (-log_variance).exp())
        scale, half = (-0.5 * log_variance).exp(), 1 / 255
        above = torch.special.ndtr((error + half) * scale).masked_fill(x0 > 0.999, 1.0)  # the end levels are open
        below = torch.special.ndtr((error - half) * scale).masked_fill(x0 < -0.999, 0.0)
        likelihood = (above - below).clamp_min(1e-12).log()
        nats = torch.where((t == 0).view(-1, 1, 1, 1), -likelihood, divergence)
        return nats.flatten(1).mean(1) / math.log(2)


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """The rate of step 0, 1, ...: up in a straight line, then constant or down to 0 along half a cosine."""
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    if args.schedule == "constant":
        return args.lr
    done = (step - args.warmup_steps) / (args.steps - args.warmup_steps)
    return args.lr * 0.5 * (1 + math.cos(math.pi * done))


def ema_decay(step: int, decay: float) -> float:
    """Decay at step 0, 1, ...: low at first, so that the average does not remember the initial weights."""
    return min(decay, (1 + step) / (10 + step))


# -------------------------------------------------------------------------------------------- training


class Trainer:
    """Weights, their average and the optimiser, and one step of them."""

    def __init__(self, args: argparse.Namespace, data: Data, model: DiT, ranks: Ranks, device: torch.device) -> None:
        self.args, self.ranks, self.device = args, ranks, device
        self.model = model.to(device).train()
        # Labels are dropped in `batch`: the embedder's own dropout draws from the global generator, which a resumed
        # run and the other ranks cannot know.
        model.y_embedder.eval()
        self.ema = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.weights, self.averages = list(trained.values()), [self.ema[name] for name in trained]
        self.optimizer = torch.optim.AdamW(self.weights, args.lr, weight_decay=args.weight_decay, fused=True)
        self.objective = Objective(args.learn_sigma, device)
        self.net: Any = model
        if ranks.world > 1:
            ids = [device.index] if device.type == "cuda" else None
            self.net = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
        if args.compile:
            self.net = torch.compile(self.net, dynamic=False)

        self.order = Order(args.seed, len(data.images))
        self.generator = torch.Generator(device)
        self.flip = args.flip and not data.latent
        self.images, self.labels = data.images, data.labels.to(device)
        if device.type == "cuda" and data.images.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
            self.images = data.images.to(device)

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """This rank's rows of a step: x_0 and noise (n, C, H, W), timesteps and labels (n,)."""
        size, device = self.args.batch_size, self.device
        share = size // self.ranks.world
        mine = slice(self.ranks.rank * share, (self.ranks.rank + 1) * share)
        self.generator.manual_seed(int(words(self.args.seed, STEP, step).generate_state(1, np.uint64)[0]) >> 1)
        drawn = {"generator": self.generator, "device": device}
        t = torch.randint(NUM_TRAIN, (size,), **drawn)[mine]
        mirrored, dropped = torch.rand(2, size, **drawn)[:, mine]
        noise = torch.randn(size, *self.images.shape[1:], **drawn)[mine]

        index = torch.from_numpy(self.order(step * size, size)[mine])
        here = self._send(index)
        x0 = self.images[here] if self.images.device == device else self._send(self.images[index])
        if x0.dtype == torch.uint8:
            x0 = x0.float() / 127.5 - 1
        if self.flip:
            x0 = torch.where((mirrored < 0.5).view(-1, 1, 1, 1), x0.flip(3), x0)
        labels = self.labels[here].masked_fill(dropped < self.args.label_dropout, self.model.num_classes)
        return x0, noise, t, labels

    def _send(self, tensor: Tensor) -> Tensor:
        """To the device without waiting for it."""
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def update(self, step: int) -> Tensor:
        """Step 0, 1, ... of the run -> this rank's loss and the norm of the gradient, (2,) on the device."""
        args = self.args
        x0, noise, t, labels = self.batch(step)
        x_t = self.objective.diffuse(x0, t, noise)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            out = self.net(x_t, t, labels)
        loss = self.objective(out, x0, x_t, t, noise)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.weights, args.clip or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, self.weights, 1 - ema_decay(step, args.ema_decay))
        return torch.stack([loss.detach(), norm])

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the trainer; sample.py reads it, too, and takes the average."""
        return {"model": self.model.state_dict(), "ema": self.ema, "optimizer": self.optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        for name, tensor in self.ema.items():
            tensor.copy_(state["ema"][name])
        self.optimizer.load_state_dict(state["optimizer"])


def train(
    args: argparse.Namespace, data: Data, trainer: Trainer, start: int, seconds: float, deadline: float
) -> tuple[int, int]:
    """Steps `start`.. until --steps, the deadline (time.perf_counter) or a signal -> (steps done, exit code).

    `seconds` were spent in earlier calls. Losses stay on the device until a line is logged. NonFinite names the first
    step that went wrong, before anything is saved.
    """
    ranks, began = trainer.ranks, time.perf_counter()
    progress = Progress(args, start, ranks.rank == 0)
    pending = torch.zeros(args.log_every, 2, device=trainer.device)  # loss and norm of the steps not yet logged
    logged = start
    with signals() as caught:
        for step in range(start, args.steps):
            done = step + 1
            pending[step - logged] = trainer.update(step)
            code = ranks.highest(caught[0] if caught else int(time.perf_counter() > deadline))
            last = done == args.steps or code > 0
            save = last or done % args.save_every == 0
            if save or done % args.log_every == 0:
                values = ranks.mean(pending[: done - logged].clone()).cpu()
                check_finite(values, logged, args.out)
                spent = seconds + time.perf_counter() - began
                if ranks.rank == 0:
                    log(args, done, values.double().mean(0).tolist(), spent)
                progress.show(done, values[:, 0].mean().item())
                logged = done
            if save and ranks.rank == 0:
                write_state(args, data, trainer, done, spent)
            if args.sample_every and (last or done % args.sample_every == 0) and ranks.rank == 0:
                write_samples(args, data, trainer, done)
            progress.step()
            if last:
                break
    progress.close()
    return done, 0 if code == 1 else code


@contextmanager
def signals() -> Iterator[list[int]]:
    """A list that gets the exit code of the first SIGTERM or Ctrl-C; the second acts as if nobody caught it."""
    caught: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: Any) -> None:
        caught.append(128 + number)
        restore()

    for number in before:
        signal.signal(number, note)
    try:
        yield caught
    finally:
        restore()


def check_finite(values: Tensor, before: int, out: Path) -> None:
    """NonFinite for the first step whose loss or norm is not; values (n, 2) of steps before + 1, ..., before + n."""
    wrong = (~values.isfinite()).nonzero()
    if len(wrong):
        row, column = wrong[0].tolist()
        what = f"{('loss', 'gradient')[column]} is {values[row, column].item()} at step {before + row + 1}"
        kept = f"{out / 'state.pt'} is left as it was" if (out / "state.pt").exists() else "nothing was saved yet"
        raise NonFinite(f"the {what}; {kept}; try a lower --lr, --warmup-steps or --precision fp32")


class Progress:
    """A bar on a terminal, elsewhere a line now and then; on rank 0 alone."""

    def __init__(self, args: argparse.Namespace, start: int, shown: bool) -> None:
        self.args, self.shown, self.terminal = args, shown, sys.stderr.isatty()
        self.done, self.time, self.said = start, time.perf_counter(), -math.inf
        hidden = not (shown and self.terminal)
        self.bar = tqdm(total=args.steps, initial=start, unit="step", desc=str(args.out), disable=hidden)

    def step(self) -> None:
        self.bar.update()

    def show(self, done: int, loss: float) -> None:
        now = time.perf_counter()
        rate = (done - self.done) / (now - self.time)
        text = f"loss {loss:.4f}, {rate * self.args.batch_size:,.0f} images/s"
        self.bar.set_postfix_str(text)
        if self.shown and not self.terminal and (now > self.said + QUIET or done == self.args.steps):
            left = tqdm.format_interval((self.args.steps - done) / rate)
            print(f"step {done}/{self.args.steps}  {text}, {left} left", flush=True)
            self.said = now
        self.done, self.time = done, now

    def close(self) -> None:
        self.bar.close()


# ---------------------------------------------------------------------------------------------- files


def log(args: argparse.Namespace, done: int, means: list[float], seconds: float) -> None:
    """One line of log.jsonl: means since the line before, totals since the first step."""
    rate = learning_rate(done - 1, args)
    line = {"step": done, "loss": means[0], "grad_norm": means[1], "lr": rate, "images": done * args.batch_size}
    with open(args.out / "log.jsonl", "a") as file:
        file.write(json.dumps({**line, "seconds": round(seconds, 3)}) + "\n")


def trim_log(path: Path, start: int) -> None:
    """Drop the lines of a call that was killed after its last checkpoint, whole or half written."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= start:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    with written_whole(path) as temporary:
        temporary.write_text("".join(kept))


def write_state(args: argparse.Namespace, data: Data, trainer: Trainer, done: int, seconds: float) -> None:
    """state.pt, all that a resumed run needs, and then ema.safetensors; each appears whole or not at all."""
    options = {key: getattr(args, key) for key in (*FIXED, "steps")}
    state = {"step": done, "seconds": seconds, "options": options, "data": data.digest}
    state |= {"config": trainer.model.config, "class_names": data.class_names, **trainer.state()}
    with written_whole(args.out / "state.pt") as temporary:
        torch.save(state, temporary)
    path, config = args.out / "ema.safetensors", trainer.model.config
    save_checkpoint(path, trainer.ema, config, class_names=data.class_names, step=str(done))


def read_state(args: argparse.Namespace) -> dict[str, Any] | None:
    """The checkpoint to go on from, or None; ValueError if it is another run's, with each option that differs."""
    path = args.out / "state.pt"
    if args.overwrite:
        return None
    if not path.exists():
        if (args.out / "ema.safetensors").exists():
            raise ValueError(f"--out {args.out} holds ema.safetensors without state.pt: take another, or --overwrite")
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        theirs = state["options"]
        fixed = (*FIXED, "steps") if args.schedule == "cosine" else FIXED
        pairs = {key: (theirs[key], getattr(args, key)) for key in fixed}
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError) as error:
        why = str(error).partition("\n")[0]
        raise ValueError(f"{path} cannot be resumed ({why}): move it away, or --overwrite") from error
    differing = [f"{key} was {there!r}, is {here!r}" for key, (there, here) in pairs.items() if there != here]
    if differing:
        way = "give them as they were, or --overwrite to begin anew"
        raise ValueError(f"--out {args.out} holds a run with other options: {'; '.join(differing)}; {way}")
    return state


def write_samples(args: argparse.Namespace, data: Data, trainer: Trainer, done: int) -> None:
    """samples/STEP.png from the averaged weights, always on the same noise: four of each of the first ten classes."""
    path = args.out / "samples" / f"{done:07d}.png"
    checkpoint = Checkpoint(trainer.ema, trainer.model.config, path, "", "ema", data.class_names)
    model = build_model(checkpoint).to(trainer.device)
    sampler, scale = make_sampler("ddim", SAMPLE_STEPS), SAMPLE_CFG if args.label_dropout > 0 else 1.0
    pipe = pipeline.Pipeline(model, sampler, None, checkpoint, scale, "all", trainer.device)
    labels = torch.arange(min(data.num_classes, 10)).repeat_interleave(4)
    x = pipe.sample(0, np.arange(len(labels)), labels)
    sample.save_png(path, sample.grid(pipe.decode(x.nan_to_num())))


# ----------------------------------------------------------------------------------------------- the job


def check(args: argparse.Namespace, ranks: Ranks) -> None:
    """Mistakes that show before anything is read: ValueError or OSError names the flag and the value."""
    for flag, low, high in (
        *(("batch_size", 1, 2**20), ("steps", 1, 10**9), ("warmup_steps", 0, args.steps - 1), ("seed", 0, 2**63 - 1)),
        *(("lr", 0.0, 10.0), ("weight_decay", 0.0, 10.0), ("clip", 0.0, 1e9), ("ema_decay", 0.0, 1.0)),
        *(("label_dropout", 0.0, 1.0), ("save_every", 1, 10**9), ("log_every", 1, 10**6), ("sample_every", 0, 10**9)),
        *(("minutes", 0.0, 1e6), ("image_size", 1, 4096)),
    ):
        if getattr(args, flag) is not None:
            runtime.check_range(f"--{flag.replace('_', '-')}", getattr(args, flag), low, high)
    if args.batch_size % ranks.world:
        raise ValueError(f"--batch-size {args.batch_size} cannot be divided among {ranks.world} ranks")
    if args.out.exists() and not args.out.is_dir():
        raise OSError(f"--out {args.out} is a file, not a folder")
    check_writable("--out", args.out / "state.pt")


def run(args: argparse.Namespace) -> int:
    """The whole job -> exit code. ValueError or OSError for a mistake, before heavy work where it shows by then."""
    began, ranks = time.perf_counter(), Ranks.find()
    check(args, ranks)
    device = ranks.device(args.device)
    if device.type == "cuda":
        runtime.allow_tf32(True)
    state = read_state(args)
    say = print if ranks.rank == 0 else lambda *_, **__: None
    if state is not None and state["step"] >= args.steps:
        say(f"{args.out} is done: {state['step']} steps; give more --steps or another --out")
        return 0
    data = read_data(args.data, args.image_size)
    if state is not None and state["data"] != data.digest:
        raise ValueError(f"--out {args.out} was trained on other data than {args.data}: give that, or --overwrite")
    if args.sample_every and data.latent:
        raise ValueError("--sample-every is for images: draw from latents by sample.py, which has the VAE")
    torch.manual_seed(int(words(args.seed, STEP, 0xFFFFFFFF).generate_state(1)[0]))  # of the initial weights
    model = DiT_models[args.model](
        input_size=data.images.shape[3],
        in_channels=data.images.shape[1],
        num_classes=data.num_classes,
        class_dropout_prob=args.label_dropout,
        learn_sigma=args.learn_sigma,
    )
    ranks.open(device)
    trainer = Trainer(args, data, model, ranks, device)
    start, seconds = 0, 0.0
    if state is not None:
        trainer.load(state)
        start, seconds = state["step"], state["seconds"]
    del state  # as large as everything on the device
    if ranks.rank == 0:
        prepare_folder(args, start)
        write_json(args.out / "run.json", describe(args, data, trainer))
    say(f"{'model':8} {args.model}, {sum(p.numel() for p in trainer.weights) / 1e6:.2f} M parameters")
    say(f"{'data':8} {len(data.images)} of {tuple(data.images.shape[1:])} in {data.num_classes} classes")
    say(f"{'device':8} {device}, {ranks.world} rank{'s' * (ranks.world > 1)}, {args.precision}")
    say(f"{'resumed' if start else 'new':8} at step {start}, in {args.out}", flush=True)
    deadline = math.inf if args.minutes is None else began + 60 * args.minutes
    done, code = train(args, data, trainer, start, seconds, deadline)
    ranks.close()
    say(f"{'saved':8} {args.out / 'ema.safetensors'} and state.pt at step {done} of {args.steps}")
    return code


def prepare_folder(args: argparse.Namespace, start: int) -> None:
    """Clear what an overwritten run or one killed in the middle of a write left behind."""
    args.out.mkdir(parents=True, exist_ok=True)
    leftovers = [*args.out.glob(".state.pt.*.tmp"), *args.out.glob(".ema.safetensors.*.part")]
    if args.overwrite:
        leftovers += [args.out / "state.pt", args.out / "ema.safetensors", *args.out.glob("samples/*.png")]
    for path in leftovers:
        path.unlink(missing_ok=True)
    trim_log(args.out / "log.jsonl", start)


def describe(args: argparse.Namespace, data: Data, trainer: Trainer) -> dict[str, Any]:
    """The record of the last call: options, data, model, versions."""
    options = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    cuda = trainer.device.type == "cuda"
    return {
        "options": options,
        "data": {"images": list(data.images.shape), "classes": data.num_classes, "sha256": data.digest},
        "model": trainer.model.config,
        "parameters": sum(p.numel() for p in trainer.weights),
        "ranks": trainer.ranks.world,
        "device": torch.cuda.get_device_name(trainer.device) if cuda else "cpu",
        "torch": torch.__version__,
        "argv": sys.argv,
    }


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    code = 2
    try:
        return run(args)
    except KeyboardInterrupt:
        return 130
    except (NonFinite, ValueError, OSError) as error:
        if args.debug:
            raise
        if isinstance(error, NonFinite):
            code = 1
        if Ranks.find().rank == 0:
            print(f"train.py: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
