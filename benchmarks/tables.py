"""The measured tables of README.md and docs/: run from the project's root, prints Markdown, writes JSON with --out.

    python -m benchmarks.tables gamma       the one knob, budgets, and what each part is worth
    python -m benchmarks.tables protocol    other step counts, guidance scales, samplers and batch sizes
    python -m benchmarks.tables exact       distance to the 1000-step DDIM solution, against few-step solvers

Caching methods are compared by python -m evaluate compare. PSNR is per image, on uint8, against the uncached run
(table `exact`: against the solution) from the same noise.
Seconds are medians of `--repeats` runs, uncached and cached alternating in one process after a warm-up.
"""

import argparse
import statistics
import time

import numpy as np
import torch

from adacorr import CacheManager, make_policy, parse_correction
from adacorr.files import write_json
from diffusion import make_sampler
from download import BUNDLED, build_model, load_checkpoint
from evaluate.fidelity import fidelity
from pipeline import Pipeline
from runtime import environment


def pipeline(checkpoint, model, sampler="ddim", steps=50, cfg_scale=1.5):
    return Pipeline(model, make_sampler(sampler, steps), None, checkpoint, cfg_scale, "all", torch.device("cpu"))


def cache(policy, correction):
    return CacheManager(
        None if policy is None else make_policy(policy), None if correction is None else parse_correction(correction)
    )


def name(policy, correction):
    parts = [f"--cache {policy}"] if policy else []
    if correction is not None:
        parts.append(f"--adacorr {correction}".strip())
    return " ".join(parts)


class Bench:
    def __init__(self, args):
        self.args = args
        self.checkpoint = load_checkpoint(BUNDLED)
        self.model = build_model(self.checkpoint)
        self.indices = np.arange(args.images)
        self.labels = torch.arange(args.images) % self.model.num_classes
        self.rows = []

    def timed(self, pipe, manager, indices, labels):
        start = time.perf_counter()
        x = pipe.sample(self.args.seed, indices, labels, manager)
        return x, time.perf_counter() - start

    def compare(self, label, manager, images=None, **protocol):
        """One row: the cached run against the uncached one of the same protocol."""
        count = images or self.args.images
        indices, labels = np.arange(count), torch.arange(count) % self.model.num_classes
        pipe = pipeline(self.checkpoint, self.model, **protocol)
        warm = pipeline(self.checkpoint, self.model, **{**protocol, "steps": 4})
        self.timed(warm, None, indices, labels)
        plain, cached = [], []
        for _ in range(self.args.repeats):
            reference, seconds = self.timed(pipe, None, indices, labels)
            plain.append(seconds)
            x, seconds = self.timed(pipe, manager, indices, labels)
            cached.append(seconds)
        score = fidelity(pipe.decode(reference), pipe.decode(x))
        trace = manager.trace
        row = {
            "what": label,
            "images": count,
            **protocol,
            "compute": trace.compute,
            "hit_rate": trace.hit_rate,
            "psnr": {k: score["psnr"][k] for k in ("mean", "p5", "min")},
            "ssim": score["ssim"]["mean"],
            "seconds_uncached": statistics.median(plain),
            "seconds": statistics.median(cached),
            "cache_bytes_per_image": manager.bytes // count,
        }
        row["speedup"] = row["seconds_uncached"] / row["seconds"]
        self.rows.append(row)
        psnr = "{:.1f} / {:.1f} / {:.1f}".format(*(float(row["psnr"][k]) for k in ("mean", "p5", "min")))
        print(
            f"| `{label}` | {row['compute']:.3f} | {row['hit_rate']:.3f} | {psnr} | {row['ssim']:.4f} | "
            f"{row['speedup']:.2f}x | {row['cache_bytes_per_image'] / 1e6:.2f} |",
            flush=True,
        )

    def header(self):
        print("| | compute | hit rate | PSNR mean / p5 / min (dB) | SSIM | speed-up | cache MB per image |")
        print("|---|---|---|---|---|---|---|")

    def gamma(self):
        self.header()
        for text in [f"gamma={g}" for g in (0.25, 0.5, 1, 2, 4, 8)] + [f"budget={b}" for b in (5, 6, 7, 8)]:
            self.compare(name(None, text), cache(None, text))
        for text in ("rewind=false", "difference=false", "order=1", "order=3", "gate_error=0.001"):
            self.compare(name(None, text), cache(None, text))

    def protocol(self):
        self.header()
        for what, changes in (
            ("20 steps", {"steps": 20}),
            ("100 steps", {"steps": 100}),
            ("250 steps", {"steps": 250}),
            ("guidance 1", {"cfg_scale": 1.0}),
            ("guidance 4", {"cfg_scale": 4.0}),
            ("DDPM, 50 steps", {"sampler": "ddpm"}),
            ("DDPM, 250 steps", {"sampler": "ddpm", "steps": 250}),
            ("DPM-Solver++, 20 steps (no rewind)", {"sampler": "dpmsolver++", "steps": 20}),
            ("batch 1", {"images": 1}),
            ("batch 16", {"images": 16}),
        ):
            self.compare(f"--adacorr, {what}", cache(None, ""), **changes)

    def exact(self):
        """PSNR to the 1000-step DDIM solution, by full evaluations (both guidance halves) of the network."""

        def states(pipe, manager=None):
            x = [
                pipe.sample(self.args.seed, part, self.labels[torch.from_numpy(part)], manager)
                for part in np.array_split(self.indices, max(1, self.args.images // 20))
            ]
            return pipe.decode(torch.cat(x))

        truth = states(pipeline(self.checkpoint, self.model, steps=1000))
        print("| | full evaluations | PSNR to the solution, mean / p5 (dB) |\n|---|---|---|")
        runs = [("uncached DDIM-50", "ddim", 50, None)]
        runs += [
            (f"uncached {s}, {n} steps", s, n, None)
            for n in (8, 12, 15)
            for s in ("dpmsolver++:use_lu_lambdas=true", "dpmsolver++", "unipc")
        ]
        runs += [
            (f"--adacorr budget={b}, DDIM-{n}", "ddim", n, f"budget={b}") for n in (50, 100, 250) for b in (6, 7, 8, 10)
        ]
        for label, sampler, steps, correction in runs:
            manager = None if correction is None else cache(None, correction)
            score = fidelity(truth, states(pipeline(self.checkpoint, self.model, sampler, steps), manager))["psnr"]
            evaluations = steps if manager is None else manager.trace.summary()["evaluations"]
            self.rows.append({"what": label, "evaluations": evaluations, "psnr": score["mean"], "p5": score["p5"]})
            print(
                f"| `{label}` | {evaluations:.2f} | {float(score['mean']):.1f} / {float(score['p5']):.1f} |", flush=True
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["gamma", "protocol", "exact"])
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--seed", type=int, default=4242)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", help="JSON file")
    args = parser.parse_args()
    bench = Bench(args)
    getattr(bench, args.table)()
    if args.out:
        write_json(args.out, {"arguments": vars(args), "environment": environment(), "rows": bench.rows})


if __name__ == "__main__":
    main()
