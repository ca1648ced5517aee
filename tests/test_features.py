"""The CIFAR-10 classifier: the network, its files and its training on a few images."""

import numpy as np
import pytest
import torch
from commands import code
from images import CIFAR10_TEST, make_folder, pack
from safetensors.torch import save_file

from evaluate import features, train_features
from evaluate.features import CifarFeatures, extract, load_features
from evaluate.train_features import accuracy, load_images, save_features


def noise(n=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 32, 32, 3), dtype=torch.uint8, generator=generator)


def coloured(n, seed=0):
    """Images that can be told apart: the label is in the colour, over noise."""
    labels = torch.arange(n) % 10
    levels = torch.stack([labels * 25, 250 - labels * 25, labels % 2 * 200], dim=1)
    return (noise(n, seed) // 4 + levels[:, None, None] * 3 // 4).to(torch.uint8), labels


@pytest.fixture(scope="module")
def network():
    """Random weights, and norms that have seen something, so that every block takes part."""
    torch.manual_seed(0)
    net = CifarFeatures()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.0)
            module.running_mean.normal_(0, 0.1)
    return net.eval().requires_grad_(False)


# ---- the network


def test_an_image_depends_neither_on_its_batch_nor_on_the_mode(network):
    images = coloured(7)[0]
    whole, single = extract(images, network), extract(images, network, batch_size=1)
    mixed = extract(torch.cat([noise(3), images]), network, batch_size=4)
    assert [tuple(found.shape) for found in whole] == [(7, features.FEATURES), (7, 10)]
    for a, b, c in zip(whole, single, mixed, strict=True):
        assert a.dtype == torch.float32
        assert a.std(dim=0).mean() > 0.01  # images differ, so that the lines below say something
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a, c[3:], rtol=1e-4, atol=1e-5)
    training = CifarFeatures().train()
    training.load_state_dict(network.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(extract(images, training)[0], whole[0])
    assert torch.equal(training.stem[1].running_mean, network.stem[1].running_mean)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (noise().numpy(), TypeError, "not ndarray"),
        (noise().float(), TypeError, "not torch.float32"),
        (noise().permute(0, 3, 1, 2), ValueError, r"expected shape \(N, 32, 32, 3\), got \(4, 3, 32, 32\)"),
        (noise()[:0], ValueError, r"got \(0, 32, 32, 3\)"),
    ],
)
def test_other_images_are_refused(network, images, error, message):
    for take in (network, lambda images: extract(images, network)):
        with pytest.raises(error, match=message):
            take(images)


# ---- files


def test_weights_survive_the_file(tmp_path, network):
    net = CifarFeatures()
    net.load_state_dict(network.state_dict())
    path = tmp_path / "new" / "w.safetensors"
    digest = save_features(net, path, note="x")
    assert path.stat().st_size <= 3_000_000
    assert (tmp_path / "new" / "w.safetensors.sha256").read_text() == f"{digest}  w.safetensors\n"
    assert len(list(path.parent.iterdir())) == 2
    again = load_features(path)
    assert (again.sha256, again.training, again.head.weight.dtype) == (digest, False, torch.float32)
    assert not any(p.requires_grad for p in again.parameters())
    before, rounded, after = (n(noise())[0] for n in (network, net.eval(), again))
    assert torch.equal(rounded, after)  # `save_features` rounds the network that it saves
    assert not torch.equal(before, after)
    torch.testing.assert_close(before, after, rtol=0.02, atol=0.02)


def test_damaged_weights_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    save_features(CifarFeatures(), path)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match="is not the file that was recorded"):
        load_features(path)
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="for another network"):
        load_features(tmp_path / "other.safetensors")


# ---- training


def test_padding_reflects():
    ramp = torch.arange(32, dtype=torch.uint8).view(1, 32, 1, 1).expand(1, 32, 32, 3)
    result, turned = train_features.padded(ramp), train_features.padded(ramp.transpose(1, 2))
    assert result.shape == (1, 40, 40, 3)
    assert result[0, :, 7, 1].tolist() == turned[0, 7, :, 1].tolist() == [4, 3, 2, 1, *range(32), 30, 29, 28, 27]


