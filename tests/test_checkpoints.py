"""Checkpoints: every format, every way they can be wrong, diffusers' layout, and the weights in the repository."""

import argparse
import json
import os
import pathlib

import numpy as np
import pytest
import torch
from images import CIFAR
from PIL import Image

import checkpoint as checkpoints
from adacorr.files import file_sha256, record_digest
from checkpoint import BUNDLED, BUNDLED_PATH, Checkpoint, build_model, load_checkpoint, load_vae, save_checkpoint
from evaluate.features import WEIGHTS, extract, load_features
from layout import infer_config
from models import DiT, DiT_models


def randomised(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name != "pos_embed":
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return model.eval()


@pytest.fixture(scope="module")
def tiny():
    """192 wide, so that the number of heads can be told from the width."""
    return randomised(DiT_models["DiT-Ti/2"](input_size=8, depth=2, num_classes=5))


@pytest.fixture
def weights(tmp_path, tiny):
    path = tmp_path / "tiny.pt"
    torch.save(tiny.state_dict(), path)
    return path


def predict(model):
    x = torch.randn(2, model.in_channels, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(x, torch.tensor([3, 998]), torch.tensor([1, model.null_label]))


@pytest.mark.parametrize("zipped", [True, False])
def test_flat_pt_loads_and_builds_the_same_model(weights, tiny, zipped):
    torch.save(tiny.state_dict(), weights, _use_new_zipfile_serialization=zipped)
    checkpoint = load_checkpoint(weights)
    assert (checkpoint.source_key, checkpoint.config, checkpoint.class_names) == ("flat", None, None)
    assert (checkpoint.path, checkpoint.sha256) == (weights, file_sha256(weights))
    assert not weights.with_name("tiny.pt.sha256").exists()  # none is written beside the user's own files
    model = build_model(checkpoint)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(predict(model), predict(tiny))
    model.blocks[0].attn.qkv.weight.zero_()  # the model must not share memory with the checkpoint
    assert checkpoint.state_dict["blocks.0.attn.qkv.weight"].abs().max() > 0


def test_training_checkpoint_gives_the_averaged_weights(tmp_path, tiny):
    path = tmp_path / "0400000.pt"
    raw = {name: torch.zeros_like(p) for name, p in tiny.state_dict().items()}
    args = argparse.Namespace(model="DiT-Ti/2", num_classes=5, results_dir="results", lr=1e-4)
    optimizer = torch.optim.AdamW(tiny.parameters()).state_dict()
    torch.save({"model": raw, "ema": tiny.state_dict(), "opt": optimizer, "args": args}, path)
    checkpoint = load_checkpoint(path)
    assert checkpoint.source_key == "ema"
    assert torch.equal(predict(build_model(checkpoint)), predict(tiny))
    torch.save({"model": raw, "opt": optimizer, "args": args}, path)
    assert load_checkpoint(path).source_key == "model"


def test_safetensors_carry_config_and_class_names(tmp_path):
    odd = randomised(DiT(8, 2, 3, 40, 1, 5, mlp_ratio=2.5, num_classes=2, learn_sigma=False))
    path = tmp_path / "odd.safetensors"
    save_checkpoint(path, odd.state_dict(), odd.config, class_names=["day", "night"], license="MIT")
    checkpoint = load_checkpoint(path)
    assert checkpoint.config == odd.config
    assert checkpoint.class_names == ["day", "night"]
    assert torch.equal(predict(build_model(checkpoint)), predict(odd))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_sise": 3}, "wrong.safetensors: its config cannot be used: .* differ in hidden_sise"),
        ({"num_heads": 5}, "hidden_size 192 must be a multiple of num_heads 5"),
        ({"depth": "2"}, "config cannot be used"),
        ({"depth": 3}, "not a whole DiT: Missing key.*blocks.2"),
        ({"depth": 1}, "not a whole DiT: Unexpected key.*blocks.1"),
        ({"num_classes": 6}, r"size mismatch for y_embedder.*\[6, 192\]"),
    ],
)
def test_metadata_that_contradicts_the_weights_is_refused(tmp_path, tiny, change, message):
    path = tmp_path / "wrong.safetensors"
    save_checkpoint(path, tiny.state_dict(), {**tiny.config, **change})
    with pytest.raises(ValueError, match=message):
        build_model(load_checkpoint(path))
    save_checkpoint(path, tiny.state_dict(), tiny.config, class_names=["one", "two"])
    with pytest.raises(ValueError, match="class_names are not a list with one name for each class"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "arguments",
    [
        {"learn_sigma": False, "in_channels": 3, "num_classes": 10},
        {"num_classes": 0},
        {"mlp_ratio": 100 / 384, "patch_size": 4, "hidden_size": 384, "num_heads": 6},
    ],
)
def test_config_is_inferred_from_shapes(arguments):
    config = {**DiT(input_size=16, depth=3, hidden_size=192, num_heads=3, num_classes=7).config, **arguments}
    with torch.device("meta"):
        state_dict = DiT(**config).state_dict()
    assert infer_config(state_dict) == config


