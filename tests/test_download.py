"""Checkpoints by name and by path: every format, every way they can be wrong, and downloads that fail."""

import argparse
import contextlib
import http.server
import json
import os
import pathlib
import threading

import pytest
import torch

import download
from download import (
    BUNDLED,
    BUNDLED_PATH,
    CheckpointError,
    build_model,
    file_sha256,
    load_checkpoint,
    load_vae,
    released_name,
    save_checkpoint,
)
from models import DiT, DiT_models

NAME = "DiT-XL-2-256x256.pt"


@pytest.fixture(autouse=True)
def _quiet(monkeypatch, tmp_path):
    """One thread, and a home of its own for downloads: no test may see or touch the user's."""
    torch.set_num_threads(1)
    monkeypatch.setenv("ADACORR_HOME", str(tmp_path / "home"))


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


def predict(model, classes=5, channels=4, size=8):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, channels, size, size, generator=generator)
    with torch.no_grad():
        return model(x, torch.tensor([3, 998]), torch.tensor([1, classes]))


# ----------------------------------------------------------------------------------------------------
# Formats


def test_flat_pt_loads_and_builds_the_same_model(weights, tiny):
    checkpoint = load_checkpoint(weights)
    assert (checkpoint.source_key, checkpoint.config, checkpoint.class_names) == ("flat", None, None)
    assert checkpoint.path == weights
    assert checkpoint.sha256 == file_sha256(weights)
    model = build_model(checkpoint)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(predict(model), predict(tiny))
    model.blocks[0].attn.qkv.weight.zero_()  # the model must not share memory with the checkpoint
    assert checkpoint.state_dict["blocks.0.attn.qkv.weight"].abs().max() > 0


def test_old_torch_format_loads(tmp_path, tiny):
    path = tmp_path / "old.pth"
    torch.save(tiny.state_dict(), path, _use_new_zipfile_serialization=False)
    assert torch.equal(predict(build_model(load_checkpoint(path))), predict(tiny))


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
    assert torch.equal(predict(build_model(checkpoint), 2, 3), predict(odd, 2, 3))
    assert [p.name for p in tmp_path.iterdir() if "part" in p.name] == []


def test_half_precision_weights_become_float32(tmp_path, tiny):
    path = tmp_path / "half.safetensors"
    save_checkpoint(path, {name: p.half() for name, p in tiny.state_dict().items()}, tiny.config)
    checkpoint = load_checkpoint(path)
    assert checkpoint.state_dict["pos_embed"].dtype == torch.float16
    model = build_model(checkpoint)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.blocks[0].mlp.fc1.weight, tiny.state_dict()["blocks.0.mlp.fc1.weight"].half().float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_sise": 3}, "differ in hidden_sise"),
        ({"num_heads": 5}, "hidden_size 192 must be a multiple of num_heads 5"),
        ({"depth": "2"}, "config cannot be used"),
        ({"depth": 3}, "not a whole DiT: lacks 'blocks.2.adaLN_modulation.1.bias' and 9 more"),
        ({"depth": 1}, "has 'blocks.1.adaLN_modulation.1.bias' and 9 more that DiT has not"),
        ({"num_classes": 6}, r"embedding_table.weight' has shape \(6, 192\), expected \(7, 192\)"),
    ],
)
def test_metadata_that_contradicts_the_weights_is_refused(tmp_path, tiny, change, message):
    path = tmp_path / "wrong.safetensors"
    save_checkpoint(path, tiny.state_dict(), {**tiny.config, **change})
    with pytest.raises(CheckpointError, match=message):
        build_model(load_checkpoint(path))


def test_class_names_must_match_the_classes(tmp_path, tiny):
    path = tmp_path / "names.safetensors"
    save_checkpoint(path, tiny.state_dict(), tiny.config, class_names=["one", "two"])
    with pytest.raises(CheckpointError, match="class_names are not a list with one name for each class"):
        load_checkpoint(path)


# ----------------------------------------------------------------------------------------------------
# Reading the config off the shapes


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"learn_sigma": False, "in_channels": 3, "num_classes": 10},
        {"num_classes": 0},
        {"mlp_ratio": 100 / 384, "patch_size": 4, "hidden_size": 384, "num_heads": 6},
    ],
)
def test_config_is_inferred_from_shapes(arguments):
    config = {**DiT(input_size=16, depth=3, hidden_size=192, num_heads=3, num_classes=7).config, **arguments}
    with torch.device("meta"):
        state_dict = DiT(**config).state_dict()
    assert download.infer_config(state_dict) == config


