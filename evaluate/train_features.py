"""The training of the CIFAR-10 classifier of evaluate/features.py: `python -m evaluate.features train`."""

import argparse
import json
import math
import time
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluate.features import SIZE, CifarFeatures, accuracy, load_images, round_weights, save_features, scaled
from runtime import timed

PAD = 4  # pixels by which a training image may be shifted
CUTOUT = 12  # side of the square that is greyed out, in pixels
WARM_UP = 0.2  # share of the steps in which the learning rate rises
MOMENTUM, WEIGHT_DECAY, SMOOTHING = 0.9, 5e-4, 0.1
RATE = 0.1  # peak learning rate for each 128 images of a batch


def padded(images: Tensor) -> Tensor:  # (N, H, W, 3) -> (N, H + 2 PAD, W + 2 PAD, 3), reflected at the border
    near, far = torch.arange(PAD, 0, -1), torch.arange(SIZE - 2, SIZE - 2 - PAD, -1)
    index = torch.cat([near, torch.arange(SIZE), far]).to(images.device)
    return images[:, index][:, :, index]


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
    network: CifarFeatures,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    batch_size: int = 512,
    rate: float | None = None,
    seed: int = 0,
    compiled: bool = False,
) -> list[float]:
    """Train in place on uint8 images (N, 32, 32, 3) and int64 labels (N,), by SGD under a one-cycle rate.

    Returns the mean loss of each epoch and prints a line for each; the images move to the network's device as a whole.
    bf16 on a GPU, float32 on a CPU. ValueError if the loss is no longer finite.
    """
    device = network.head.weight.device
    batch_size = min(batch_size, len(images))
    rate = RATE * batch_size / 128 if rate is None else rate
    generator = torch.Generator(device).manual_seed(seed)
    images, labels = padded(images.to(device)), labels.to(device)
    matrices, vectors = ([p for p in network.parameters() if (p.ndim > 1) == wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=rate, momentum=MOMENTUM, nesterov=True)
    trunk = torch.compile(network.trunk) if compiled else network.trunk
    per_epoch = len(images) // batch_size  # the last images of an epoch that fill no batch wait for another

    def one_epoch(epoch: int) -> list[float]:
        """Mean loss and accuracy."""
        total, right = torch.zeros(2, device=device)
        order = torch.randperm(len(images), device=device, generator=generator)
        for step in range(per_epoch):
            for group in optimizer.param_groups:
                group["lr"] = rate * one_cycle((epoch * per_epoch + step + 0.5) / (epochs * per_epoch))
            rows = order[step * batch_size : (step + 1) * batch_size]
            x, y = augmented(images, rows, generator), labels[rows]
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
                logits = trunk(x)[1].float()
                loss = F.cross_entropy(logits, y, label_smoothing=SMOOTHING)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.detach()
            right += (logits.detach().argmax(1) == y).float().mean()
        return [(value / per_epoch).item() for value in (total, right)]  # the one wait for the device in an epoch

    losses = []
    network.train()
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=True):
        for epoch in range(1, epochs + 1):
            (loss, share), seconds = timed(partial(one_epoch, epoch - 1), device)
            print(f"epoch {epoch:3}/{epochs}  loss {loss:.4f}  accuracy {share:.2%}  {seconds:.2f} s", flush=True)
            if not math.isfinite(loss):
                raise ValueError(f"training diverged in epoch {epoch}: give a lower --lr than {rate:g}")
            losses.append(loss)
    network.eval()
    return losses


def run(args: argparse.Namespace, device: torch.device) -> None:
    """The command: train, measure on the test set where there is one, and write."""
    if args.out.suffix != ".safetensors":
        raise ValueError(f"--out {args.out} does not end in .safetensors")
    start = time.perf_counter()
    images, data = load_images(args.data)
    images, labels = images[: args.limit], data.labels[: args.limit]
    if args.test is not None:
        test_images, test = load_images(args.test)
        if test.class_names != data.class_names:
            raise ValueError(f"{args.test} and {args.data} name different classes")
    torch.manual_seed(args.seed)
    network = CifarFeatures().to(device)
    size = sum(p.numel() for p in network.parameters())
    print(f"{len(images)} images, {size / 1e6:.2f} M parameters, {device}, {time.perf_counter() - start:.1f} s")
    options = {"epochs": args.epochs, "batch_size": args.batch_size, "seed": args.seed}
    fit(network, images, labels, rate=args.lr, compiled=args.compile, **options)
    round_weights(network)  # what is measured is what is stored
    metadata = options | {"images": len(images), "class_names": json.dumps(data.class_names), "license": "Apache-2.0"}
    if args.test is not None:
        share = accuracy(network, test_images, test.labels)
        metadata["test_accuracy"] = f"{share:.4f}"
        print(f"test accuracy {share:.2%} on {len(test_images)} images")
    digest = save_features(network, args.out, **{key: str(value) for key, value in metadata.items()})
    print(f"wrote {args.out}, {args.out.stat().st_size / 1e6:.2f} MB, in {time.perf_counter() - start:.0f} s")
    print(f"sha256 {digest}")