def test_mlp_ratio_survives_truncation():
    width = 196  # where DiT would truncate one ratio in seven to a layer too narrow
    shapes = {"x_embedder.proj": (width, 4, 2, 2), "final_layer.linear": (32, width)}
    weights = {f"{name}.weight": torch.empty(shape) for name, shape in shapes.items()}
    weights["pos_embed"] = torch.empty(1, 16, width)
    for hidden in range(1, 3 * width):
        weights["blocks.0.mlp.fc1.weight"] = torch.empty(hidden, width)
        assert int(width * infer_config(weights, num_heads=7)["mlp_ratio"]) == hidden


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_embedder.proj.weight": (64, 4, 2, 2)}, "width 64 is not a published one .* number of heads is unknown"),
        ({"pos_embed": (1, 15, 192)}, "15 positions and 32 outputs per token do not fit a square image of 4 channels"),
        ({"final_layer.linear.weight": (33, 192)}, "16 positions and 33 outputs per token do not fit"),
        ({"pos_embed": None}, "lack 'pos_embed': not a DiT, or under other names"),
    ],
)
def test_shapes_of_no_dit_are_refused(tiny, change, message):
    state_dict = tiny.state_dict() | {name: shape and torch.empty(shape) for name, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        infer_config({name: tensor for name, tensor in state_dict.items() if tensor is not None})


def test_sizes_of_pixel_models_and_of_the_release(tmp_path):
    """A pixel model has no factor of a VAE; the released files are named."""
    state_dict = DiT(8, 2, 3, 192, 1, 3, num_classes=5).state_dict()
    checkpoint = Checkpoint(state_dict, None, tmp_path / "pixels.pt", "", "flat", None)
    build_model(checkpoint, image_size=8, num_classes=5)
    with pytest.raises(ValueError, match="is for 8 px, --image-size 64 was asked"):
        build_model(checkpoint, image_size=64)
    assert checkpoints.released_name("DiT-XL/2", 512) == "DiT-XL-2-512x512.pt"
    for model, size in (("DiT-XL/2", 128), ("DiT-B/4", 256)):
        with pytest.raises(ValueError, match="there are DiT-XL/2 at 256 and at 512 px"):
            checkpoints.released_name(model, size)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "DiT-XL/2"}, "is a DiT 2 deep, 192 wide, 3 heads, patch 2, --model DiT-XL/2 was asked"),
        ({"model": "DiT-XXL/2"}, "no model 'DiT-XXL/2': there are DiT-XL/2, "),
        ({"num_classes": 1000}, "is for 5 classes, --num-classes 1000 was asked"),
        ({"image_size": 512}, "is for 64 px, --image-size 512 was asked; use --image-size 64"),
    ],
)
def test_contradictions_name_both_sides(weights, arguments, message):
    with pytest.raises(ValueError, match=message):
        build_model(load_checkpoint(weights), **arguments)