def test_mlp_ratio_survives_truncation():
    for width in (49, 192, 384, 768, 1152):
        for hidden in range(1, 3 * width, 7):
            assert int(width * download._mlp_ratio(hidden, width)) == hidden


def test_unpublished_width_without_config_is_refused():
    with pytest.raises(CheckpointError, match="width 64 is not a published one .* number of heads is unknown"):
        download.infer_config(DiT(8, 2, 4, 64, 1, 4).state_dict())


def test_other_weights_are_refused(tmp_path):
    path = tmp_path / "linear.pt"
    torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(CheckpointError, match="lack 'x_embedder.proj.weight': not a DiT"):
        build_model(load_checkpoint(path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "DiT-XL/2"}, "is a DiT 2 deep, 192 wide, 3 heads, patch 2, --model DiT-XL/2 was asked"),
        ({"model": "DiT-XXL/2"}, "no model 'DiT-XXL/2': there are DiT-XL/2, "),
        ({"num_classes": 1000}, "is for 5 classes, --num-classes 1000 was asked"),
        (
            {"image_size": 512},
            r"is for 64 px \(an input of 8\), --image-size 512 was asked; use --image-size 64",
        ),
        ({"image_size": 250}, "--image-size 250 is not a positive multiple of 8"),
        ({"image_size": 64, "latent": False}, "is for 8 px .* --image-size 64 was asked"),
        ({"image_size": 0, "latent": False}, "--image-size 0 is not a positive number"),
    ],
)
def test_contradictions_name_both_sides(weights, arguments, message):
    with pytest.raises(CheckpointError, match=message):
        build_model(load_checkpoint(weights), **arguments)


def test_what_agrees_is_accepted(weights):
    build_model(load_checkpoint(weights), image_size=64, num_classes=5)
    build_model(load_checkpoint(weights), image_size=64, latent=True)
    build_model(load_checkpoint(weights), image_size=8, latent=False)


def test_512_px_asked_of_the_256_px_release_names_the_other_file(tmp_path):
    with torch.device("meta"):
        state_dict = DiT_models["DiT-XL/2"]().state_dict()
    checkpoint = download.Checkpoint(state_dict, None, tmp_path / NAME, "", "flat", None)
    with pytest.raises(CheckpointError, match=r"is for 256 px .* 512 was asked; use --ckpt DiT-XL-2-512x512.pt"):
        build_model(checkpoint, model="DiT-XL/2", image_size=512)


def test_released_names():
    assert released_name("DiT-XL/2", 256) == NAME
    assert released_name("DiT-XL/2", 512) == "DiT-XL-2-512x512.pt"
    for model, size in (("DiT-XL/2", 128), ("DiT-B/4", 256)):
        with pytest.raises(ValueError, match="there are DiT-XL/2 at 256 and at 512 px"):
            released_name(model, size)


# ----------------------------------------------------------------------------------------------------
# The bundled model


def test_bundled_model_loads_by_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = load_checkpoint(BUNDLED, offline=True)
    assert checkpoint.path == BUNDLED_PATH
    assert BUNDLED_PATH.stat().st_size < 17e6
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    assert checkpoint.class_names == names
    assert checkpoint.sha256 in (BUNDLED_PATH.parent / "README.md").read_text(encoding="utf-8")
    assert (BUNDLED_PATH.parent / f"{BUNDLED_PATH.name}.sha256").is_file()
    model = build_model(checkpoint, model="DiT-Ti/2", image_size=32, num_classes=10)
    fresh = DiT_models["DiT-Ti/2"](input_size=32, in_channels=3, num_classes=10, learn_sigma=False)
    assert model.config == fresh.config
    assert torch.equal(model.pos_embed, fresh.pos_embed)


def test_bundled_model_has_learnt_to_predict_noise():
    model = build_model(load_checkpoint(BUNDLED))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(8, 3, 32, 32, generator=generator)
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[500].float()
    flat = torch.linspace(-0.8, 0.8, 8).reshape(8, 1, 1, 1)  # eight plain grey images
    with torch.no_grad():
        t, y = torch.full((8,), 500), torch.full((8,), model.null_label)
        predicted = model(abar.sqrt() * flat + (1 - abar).sqrt() * noise, t, y)
    assert (predicted - noise).square().mean().item() < 0.05  # an untrained model has 1