def test_augmented_images_are_shifted_mirrored_and_partly_grey():
    # The red of a pixel is its column, the green its row: what was done can be read off.
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    image = torch.stack([columns, rows, torch.full_like(rows, 200)], dim=2).to(torch.uint8)[None]
    generator = torch.Generator().manual_seed(0)
    x = train_features.augmented(train_features.padded(image), torch.zeros(200, dtype=torch.int64), generator)
    assert x.shape == (200, 3, 32, 32)
    assert x.is_contiguous(memory_format=torch.channels_last)
    grey = x[:, 2] == 0
    assert grey.sum((1, 2)).min() >= 36
    assert grey.sum((1, 2)).max() == train_features.CUTOUT**2
    assert (x.movedim(1, 3)[grey] == 0).all()
    assert (grey.any(2).sum(1) * grey.any(1).sum(1) == grey.sum((1, 2))).all()  # a rectangle
    red, green = ((x[:, i] / 4 + 0.5) * 255 for i in (0, 1))
    step = (red[:, :, 12:20].diff(dim=2).round() * ~(grey[:, :, 12:19] | grey[:, :, 13:20])).sum((1, 2)).sign()
    assert set(step.tolist()) >= {-1.0, 1.0}
    assert 60 < (step == 1).sum() < 140  # half of them are mirrored
    down = (green[:, 12:20].diff(dim=1).round() * ~(grey[:, 12:19] | grey[:, 13:20])).sum((1, 2)).sign()
    assert (down >= 0).all()  # upside down, never
    shifts = {int(g[16][~m[16]].round().unique()) - 16 for g, m in zip(green, grey, strict=True) if not m[16].all()}
    assert shifts == set(range(-train_features.PAD, train_features.PAD + 1))


def test_one_cycle():
    values = [train_features.one_cycle(p) for p in (0, train_features.WARM_UP / 2, train_features.WARM_UP, 0.6, 1)]
    assert values == pytest.approx([0, 0.5, 1, 0.5, 0], abs=1e-12)


def test_training_lowers_the_loss(monkeypatch):
    monkeypatch.setattr(features, "WIDTHS", (16, 32, features.FEATURES))  # a quarter of the work
    monkeypatch.setattr(features, "DEPTHS", (1, 1, 1))
    monkeypatch.setattr(train_features, "RATE", 0.16)
    images, labels = coloured(32)
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        net = CifarFeatures()
        runs.append(train_features.fit(net, images, labels, epochs=4, batch_size=16))
        assert not net.training
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)  # the same seed
    assert runs[0][-1] < runs[0][0] - 0.3
    monkeypatch.setattr(train_features, "RATE", 1e31)
    with pytest.raises(ValueError, match="diverged in epoch 1"):
        train_features.fit(net, images, labels, epochs=1, batch_size=16)


def test_other_data_are_refused(tmp_path):
    images, labels = coloured(12)
    path = pack(tmp_path / "a.npz", images.numpy(), labels.numpy() % 2, classes=np.array(["a", "b"]))
    with pytest.raises(ValueError, match="2 classes, the network is for 10"):
        load_images(path)
    with pytest.raises(ValueError, match=r"expected images of 32 x 32 pixels, got \(4, 3, 31, 31\)"):
        load_images(make_folder(tmp_path / "small", images[:4, :31, :31].numpy(), classes=1))


def test_command(tmp_path, capsys):
    images, labels = coloured(8)
    data, out = pack(tmp_path / "a.npz", images.numpy(), labels.numpy()), tmp_path / "w.safetensors"
    flags = ["--epochs", 1, "--device", "cpu"]
    assert code(train_features.main, "--data", data, "--test", data, "--out", out, *flags) == 0
    network = load_features(out)
    epoch, share, wrote = capsys.readouterr().out.splitlines()
    assert epoch.startswith("epoch   1/1  loss ")
    assert share == f"test accuracy {accuracy(network, images, labels):.2%} on 8 images"  # of what was stored
    assert wrote.endswith(f"sha256 {network.sha256}")


def test_the_packaged_weights_can_tell_the_classes(tmp_path):
    network = load_features()
    assert features.WEIGHTS.stat().st_size <= 3_000_000
    assert features.WEIGHTS.with_name(f"{features.WEIGHTS.name}.sha256").is_file()
    if not CIFAR10_TEST.is_file():
        pytest.skip("no test images: ADACORR_CIFAR10_TEST names the packed file")
    with np.load(CIFAR10_TEST) as whole:  # the first 150, since to decode all takes seconds
        few = {"offsets": whole["offsets"][:151], "labels": whole["labels"][:150], "classes": whole["classes"]}
        np.savez(tmp_path / "few.npz", jpeg=whole["jpeg"][: few["offsets"][-1]], **few)
    images, test = load_images(tmp_path / "few.npz")
    # 90.35 % of all 10,000; one standard error of 150 is 2.4 %.
    assert accuracy(network, images, test.labels) > 0.82
