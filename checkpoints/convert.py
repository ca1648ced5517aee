"""Training checkpoint -> bundled .safetensors: averaged weights in 16 bits, everything in the metadata.

    python checkpoints/convert.py TRAINING.safetensors checkpoints/dit-ti-2-cifar10.safetensors

Both 16-bit formats are tried on random inputs, and the one whose noise predictions stay closer to the float32
weights is written. Positions stay in float32: they are a formula, and small.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from adacorr.files import file_sha256
from checkpoint import BUNDLED_PATH, build_model, load_checkpoint, save_checkpoint

CLASS_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def rounded(state_dict, dtype):
    """State dict with every tensor but `pos_embed` in `dtype`."""
    return {name: t if name == "pos_embed" else t.to(dtype) for name, t in state_dict.items()}


@torch.no_grad()
def relative_error(reference, state_dict, rows=64):
    """Relative L2 difference of the predictions that `state_dict` makes, over `rows` seeded random inputs."""
    generator = torch.Generator().manual_seed(0)
    size, channels = reference.input_size, reference.in_channels
    x = torch.randn(rows, channels, size, size, generator=generator)
    t = torch.randint(0, 1000, (rows,), generator=generator)
    y = torch.randint(0, reference.num_classes + 1, (rows,), generator=generator)
    before, kept = reference(x, t, y), {name: p.clone() for name, p in reference.state_dict().items()}
    reference.load_state_dict(state_dict)
    after = reference(x, t, y)
    reference.load_state_dict(kept)
    return ((after - before).norm() / before.norm()).item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="training checkpoint, float32")
    parser.add_argument("target", nargs="?", default=BUNDLED_PATH, help="the .safetensors to write")
    args = parser.parse_args()
    checkpoint = load_checkpoint(args.source)
    model = build_model(checkpoint)
    errors = {}
    for dtype in (torch.bfloat16, torch.float16):
        errors[dtype] = relative_error(model, rounded(checkpoint.state_dict, dtype))
        print(f"{dtype}: relative error {errors[dtype]:.2e}")
    best = min(errors, key=errors.get)
    save_checkpoint(
        args.target,
        rounded(checkpoint.state_dict, best),
        model.config,
        class_names=CLASS_NAMES,
        license="Apache-2.0",
    )
    print(f"wrote {args.target} from {checkpoint.source_key!r} in {best}")
    print(f"sha256 {file_sha256(Path(args.target))}")


if __name__ == "__main__":
    main()
