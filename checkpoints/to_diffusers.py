"""A checkpoint of a pixel model -> a folder for diffusers, with the scheduler that gives the images of sample.py.

python checkpoints/to_diffusers.py FOLDER                the bundled checkpoint
python checkpoints/to_diffusers.py FOLDER --ckpt FILE    another one

from adacorr.integrations.diffusers import PixelDiTPipeline
images = PixelDiTPipeline.from_pretrained("FOLDER")(class_labels=[0, 1, 2]).images
"""

import argparse
import sys
from pathlib import Path

from diffusers import DDIMScheduler, DiTTransformer2DModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from adacorr.command import Parser, run_command
from adacorr.integrations.diffusers import PixelDiTPipeline
from checkpoint import BUNDLED, build_model, load_checkpoint
from diffusion import BETAS
from layout import to_diffusers


def run(args: argparse.Namespace) -> None:
    checkpoint = load_checkpoint(args.ckpt)
    model = build_model(checkpoint)  # which also checks the weights
    if model.in_channels == 4:
        raise ValueError(f"{args.ckpt} works on latents: the released weights are there in the layout of diffusers")
    state_dict, config = to_diffusers(model.state_dict(), model.config)
    transformer = DiTTransformer2DModel(**config).eval()
    transformer.load_state_dict({**transformer.state_dict(), **state_dict})
    names = {str(i): name for i, name in enumerate(checkpoint.class_names or [])} or None
    options = {"beta_start": BETAS[0], "beta_end": BETAS[1], "beta_schedule": "linear", "clip_sample": False}
    scheduler = DDIMScheduler(**options, timestep_spacing="linspace")
    pipe = PixelDiTPipeline(transformer, scheduler, names, checkpoint_sha256=checkpoint.sha256)
    pipe.save_pretrained(args.folder)
    print(f"wrote {args.folder}")


def main() -> int:
    parser = Parser("to_diffusers.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="is made, or written into")
    parser.add_argument("--ckpt", default=BUNDLED, help="what sample.py --ckpt takes (default: the bundled checkpoint)")
    args = parser.parse_args()
    return run_command("to_diffusers.py", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