def test_512_px_asked_of_the_256_px_release_names_the_other_file():
    with torch.device("meta"):
        state_dict = DiT_models["DiT-XL/2"]().state_dict()
    checkpoint = Checkpoint(state_dict, None, pathlib.Path("a.pt"), "", "flat", None)
    with pytest.raises(ValueError, match=r"is for 256 px.* 512 was asked; use --ckpt DiT-XL-2-512x512.pt"):
        build_model(checkpoint, model="DiT-XL/2", image_size=512)


@pytest.mark.parametrize("kind", ["zipped", "legacy", "safetensors"])
@pytest.mark.parametrize("fraction", [0.0001, 0.999])
def test_truncated_pt(tmp_path, tiny, fraction, kind):
    path = tmp_path / ("tiny.safetensors" if kind == "safetensors" else "tiny.pt")
    if kind == "safetensors":
        save_checkpoint(path, tiny.state_dict(), tiny.config)
    else:
        torch.save(tiny.state_dict(), path, _use_new_zipfile_serialization=kind == "zipped")
    size = int(path.stat().st_size * fraction)
    os.truncate(path, size)
    with pytest.raises(ValueError, match=rf"{path.name} is corrupt or incomplete \({size} bytes; .*again$"):
        load_checkpoint(path)
    assert path.exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html>\n<html><title>404</title>", "is a web page, not weights"),
        (b"\n  <HTML><body>sign in", "is a web page, not weights"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "Git LFS pointer.*git lfs pull"),
        (b"", r"is empty \(0 bytes\)"),
        (b"hello, these are not weights at all", "corrupt or incomplete"),
    ],
)
def test_impostors_are_recognised(tmp_path, suffix, content, message):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_checkpoint(path)
    assert len(str(caught.value).splitlines()) == 1


class Payload:
    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(("function", "argument"), [(os.mkdir, "{}"), (exec, "open('{}', 'w')")])
def test_malicious_pickle_is_refused_and_not_run(tmp_path, zipped, function, argument):
    sentinel, path = tmp_path / "owned", tmp_path / "evil.pt"
    payload, name = Payload(function, argument.format(sentinel)), function.__name__
    torch.save({"ema": payload}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=f"is refused: it names .*{name}.* runs code"):
        load_checkpoint(path)
    assert not sentinel.exists()
    torch.load(path, weights_only=False)  # the payload is live: without the guard it does run
    assert sentinel.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, not a state dict"),
        ({"epoch": 3}, r"entries that are not tensors \(epoch\) and none of ema, model, state_dict"),
        ({"ema": {"x": 3}}, r"holds entries that are not tensors \(x\) under 'ema'"),
        ({}, "holds nothing"),
    ],
)
def test_files_without_a_state_dict(tmp_path, content, message):
    path = tmp_path / "other.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(path)


def test_paths_without_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "BUNDLED_PATH", tmp_path / "gone.safetensors")
    with pytest.raises(ValueError, match="gone.safetensors cannot be read"):
        load_checkpoint(BUNDLED)
    with pytest.raises(ValueError, match="no checkpoint .*tried .*nothing.pt; .*dit-ti-2-cifar10, DiT-XL-2"):
        load_checkpoint(tmp_path / "nothing.pt")
    (tmp_path / "model.onnx").write_bytes(b"1234")
    with pytest.raises(ValueError, match="ends in '.onnx': weights end in .safetensors, .pt or .pth"):
        load_checkpoint(tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="folder without weights: tried .*transformer.*model.bin"):
        load_checkpoint(tmp_path)


