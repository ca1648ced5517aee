"""The training of the CIFAR-10 classifier of evaluate/features.py, whose weights are part of the repository.

    python -m evaluate.train_features --data cifar10-train.npz --test cifar10-test.npz --out FILE.safetensors

Sets are packed .npz, or folders of class folders: `data.py` describes them. Training on a GPU is not deterministic.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from adacorr.command import Parser, number, run_command, writable
from adacorr.files import file_sha256, record_digest, written_whole
from data import Data, read_data
from evaluate.features import CLASSES, SIZE, CifarFeatures, extract, scaled
from runtime import find_device

PAD = 4  # pixels by which a training image may be shifted
CUTOUT = 12  # side of the square that is greyed out, in pixels
WARM_UP = 0.2  # share of the steps in which the learning rate rises
MOMENTUM, WEIGHT_DECAY, SMOOTHING = 0.9, 5e-4, 0.1
RATE = 0.1  # peak learning rate for each 128 images of a batch


def load_images(path: Path) -> tuple[Tensor, Data]:
    """uint8 (N, 32, 32, 3) and the data that it comes from, with labels of ten classes."""
    data = read_data(path)
    if data.latent or data.images.shape[1:] != (3, SIZE, SIZE):
        raise ValueError(f"{path}: expected images of {SIZE} x {SIZE} pixels, got {tuple(data.images.shape)}")
    if data.num_classes != CLASSES:
        raise ValueError(f"{path} has {data.num_classes} classes, the network is for {CLASSES}")
    return data.images.permute(0, 2, 3, 1).contiguous(), data


def padded(images: Tensor) -> Tensor:  # (N, H, W, 3) -> (N, H + 2 PAD, W + 2 PAD, 3)
    return torch.from_numpy(np.pad(images.numpy(), ((0, 0), (PAD, PAD), (PAD, PAD), (0, 0)), "reflect"))


def augmented(images: Tensor, rows: Tensor, generator: torch.Generator) -> Tensor:
    """A batch from `padded` images: each shifted, perhaps mirrored, a square of it grey; (n,) -> (n, 3, 32, 32)."""
    n, device = len(rows), images.device

    def draw(high: int) -> Tensor:
        return torch.randint(high, (n, 1), device=device, generator=generator)

    line = torch.arange(SIZE, device=device)
    ys, xs = draw(2 * PAD + 1) + line, draw(2 * PAD + 1) + line  # (n, 32)
    xs = torch.where(draw(2) == 1, xs.flip(1), xs)
    x = scaled(images[rows[:, None, None], ys[:, :, None], xs[:, None, :]])
    tops, lefts = (draw(SIZE) - CUTOUT // 2 for _ in "yx")  # squares may reach over the border
    down, across = ((line - start >= 0) & (line - start < CUTOUT) for start in (tops, lefts))  # (n, 32) each
    return x.masked_fill_((down[:, :, None] & across[:, None, :])[:, None], 0.0)  # in place: keeps channels last


def one_cycle(progress: float) -> float:
    """Share of the peak learning rate at `progress` in [0, 1]: up in a line, then down along a cosine to 0."""
    if progress < WARM_UP:
        return progress / WARM_UP
    return (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP))) / 2


def fit(
    network: CifarFeatures, images: Tensor, labels: Tensor, *, epochs: int, batch_size: int, seed: int = 0
) -> list[float]:
    """Train in place on uint8 images (N, 32, 32, 3) and int64 labels (N,), by SGD under a one-cycle rate.

    Returns the mean loss of each epoch and prints a line for each; the images move to the network's device as a whole.
    bf16 on a GPU, float32 on a CPU. ValueError if the loss is no longer finite.
    """
    device = network.head.weight.device
    batch_size = min(batch_size, len(images))
    rate = RATE * batch_size / 128
    generator = torch.Generator(device).manual_seed(seed)
    images, labels = padded(images).to(device), labels.to(device)
    matrices, vectors = ([p for p in network.parameters() if (p.ndim > 1) == wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=rate, momentum=MOMENTUM, nesterov=True)
    per_epoch = len(images) // batch_size  # the last images of an epoch that fill no batch wait for another
    steps, losses = epochs * per_epoch, []
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: one_cycle((step + 0.5) / steps))
    network.train()
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=True):
        for epoch in range(epochs):
            total = torch.zeros((), device=device)
            order = torch.randperm(len(images), device=device, generator=generator)
            for rows in order[: per_epoch * batch_size].split(batch_size):
                x, y = augmented(images, rows, generator), labels[rows]
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
                    loss = F.cross_entropy(network.trunk(x)[1].float(), y, label_smoothing=SMOOTHING)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.detach()
            losses.append(total.item() / per_epoch)  # the one wait for the device in an epoch
            print(f"epoch {epoch + 1:3}/{epochs}  loss {losses[-1]:.4f}", flush=True)
            if not math.isfinite(losses[-1]):
                raise ValueError(f"training diverged in epoch {epoch + 1} at a rate of {rate:g}")
    network.eval()
    return losses


def accuracy(network: CifarFeatures, images: Tensor, labels: Tensor) -> float:
    """Share of images whose largest logit is that of their label."""
    return (extract(images, network)[1].argmax(1) == labels).double().mean().item()


def save_features(network: CifarFeatures, path: Path, **metadata: str) -> str:
    """Write the weights and FILE.sha256, each whole or not at all; returns the digest.

    Matrices are stored in float16, norms and biases in float32. The network gets the rounded values, too.
    """
    stored = {}
    for name, tensor in network.state_dict().items():
        if not name.endswith("num_batches_tracked"):  # a counter of the norms, which matters in training only
            stored[name] = tensor.to("cpu", torch.float16 if tensor.ndim > 1 else torch.float32).contiguous()
    network.load_state_dict(stored)
    with written_whole(path) as temporary:
        # By way of bytes: errors of safetensors' own writing are no OSErrors.
        temporary.write_bytes(save(stored, {"format": "pt", **metadata}))
        digest = file_sha256(temporary)
        record_digest(path, digest)
    return digest


def run(args: argparse.Namespace) -> None:
    """Train, write, and measure what was written on the test set."""
    if args.out.suffix != ".safetensors":
        raise ValueError(f"--out {args.out} does not end in .safetensors")
    device = find_device(args.device)
    images, data = load_images(args.data)
    test_images, test = load_images(args.test)
    if test.class_names != data.class_names:
        raise ValueError(f"{args.test} and {args.data} name different classes")
    torch.manual_seed(args.seed)
    network = CifarFeatures().to(device)
    options = {"epochs": args.epochs, "batch_size": args.batch_size, "seed": args.seed}
    fit(network, images, data.labels, **options)
    metadata = options | {"images": len(images), "class_names": json.dumps(data.class_names), "license": "Apache-2.0"}
    digest = save_features(network, args.out, **{key: str(value) for key, value in metadata.items()})
    print(f"test accuracy {accuracy(network, test_images, test.labels):.2%} on {len(test_images)} images")
    print(f"wrote {args.out}, {args.out.stat().st_size / 1e6:.2f} MB, sha256 {digest}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("evaluate.train_features", description=__doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="to train on")
    add("--test", type=Path, required=True, help="the accuracy is measured on it once, at the end")
    add("--out", type=writable, required=True, help="the .safetensors to write, beside its digest")
    add("--epochs", type=number(1, 10_000), default=60, help="default %(default)s")
    add("--batch-size", type=number(2, 65_536), default=512, help="default %(default)s")
    add("--seed", type=number(0, 2**63 - 1), default=0, help="default %(default)s")
    add("--device", help="default: cuda where there is one, else cpu")
    args = parser.parse_args(argv)
    return run_command("evaluate.train_features", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
