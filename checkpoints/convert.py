"""Training checkpoint -> bundled .safetensors: averaged weights in float16, everything in the metadata.

    python checkpoints/convert.py TRAINING.safetensors checkpoints/dit-ti-2-cifar10.safetensors

float16 keeps three more bits than bfloat16. Positions stay in float32: they are a formula, and small.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from adacorr.command import run_command
from adacorr.files import file_sha256
from checkpoint import BUNDLED_PATH, build_model, load_checkpoint, save_checkpoint

CLASS_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="training checkpoint, float32")
    parser.add_argument("target", nargs="?", default=BUNDLED_PATH, help="the .safetensors to write")
    args = parser.parse_args()
    return run_command("convert.py", lambda: convert(args.source, args.target))


def convert(source, target):
    """Write `target`; ValueError or OSError for weights that cannot be read or do not fit."""
    checkpoint = load_checkpoint(source)
    config = build_model(checkpoint).config  # which also checks the weights
    state_dict = {name: t if name == "pos_embed" else t.half() for name, t in checkpoint.state_dict.items()}
    if outside := [name for name, t in state_dict.items() if not t.isfinite().all()]:
        raise ValueError(f"{outside[0]} does not fit the range of float16 (65504)")
    save_checkpoint(target, state_dict, config, class_names=CLASS_NAMES, license="Apache-2.0")
    print(f"wrote {target} from {checkpoint.source_key!r}\nsha256 {file_sha256(target)}")


if __name__ == "__main__":
    sys.exit(main())