def test_missing_bundled_file_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "BUNDLED_PATH", tmp_path / "gone.safetensors")
    with pytest.raises(CheckpointError, match="bundled model is missing: tried .*gone.safetensors"):
        load_checkpoint(BUNDLED)


# ----------------------------------------------------------------------------------------------------
# Files that are not what they seem


def test_missing_file_lists_what_was_tried(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint .*tried .*nothing.pt; .*dit-ti-2-cifar10, DiT-XL-2"):
        load_checkpoint(tmp_path / "nothing.pt")


@pytest.mark.parametrize("fraction", [0.5, 0.999])
def test_truncated_pt(weights, fraction):
    content = weights.read_bytes()
    weights.write_bytes(content[: int(len(content) * fraction)])
    size = weights.stat().st_size
    with pytest.raises(CheckpointError, match=rf"tiny.pt is corrupt or incomplete \({size} bytes; .*again$"):
        load_checkpoint(weights)
    assert weights.exists()


def test_truncated_old_format(tmp_path, tiny):
    path = tmp_path / "old.pt"
    torch.save(tiny.state_dict(), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="corrupt or incomplete"):
        load_checkpoint(path)


@pytest.mark.parametrize("kept", [0.5, 0.0001])
def test_truncated_safetensors(tmp_path, tiny, kept):
    path = tmp_path / "tiny.safetensors"
    save_checkpoint(path, tiny.state_dict(), tiny.config)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    expected = f"promises {len(content)} bytes" if kept == 0.5 else "header"
    with pytest.raises(CheckpointError, match=f"corrupt or incomplete .*{expected}"):
        load_checkpoint(path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html>\n<html><title>404</title>", "is a web page, not weights"),
        (b"\n  <HTML><body>sign in", "is a web page, not weights"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
            "Git LFS pointer.*git lfs pull",
        ),
        (b"", r"is empty \(0 bytes\)"),
        (b"hello, these are not weights at all", "corrupt or incomplete"),
    ],
)
def test_impostors_are_recognised(tmp_path, suffix, content, message):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(path)
    assert len(str(caught.value).splitlines()) == 1


class Payload:
    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(("function", "name"), [(os.mkdir, "mkdir"), (pathlib.Path.touch, "getattr"), (exec, "exec")])
def test_malicious_pickle_is_refused_and_not_run(tmp_path, zipped, function, name):
    sentinel = tmp_path / "owned"
    argument = f"open({str(sentinel)!r}, 'w')" if function is exec else str(sentinel)
    if function is pathlib.Path.touch:
        argument = pathlib.Path(sentinel)
    path = tmp_path / "evil.pt"
    torch.save({"ema": Payload(function, argument)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="is refused: it names ") as caught:
        load_checkpoint(path)
    if function is not pathlib.Path.touch:  # named by one of the several globals it needs
        assert name in str(caught.value)
    assert not sentinel.exists()
    torch.load(path, weights_only=False)  # the payload is live: without the guard it does run
    assert sentinel.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, not a state dict"),
        ({"epoch": 3}, r"entries that are not tensors \(epoch\) and none of ema, model, state_dict"),
        ({"ema": {"x": 3}}, r"'ema' holds entries that are not tensors \(x\)"),
        ({}, "holds nothing"),
    ],
)
def test_files_without_a_state_dict(tmp_path, content, message):
    path = tmp_path / "other.pt"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)


def test_unknown_suffix(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"1234")
    with pytest.raises(CheckpointError, match="ends in '.onnx': weights end in .safetensors, .pt or .pth"):
        load_checkpoint(path)


def test_folder_without_weights(tmp_path):
    with pytest.raises(CheckpointError, match="folder without weights: tried .*transformer.*model.bin"):
        load_checkpoint(tmp_path)


# ----------------------------------------------------------------------------------------------------
# Digests


def test_recorded_digest_is_checked(weights):
    good = file_sha256(weights)
    sidecar = weights.with_name("tiny.pt.sha256")
    sidecar.write_text(f"{good}  tiny.pt\n", encoding="utf-8")
    load_checkpoint(weights)
    bad = "0" * 64
    sidecar.write_text(f"{bad}  tiny.pt\n", encoding="utf-8")
    with pytest.raises(CheckpointError, match=f"{good}.*{bad}.*--allow-unverified"):
        load_checkpoint(weights)
    with pytest.warns(UserWarning, match="unverified as asked"):
        assert load_checkpoint(weights, allow_unverified=True).sha256 == good


