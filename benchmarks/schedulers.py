"""AdaCorrection in a diffusers pipeline under several schedulers: prints Markdown, writes JSON with --out.

    python -m benchmarks.schedulers --num-images 4 --seed 5 --steps 20

The bundled checkpoint, guidance 1.5. PSNR is per image, on uint8, against the uncached run of the same scheduler, noise
and steps, at three budgets: where steps are forecast only, where they are taken again, and with a profile of two calls,
which are of other noise.
"""

import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import diffusers
import numpy as np

from adacorr.command import Parser, number, run_command, writable
from adacorr.integrations.diffusers import CacheConfig, enable, measure
from benchmarks.tables import Lines, show
from checkpoint import diffusers_pipeline
from evaluate.fidelity import psnr, summarise_psnr
from evaluate.pages import spread
from pipeline import ModelOptions, gaussian, load

SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler,
    "dpmsolver++": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
}
SHARES = (0.5, 0.35, 0.25)  # of the steps, as budgets
CALIBRATED = (1, 3), (6, 9)  # labels of the calls that are measured


def lines(args: Namespace) -> Lines:
    ours = load(ModelOptions())
    pipe = diffusers_pipeline(ours.checkpoint)
    pipe.set_progress_bar_config(disable=True)
    indices, known = np.arange(args.num_images), pipe.scheduler.config
    noise, labels = gaussian(args.seed, indices, ours.noise_shape), ours.labels_in_turn(indices).tolist()
    call = {"guidance_scale": ours.cfg_scale, "num_inference_steps": args.steps, "output_type": "pt"}

    def draw():
        return ours.decode(pipe(labels, latents=noise, **call).images)

    for name in args.schedulers:
        pipe.scheduler = SCHEDULERS[name].from_config(known)
        reference = draw()
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "measured.safetensors")
            measure(pipe, [{**call, "class_labels": list(own)} for own in CALIBRATED], path)
            for budget in [max(round(2 * share * args.steps) / 2, 2) for share in SHARES]:
                cells, record = {"scheduler": name, "budget": f"{budget:g}"}, {"scheduler": name, "budget": budget}
                forms = {
                    "forecast only": {"adacorr": f"budget={budget},rewind=false"},
                    "taken again": {"adacorr": f"budget={budget}"},
                    "profile of two calls": {"adacorr": f"budget={budget}", "profile": path},
                }
                for form, options in forms.items():
                    with enable(pipe, CacheConfig(**options)) as cache:
                        near, stats = summarise_psnr(psnr(reference, draw())), cache.stats()
                    cells["compute"] = f"{stats['compute']:.3f}"
                    cells[form] = spread(near, 1, ("mean", "min"))
                    record[form] = {"psnr": near, "compute": stats["compute"], "rewound": stats["rewound"]}
                yield cells, record


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("benchmarks.schedulers", description=__doc__)
    add = parser.add_argument
    add(
        "--schedulers",
        nargs="+",
        choices=SCHEDULERS,
        default=list(SCHEDULERS),
        help="of diffusers (default %(default)s)",
    )
    add("--steps", type=number(4, 1000), default=20, help="of each run (default %(default)s)")
    add("--num-images", type=number(1, 10_000), default=4, help="labels in turn (default %(default)s)")
    add("--seed", type=number(0, 2**31 - 1), default=5, help="of their noise (default %(default)s)")
    add("--out", type=writable, help="JSON file")
    args = parser.parse_args(argv)
    return run_command("benchmarks.schedulers", lambda: show(lines(args), args))


if __name__ == "__main__":
    sys.exit(main())
