"""The dress rehearsal of docs/reproduce.md: its commands, as they stand there, on small stand-ins."""

import json
import os
import re
import shlex
import subprocess
from contextlib import redirect_stdout
from pathlib import Path

import diffusers
import numpy as np
import pytest
import timm
import torch
from images import pictures
from toy import save_tiny

import evaluate.__main__
import sample_ddp

ROOT = Path(__file__).resolve().parents[1]
# Bash reads the page, and hands each program that it would start to the test, which is much quicker than new processes:
# a line with its words goes out, its exit code comes back. tests/test_sample_ddp_processes.py has the real torchrun.
SHELL = """
set -euo pipefail
run() { printf '%q ' "$@"; echo; read -r code; return "$code"; }
python() { run python "$@"; }
torchrun() { run torchrun "$@"; }
"""


@timm.models.register_model
def toy_dinov2(num_classes=0, **_):
    """In place of DINOv2: features that take a minute less."""
    return timm.models.VisionTransformer(518, 14, num_classes=num_classes, embed_dim=32, depth=1, num_heads=2)


def run(words):
    """Exit code of a program of the page, run in this process."""
    match words:
        case ["python", "-m", "evaluate", *argv]:
            return evaluate.__main__.main(argv)
        case ["torchrun", "--nproc-per-node", "1", "sample_ddp.py", *argv]:
            return sample_ddp.main(argv)
    pytest.fail(f"no program of this project: {words}")


@pytest.mark.slow
def test_the_commands_of_the_page(tmp_path, monkeypatch):
    commands = re.search(r"```bash\n(.*?)```", (ROOT / "docs" / "reproduce.md").read_text(), re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_tiny(tmp_path / "dit.safetensors", in_channels=4)
    diffusers.AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=4,
    ).save_pretrained("vae")
    torch.save(toy_dinov2().state_dict(), "network.pth")
    np.savez("images.npz", pictures(4, 64))
    flags = "--features dinov2:toy_dinov2 --weights network.pth"
    assert run(f"python -m evaluate statistics images.npz {flags} --out reference.npz".split()) == 0
    settings = {
        "GPUS": "1",
        "PROTOCOL": "--ckpt dit.safetensors --vae vae --sampler ddpm --num-sampling-steps 6 --num-fid-samples 4",
        "REFERENCE": "reference.npz",
        "NETWORK": flags,
    }
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    ran = []
    with subprocess.Popen(["bash", "-c", SHELL + commands], env=os.environ | settings, **pipes) as bash:
        for line in bash.stdout:
            ran.append(words := shlex.split(line))
            with redirect_stdout(None):
                code = run(words)
            print(code, file=bash.stdin)
    assert (bash.returncode, len(ran)) == (0, len(re.findall(r"^(?:python|torchrun) ", commands, re.MULTILINE)))

    (before,), (after,) = (json.loads(Path(f"{name}.json").read_text())["sets"] for name in ("uncached", "adacorr"))
    names = {"fd", "precision", "recall", "kernel_distance"}
    assert names <= before["metrics"].keys()
    assert names | {"to_uncached", "change"} <= after["metrics"].keys()
    assert before["protocol"]["cache"] is None
    assert after["protocol"]["forecast"] is not None  # the model was measured
    assert after["metrics"]["change"] == pytest.approx(after["metrics"]["fd"] - before["metrics"]["fd"])
    page = Path("report.html").read_text()
    for words in ("precision", "PSNR", "data:image/png;base64", "uncached.json", "adacorr.json"):
        assert words in page