def test_no_digest_is_written_beside_the_users_own_files(weights):
    load_checkpoint(weights)
    assert not weights.with_name("tiny.pt.sha256").exists()


# ----------------------------------------------------------------------------------------------------
# Downloading


@pytest.fixture
def server(tmp_path, monkeypatch, weights):
    """A local server in place of the release's; `server.cut` shortens a body, `server.page` replaces it."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.requests.append(self.path)
            if self.path != f"/models/{NAME}":
                self.send_error(404)
                return
            body = self.server.page or self.server.body
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # a client that gives up is what some tests are about
                self.wfile.write(body[: len(body) - self.server.cut])

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.body, httpd.cut, httpd.page, httpd.requests = weights.read_bytes(), 0, None, []
        httpd.home = tmp_path / "home"
        monkeypatch.setattr(download, "RELEASE_URL", f"http://127.0.0.1:{httpd.server_port}/models/{{name}}")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        thread = threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield httpd
        httpd.shutdown()
        thread.join()


def test_download_once_then_check_at_every_load(server, tiny):
    checkpoint = load_checkpoint(NAME)
    target = server.home / NAME
    assert checkpoint.path == target
    assert target.read_bytes() == server.body
    assert (server.home / f"{NAME}.sha256").read_text(encoding="utf-8") == f"{checkpoint.sha256}  {NAME}\n"
    assert sorted(p.name for p in server.home.iterdir()) == [NAME, f"{NAME}.sha256"]
    assert torch.equal(predict(build_model(checkpoint)), predict(tiny))

    assert load_checkpoint(NAME, offline=True).sha256 == checkpoint.sha256
    assert server.requests == [f"/models/{NAME}"]

    content = bytearray(target.read_bytes())
    content[len(content) // 2] ^= 1  # one flipped bit, which the file format itself would not notice
    target.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"not the file that was recorded.*{checkpoint.sha256}"):
        load_checkpoint(NAME, offline=True)


def test_truncated_transfer_leaves_nothing(server):
    server.cut = 1000
    total = len(server.body)
    with pytest.raises(CheckpointError, match=rf"stopped at {total - 1000} of {total} bytes.*same command again"):
        load_checkpoint(NAME)
    assert list(server.home.iterdir()) == []
    server.cut = 0
    assert load_checkpoint(NAME).path.is_file()


def test_web_page_in_place_of_weights_is_not_kept(server):
    server.page = b"<html>please log in</html>"
    with pytest.raises(CheckpointError, match=r"what http.* served is a web page"):
        load_checkpoint(NAME)
    assert list(server.home.iterdir()) == []


def test_interrupt_while_downloading_leaves_nothing(server, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(download, "_copy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_checkpoint(NAME)
    assert list(server.home.iterdir()) == []


def test_dead_link_and_full_disk_are_reported(server, monkeypatch):
    with pytest.raises(CheckpointError, match=r"could not download http.*512x512.pt: HTTP Error 404"):
        load_checkpoint("DiT-XL-2-512x512.pt")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download, "_copy", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        load_checkpoint(NAME)
    assert list(server.home.iterdir()) == []


def test_offline_lists_the_url_and_every_path(server, tmp_path):
    with pytest.raises(CheckpointError, match="--offline") as caught:
        load_checkpoint(NAME, offline=True)
    for tried in (
        download.RELEASE_URL.format(name=NAME),
        str(server.home / NAME),
        str(pathlib.Path.cwd() / NAME),
    ):
        assert tried in str(caught.value)
    assert server.requests == []


def test_file_placed_by_hand_is_recorded_at_first_use(server, weights):
    server.home.mkdir()
    (server.home / NAME).write_bytes(server.body)
    checkpoint = load_checkpoint(NAME)
    assert server.requests == []
    assert (server.home / f"{NAME}.sha256").read_text(encoding="utf-8").startswith(checkpoint.sha256)


def test_cache_dir_and_local_file_come_first(server, tmp_path, monkeypatch):
    assert load_checkpoint(NAME, cache_dir=tmp_path / "else").path == tmp_path / "else" / NAME
    monkeypatch.chdir(tmp_path / "else")
    assert load_checkpoint(NAME).path == pathlib.Path(NAME)
    assert len(server.requests) == 1


# ----------------------------------------------------------------------------------------------------
# Hugging Face diffusers folders


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """A tiny random diffusers DiT with equal embedders, and its folder; frequencies and eps as released."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=5,
    )
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
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, 4, 8, 8, generator=generator)
    t, y = torch.tensor([0, 417, 999]), torch.tensor([0, 4, 5])
    with torch.no_grad():
        expected, out = theirs(x, t, y).sample, ours(x, t, y)
    assert expected.abs().mean() > 0.1
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)

    inner = load_checkpoint(folder / "transformer")
    single = load_checkpoint(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    for other in (inner, single):
        assert other.config == checkpoint.config
        assert all(torch.equal(p, other.state_dict[name]) for name, p in checkpoint.state_dict.items())
        assert torch.equal(predict(build_model(other)), predict(ours))


def test_diffusers_bin_file_with_stored_positions(hf, tmp_path):
    theirs, folder = hf
    state_dict = {**theirs.state_dict(), "pos_embed.pos_embed": torch.full((1, 16, 24), 0.5)}
    torch.save(state_dict, tmp_path / "diffusion_pytorch_model.bin")
    (tmp_path / "config.json").write_text((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.state_dict["pos_embed"].eq(0.5).all()
    assert set(checkpoint.state_dict) == set(load_checkpoint(folder).state_dict)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ("embedder", "transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.bias differs from block 0's"),
        ("missing", "lack 'transformer_blocks.1.attn1.to_k.weight'"),
        ("extra", "hold 1 tensors that DiT has not, such as 'caption_projection.weight'"),
        ("class", "_class_name 'PixArtTransformer2DModel', a DiT has DiTTransformer2DModel"),
        ("activation", "activation_fn 'geglu', a DiT has gelu-approximate"),
        ("incomplete", "lacks 'num_layers'"),
        ("no config", "config.json is needed beside diffusers weights"),
    ],
)
def test_diffusers_weights_that_do_not_map_are_refused(hf, tmp_path, edit, message):
    theirs, folder = hf
    state_dict = {name: p.clone() for name, p in theirs.state_dict().items()}
    config = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
    if edit == "embedder":
        state_dict["transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.bias"][0] += 1e-3
    elif edit == "missing":
        del state_dict["transformer_blocks.1.attn1.to_k.weight"]
    elif edit == "extra":
        state_dict["caption_projection.weight"] = torch.zeros(1)
    elif edit == "class":
        config["_class_name"] = "PixArtTransformer2DModel"
    elif edit == "activation":
        config["activation_fn"] = "geglu"
    elif edit == "incomplete":
        del config["num_layers"]
    torch.save(state_dict, tmp_path / "diffusion_pytorch_model.bin")
    if edit != "no config":
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path)