def test_recorded_digest_is_checked(weights):
    good, bad = file_sha256(weights), "0" * 64
    record_digest(weights, good)
    assert weights.with_name("tiny.pt.sha256").read_text() == f"{good}  tiny.pt\n"
    load_checkpoint(weights)
    record_digest(weights, bad)
    with pytest.raises(ValueError, match=f"{good}.*{bad}.*--allow-unverified"):
        load_checkpoint(weights)
    with pytest.warns(UserWarning, match="unverified as asked"):
        assert load_checkpoint(weights, allow_unverified=True).sha256 == good


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """A tiny random diffusers DiT with equal embedders, and its folder; frequencies and eps as released."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 3, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 3}
    model = diffusers.DiTTransformer2DModel(**sizes, sample_size=8, patch_size=2, num_embeds_ada_norm=5)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * 0.15)
        first = model.transformer_blocks[0].norm1.emb
        for block in model.transformer_blocks:
            block.norm1.emb.load_state_dict(first.state_dict())
    folder = tmp_path_factory.mktemp("hf")
    model.save_pretrained(folder / "transformer")
    names = {str(i): f"class {i}" for i in range(5)}
    (folder / "model_index.json").write_text(json.dumps({"id2label": names}), encoding="utf-8")
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return model.eval(), folder


def test_diffusers_folder_gives_the_same_outputs(hf):
    theirs, folder = hf
    checkpoint = load_checkpoint(folder)
    assert checkpoint.source_key == "diffusers"
    assert checkpoint.class_names == [f"class {i}" for i in range(5)]
    ours = build_model(checkpoint, num_classes=5, image_size=64)
    assert ours.config["num_heads"] == 3  # not a published width: it must come from config.json
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    t, y = torch.tensor([0, 417, 999]), torch.tensor([0, 4, 5])
    with torch.no_grad():
        expected, out = theirs(x, t, y).sample, ours(x, t, y)
    assert expected.abs().mean() > 0.1
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)

    for inner in ("transformer", "transformer/diffusion_pytorch_model.safetensors"):
        other = load_checkpoint(folder / inner)
        assert (other.config, other.class_names) == (checkpoint.config, checkpoint.class_names)
        assert torch.equal(predict(build_model(other)), predict(ours))


def test_diffusers_bin_file_with_stored_positions(hf, tmp_path):
    theirs, folder = hf
    state_dict = {**theirs.state_dict(), "pos_embed.pos_embed": torch.full((1, 16, 24), 0.5)}
    torch.save(state_dict, tmp_path / "diffusion_pytorch_model.bin")
    (tmp_path / "config.json").write_text((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.state_dict["pos_embed"].eq(0.5).all()
    assert set(checkpoint.state_dict) == set(load_checkpoint(folder).state_dict)


EMBEDDER = "transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.bias"


@pytest.mark.parametrize(
    ("weights", "config", "message"),
    [
        ({EMBEDDER: torch.ones(24)}, {}, f"{EMBEDDER} differs from block 0's"),
        ({"transformer_blocks.1.attn1.to_k.weight": None}, {}, "lack 'transformer_blocks.1.attn1.to_k.weight'"),
        ({"caption.weight": torch.ones(1)}, {}, "hold 1 tensors that DiT has not, such as 'caption.weight'"),
        ({}, {"_class_name": "PixArtTransformer2DModel"}, "_class_name 'PixArtT.*', a DiT has DiTTransformer2DModel"),
        ({}, {"activation_fn": "geglu"}, "activation_fn 'geglu', a DiT has gelu-approximate"),
        ({}, {"num_layers": None}, "lacks 'num_layers'"),
        ({}, {"num_layers": 2}, "tensors that DiT has not, such as 'transformer_blocks.2"),
        ({}, {"num_embeds_ada_norm": 6}, "diffusers config says num_classes 6, the weights have 5"),
        ({}, {"out_channels": 4}, "diffusers config says learn_sigma False, the weights have True"),
        ({}, {"attention_head_dim": 12}, "diffusers config says hidden_size 36, the weights have 24"),
        ({}, None, "config.json is needed beside diffusers weights"),
    ],
)
def test_diffusers_weights_that_do_not_map_are_refused(hf, tmp_path, weights, config, message):
    theirs, folder = hf
    state_dict = {name: p for name, p in (theirs.state_dict() | weights).items() if p is not None}
    torch.save(state_dict, tmp_path / "diffusion_pytorch_model.bin")
    if config is not None:
        config = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8")) | config
        config = {key: value for key, value in config.items() if value is not None}
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path)


def test_vae_from_a_local_folder(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    made = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    made.save_pretrained(tmp_path / "pipe" / "vae")
    for folder in (tmp_path / "pipe" / "vae", tmp_path / "pipe"):
        vae = load_vae(folder, offline=True)
        assert not vae.training
        assert not any(p.requires_grad for p in vae.parameters())
        torch.testing.assert_close(vae.state_dict(), made.state_dict(), rtol=0, atol=0)


def test_vae_that_cannot_be_had(tmp_path, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    with pytest.raises(ValueError, match="no VAE 'emma': give ema, mse or a diffusers folder"):
        load_vae("emma")
    with pytest.raises(ValueError, match="cannot be had offline .*config.json"):
        load_vae(tmp_path)

    def unreachable(source, local_files_only, **options):
        raise OSError(f"{source} {local_files_only}\nsecond line")

    monkeypatch.setattr(diffusers.AutoencoderKL, "from_pretrained", unreachable)
    for name, offline in (("ema", True), ("mse", False)):
        with pytest.raises(ValueError, match=rf"be had.*\(stabilityai/sd-vae-ft-{name} {offline}\); .*--vae"):
            load_vae(name, offline=offline)


@pytest.mark.parametrize("path", [BUNDLED_PATH, WEIGHTS], ids=lambda path: path.stem)
def test_digest_and_size(path):
    digest = file_sha256(path)
    assert path.with_name(f"{path.name}.sha256").read_text() == f"{digest}  {path.name}\n"
    assert digest in (path.parent / "README.md").read_text(encoding="utf-8")
    assert path.stat().st_size < 17_000_000  # every clone downloads it
    assert list(path.parent.glob("*.safetensors")) == [path]


def test_bundled_model_is_the_named_one_in_16_bits(tmp_path, monkeypatch):
    checkpoint = load_checkpoint(BUNDLED)
    model = build_model(checkpoint, model="DiT-Ti/2", image_size=32, num_classes=10)
    expected = DiT_models["DiT-Ti/2"](input_size=32, in_channels=3, num_classes=10, learn_sigma=False)
    assert model.config == checkpoint.config == expected.config
    assert torch.equal(model.pos_embed, expected.pos_embed)
    assert checkpoint.class_names == CIFAR
    wide = [key for key, tensor in checkpoint.state_dict.items() if tensor.dtype != torch.float16]
    assert wide == ["pos_embed"]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.equal(p, checkpoint.state_dict[name].float()) for name, p in model.state_dict().items())
    monkeypatch.chdir(tmp_path)
    assert load_checkpoint(BUNDLED, offline=True).path == BUNDLED_PATH  # from any folder


def test_features_know_the_samples_of_the_card():
    """Ten classes in columns, 64 pixels a tile and 2 between: most are what they were sampled to be."""
    with Image.open(BUNDLED_PATH.with_suffix(".png")) as image:
        sheet = torch.from_numpy(np.array(image))
    assert sheet.shape == (8 * 66 - 2, 10 * 66 - 2, 3)
    tiles = [sheet[y : y + 64 : 2, x : x + 64 : 2] for y in range(0, 526, 66) for x in range(0, 658, 66)]
    network = load_features()
    assert (network.sha256, network.training) == (file_sha256(WEIGHTS), False)
    _, logits = extract(torch.stack(tiles), network)
    assert (logits.argmax(1) == torch.arange(80) % 10).float().mean() > 0.6
