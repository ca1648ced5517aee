"""The weights that come with the repository: they load, are what their cards say, and compute something."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from adacorr.files import file_sha256
from checkpoint import BUNDLED, BUNDLED_PATH, build_model, load_checkpoint
from evaluate.features import CLASSES, FEATURES, WEIGHTS, extract, load_features
from models import DiT_models

ROOT = Path(__file__).resolve().parent.parent
FILES = [BUNDLED_PATH, WEIGHTS]
CARDS = {"checkpoints": ROOT / "checkpoints" / "README.md", "evaluate": ROOT / "evaluate" / "README.md"}
NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
LARGEST = 17_000_000  # bytes


@pytest.fixture(autouse=True)
def _quiet(monkeypatch, tmp_path):
    monkeypatch.setenv("ADACORR_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def loaded():
    checkpoint = load_checkpoint(BUNDLED)
    return checkpoint, build_model(checkpoint)


def test_one_model_is_bundled():
    """Every clone downloads it."""
    assert list(BUNDLED_PATH.parent.glob("*.safetensors")) == [BUNDLED_PATH]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_digest_and_size(path):
    digest = file_sha256(path)
    assert path.with_name(f"{path.name}.sha256").read_text() == f"{digest}  {path.name}\n"
    assert digest in CARDS[path.parent.name].read_text(encoding="utf-8")
    assert path.stat().st_size < LARGEST


def test_checkpoint_is_the_named_model(loaded):
    name = "DiT-Ti/2"
    checkpoint, model = loaded
    # build_model refuses another architecture than the one it is asked for.
    build_model(checkpoint, model=name, num_classes=10, image_size=32)
    expected = DiT_models[name](input_size=32, in_channels=3, num_classes=10, learn_sigma=False)
    assert model.config == expected.config
    assert checkpoint.config == model.config
    assert checkpoint.class_names == NAMES
    assert not model.training


def test_checkpoint_is_stored_in_16_bits(loaded):
    checkpoint, model = loaded
    wide = [key for key, tensor in checkpoint.state_dict.items() if tensor.dtype != torch.float16]
    assert wide == ["pos_embed"]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in checkpoint.state_dict.values())


@torch.no_grad()
def test_checkpoint_predicts_the_noise(loaded):
    """Nearly pure noise comes back as itself, for a label and for the null label, which differ."""
    _, model = loaded
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    out = model(x, torch.tensor([999, 999]), torch.tensor([3, 10]))
    assert out.shape == x.shape
    assert out.isfinite().all()
    assert (out - x).norm() < 0.1 * x.norm()
    early = model(x[:1].repeat(2, 1, 1, 1), torch.tensor([300, 300]), torch.tensor([3, 10]))
    assert early.isfinite().all()
    assert (early[0] - early[1]).norm() > 1e-3 * early[0].norm()


def test_features_classify():
    network = load_features()
    images = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features, logits = extract(images, network)
    assert network.sha256 == file_sha256(WEIGHTS)
    assert features.shape == (4, FEATURES)
    assert logits.shape == (4, CLASSES)
    assert features.isfinite().all()
    assert logits.isfinite().all()
    assert not network.training


def test_features_know_the_samples_of_the_card():
    """Ten classes in columns, 64 pixels a tile and 2 between: most are what they were sampled to be."""
    with Image.open(BUNDLED_PATH.with_suffix(".png")) as image:
        sheet = torch.from_numpy(np.array(image))
    assert sheet.shape == (8 * 66 - 2, 10 * 66 - 2, 3)
    tiles = [sheet[y : y + 64 : 2, x : x + 64 : 2] for y in range(0, 526, 66) for x in range(0, 658, 66)]
    _, logits = extract(torch.stack(tiles), load_features())
    assert (logits.argmax(1) == torch.arange(80) % 10).float().mean() > 0.6