# ----------------------------------------------------------------------------------------------------
# The VAE


def test_vae_from_a_local_folder(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    made = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    made.save_pretrained(tmp_path / "pipe" / "vae")
    for folder in (tmp_path / "pipe" / "vae", tmp_path / "pipe"):
        vae = load_vae(folder, offline=True)
        assert not vae.training
        assert not any(p.requires_grad for p in vae.parameters())
        for name, p in made.state_dict().items():
            assert torch.equal(vae.state_dict()[name], p)


def test_vae_that_cannot_be_had(tmp_path, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    with pytest.raises(CheckpointError, match="no VAE 'emma': give ema, mse or a diffusers folder"):
        load_vae("emma")
    with pytest.raises(CheckpointError, match="cannot be had offline .*config.json"):
        load_vae(tmp_path)

    def unreachable(source, **options):
        asked.append((source, options["local_files_only"]))
        raise OSError("no connection\nsecond line")

    asked = []
    monkeypatch.setattr(diffusers.AutoencoderKL, "from_pretrained", unreachable)
    for name, offline in (("ema", True), ("mse", False)):
        with pytest.raises(CheckpointError, match=rf"sd-vae-ft-{name} cannot be had.*\(no connection\); .*--vae"):
            load_vae(name, offline=offline)
    assert asked == [("stabilityai/sd-vae-ft-ema", True), ("stabilityai/sd-vae-ft-mse", False)]
