"""The dress rehearsal of docs/reproduce.md: its commands, as they stand there, on small stand-ins."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import timm
import torch
from images import pictures
from toy import save_tiny

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_commands_of_the_page(tmp_path):
    commands = re.search(r"```bash\n(.*?)```", (ROOT / "docs" / "reproduce.md").read_text(), re.DOTALL)[1]
    torch.manual_seed(0)
    save_tiny(tmp_path / "dit.safetensors", in_channels=4)
    diffusers.AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=4,
    ).save_pretrained(tmp_path / "vae")
    # A small network in place of Inception, whose distances of 2048 features take a minute on one core.
    network = "vit_small_patch14_dinov2.lvd142m"
    torch.save(timm.create_model(network, num_classes=0).state_dict(), tmp_path / "network.pth")
    np.savez(tmp_path / "images.npz", pictures(4, 64))
    evaluate = [sys.executable, "-m", "evaluate"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ADACORR_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    flags = ["--features", f"dinov2:{network}", "--weights", "network.pth"]
    statistics = [*evaluate, "statistics", "images.npz", *flags, "--out", "reference.npz"]
    subprocess.run(statistics, cwd=tmp_path, env=environment, check=True)
    environment |= {
        "GPUS": "1",
        "PROTOCOL": "--ckpt dit.safetensors --vae vae --sampler ddpm --num-sampling-steps 6 --num-fid-samples 4",
        "REFERENCE": "reference.npz",
        "NETWORK": " ".join(flags),
    }
    # The page is for the root of a clone; here the results go to a folder of their own.
    for name in ("sample_ddp.py", "evaluate"):
        (tmp_path / name).symlink_to(ROOT / name)
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", commands], cwd=tmp_path, env=environment, text=True,
                          capture_output=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (before,), (after,) = (
        json.loads((tmp_path / f"{name}.json").read_text())["sets"] for name in ("uncached", "adacorr")
    )
    names = {"fd", "precision", "recall", "kernel_distance"}
    assert names <= before["metrics"].keys()
    assert names | {"to_uncached", "change"} <= after["metrics"].keys()
    assert before["protocol"]["cache"] is None
    assert after["protocol"]["forecast"] is not None  # the model was measured
    assert after["metrics"]["change"] == pytest.approx(after["metrics"]["fd"] - before["metrics"]["fd"])
    page = (tmp_path / "report.html").read_text()
    for words in ("precision", "PSNR", "data:image/png;base64", "uncached.json", "adacorr.json"):
        assert words in page
