"""A checkpoint of a pixel model -> a folder for diffusers, with the scheduler that gives the images of sample.py.

python checkpoints/to_diffusers.py FOLDER                the bundled checkpoint
python checkpoints/to_diffusers.py FOLDER --ckpt FILE    another one

from adacorr.integrations.diffusers import PixelDiTPipeline
images = PixelDiTPipeline.from_pretrained("FOLDER")(class_labels=[0, 1, 2]).images
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from adacorr.command import Parser, run_command
from checkpoint import BUNDLED, diffusers_pipeline, load_checkpoint


def run(args: argparse.Namespace) -> None:
    diffusers_pipeline(load_checkpoint(args.ckpt)).save_pretrained(args.folder)
    print(f"wrote {args.folder}")


def main() -> int:
    parser = Parser("to_diffusers.py", description=__doc__)
    parser.add_argument("folder", type=Path, help="is made, or written into")
    parser.add_argument("--ckpt", default=BUNDLED, help="what sample.py --ckpt takes (default: the bundled checkpoint)")
    args = parser.parse_args()
    return run_command("to_diffusers.py", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
