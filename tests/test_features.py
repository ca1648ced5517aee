"""The distance against closed forms and scipy; the network, its files and its training on a few images."""

import numpy as np
import pytest
import scipy.linalg
import torch
from images import CIFAR10_TEST, make_folder, pack
from safetensors.torch import save_file

from evaluate import features, train_features
from evaluate.features import CifarFeatures, extract, load_features, load_images, save_features
from evaluate.frechet import Moments, frechet_distance


def noise(n=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 32, 32, 3), dtype=torch.uint8, generator=generator)


def coloured(n, seed=0):
    """Images that can be told apart: the label is in the colour, over noise."""
    labels = torch.arange(n) % 10
    levels = torch.stack([labels * 25, 250 - labels * 25, labels % 2 * 200], dim=1)
    return (noise(n, seed) // 4 + levels[:, None, None] * 3 // 4).to(torch.uint8), labels


def covariance(d, seed, rank=None):
    x = np.random.default_rng(seed).normal(size=(rank or 3 * d, d))
    return x.T @ x / len(x)


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


# ---- the distance


def test_distance_of_equal_covariances_is_the_squared_shift():
    sigma = covariance(3, 1)
    assert frechet_distance(np.ones(3), sigma, np.ones(3), sigma) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(np.zeros(3), sigma, [1.0, -2.0, 2.0], sigma) == pytest.approx(9, abs=1e-12)


def test_distance_of_diagonal_covariances():
    # They commute, so the trace is the sum over (a - b)^2 of the standard deviations: 1 + 4 + 0 + 25.
    a, b = np.array([1.0, 2, 3, 0]), np.array([2.0, 4, 3, 5])
    value = frechet_distance(np.zeros(4), np.diag(a**2), np.ones(4), np.diag(b**2))
    assert value == pytest.approx(4 + 30, abs=1e-12)


def test_distance_of_covariances_that_do_not_commute():
    a, b = covariance(8, 2), 3 * covariance(8, 3)
    root = scipy.linalg.sqrtm(a @ b).real
    expected = np.trace(a) + np.trace(b) - 2 * np.trace(root)
    assert frechet_distance(np.zeros(8), a, np.zeros(8), b) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(np.zeros(8), b, np.zeros(8), a) == pytest.approx(expected, rel=1e-10)


def test_distance_of_singular_covariances():
    # Rank 5 of 40: no regulariser, no complex numbers, and still zero for equal ones.
    a = covariance(40, 4, rank=5)
    assert frechet_distance(np.zeros(40), a, np.zeros(40), a) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(np.zeros(40), 4 * a, np.zeros(40), a) == pytest.approx(np.trace(a), rel=1e-10)
    # Supports at right angles: the mixed term is exactly nothing.
    q = np.linalg.qr(np.random.default_rng(5).normal(size=(40, 40)))[0]
    a, b = q[:, :9] @ q[:, :9].T, q[:, 9:12] @ q[:, 9:12].T
    assert frechet_distance(np.zeros(40), a, np.zeros(40), b) == pytest.approx(12, abs=1e-10)


@pytest.mark.parametrize("position", range(4))
def test_distance_refuses_what_is_not_finite(position):
    values = [np.zeros(2), np.eye(2), np.zeros(2), np.eye(2)]
    values[position] = values[position] + np.array([0, np.nan])
    with pytest.raises(ValueError, match=("mu1", "sigma1", "mu2", "sigma2")[position] + " holds infinite or undefined"):
        frechet_distance(*values)


@pytest.mark.parametrize(
    ("sigma", "message"),
    [
        (np.eye(3), "sigma1: expected shape"),
        (np.diag([1.0, -0.1]), "negative eigenvalue"),
        (np.array([[1.0, 0.2], [0, 1]]), "not symmetric"),
    ],
)
def test_distance_refuses_what_is_no_covariance(sigma, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(np.zeros(2), sigma, np.zeros(2), np.eye(2))


# ---- moments


def test_moments_equal_numpy_however_they_come_in():
    x = np.random.default_rng(0).normal(size=(101, 7)) @ np.random.default_rng(1).normal(size=(7, 7)) + 5
    stream = Moments()
    for rows in (x[:1], x[1:1], x[1:40], x[40:]):
        stream.update(rows)
    for result in (stream, Moments(x)):
        assert result.count == 101
        assert result.mean.dtype == result.covariance.dtype == np.float64
        np.testing.assert_allclose(result.mean, x.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(result.covariance, np.cov(x, rowvar=False), rtol=1e-11, atol=1e-12)


def test_moments_keep_their_digits():
    x = np.random.default_rng(2).normal(size=(64, 3))
    stream = Moments()
    for rows in np.split(x + 1e8, 8):
        stream.update(rows)
    np.testing.assert_allclose(stream.covariance, np.cov(x, rowvar=False), atol=1e-6)
    single = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) + 100  # float32, counted in float64
    np.testing.assert_allclose(Moments(single).covariance, np.cov(single.double().numpy(), rowvar=False), rtol=1e-11)


def test_moments_refuse():
    stream = Moments(np.zeros((5, 2)))
    with pytest.raises(ValueError, match="features of image 6 are infinite or undefined"):
        stream.update(np.array([[0, 0], [np.inf, 0]]))
    with pytest.raises(ValueError, match="3 wide, those before were 2"):
        stream.update(np.zeros((1, 3)))
    with pytest.raises(ValueError, match=r"expected shape \(n, D\)"):
        stream.update(np.zeros(2))
    with pytest.raises(ValueError, match="at least 2 images, there are 1"):
        _ = Moments(np.zeros((1, 2))).covariance
    assert stream.count == 5


# ---- the network


def test_shapes_and_the_two_kinds_of_input(network):
    images = noise()
    feats, logits = network(images)
    assert feats.shape == (4, features.FEATURES)
    assert logits.shape == (4, 10)
    assert feats.dtype == logits.dtype == torch.float32
    floats = network(images.permute(0, 3, 1, 2).float() / 255)
    assert torch.equal(floats[0], feats)
    assert torch.equal(floats[1], logits)


def test_an_image_does_not_depend_on_its_batch(network):
    images = coloured(7)[0]
    whole, single = extract(images, network), extract(images, network, batch_size=1)
    mixed = extract(torch.cat([noise(3), images]), network, batch_size=4)
    for a, b, c in zip(whole, single, mixed, strict=True):
        assert a.std(dim=0).mean() > 0.01  # images differ, so that the lines below say something
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a, c[3:], rtol=1e-4, atol=1e-5)
    assert torch.equal(whole[0], extract(images, network)[0])


def test_extract_leaves_training_mode(network):
    net = CifarFeatures().train()
    net.load_state_dict(network.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(extract(noise(), net)[0], extract(noise(), network)[0])
    assert torch.equal(net.stem[1].running_mean, network.stem[1].running_mean)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (noise().numpy(), TypeError, "not ndarray"),
        (noise().int(), TypeError, "not torch.int32"),
        (noise().permute(0, 3, 1, 2), ValueError, r"torch.uint8 of shape \(N, 32, 32, 3\), got \(4, 3, 32, 32\)"),
        (noise()[:0], ValueError, r"got \(0, 32, 32, 3\)"),
        (noise().float(), ValueError, r"torch.float32 of shape \(N, 3, 32, 32\)"),
        (noise().permute(0, 3, 1, 2).float(), ValueError, r"must lie in \[0, 1\]"),
        (torch.full((1, 3, 32, 32), torch.nan), ValueError, r"must lie in \[0, 1\], these are in \[nan, nan\]"),
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
    assert again.sha256 == digest
    assert not again.training
    assert again.head.weight.dtype == torch.float32
    assert not any(p.requires_grad for p in again.parameters())
    before, rounded, after = (n(noise())[0] for n in (network, net.eval(), again))
    assert torch.equal(rounded, after)  # `save_features` rounds the network that it saves
    assert not torch.equal(before, after)
    torch.testing.assert_close(before, after, rtol=0.02, atol=0.02)


def test_damaged_weights_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    save_features(CifarFeatures(), path)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"?")
    with pytest.raises(ValueError, match="is not the file that was recorded"):
        load_features(path)
    path.with_name("w.safetensors.sha256").unlink()
    load_features(path)  # nothing recorded, nothing to hold it to
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="not a whole one"):
        load_features(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="for another network"):
        load_features(path)


def test_images_of_the_network(tmp_path):
    images, labels = coloured(12)
    path = pack(tmp_path / "a.npz", images.numpy(), labels.numpy())
    found, data = load_images(path, labelled=True)
    assert torch.equal(found, images)
    assert torch.equal(data.labels, labels)
    assert torch.equal(load_images(path)[0], images)
    pack(path, images.numpy(), labels.numpy() % 2, classes=np.array(["a", "b"]))
    with pytest.raises(ValueError, match="2 classes, the network is for 10"):
        load_images(path, labelled=True)
    with pytest.raises(ValueError, match=r"expected images of 32 x 32 pixels, got \(4, 3, 31, 31\)"):
        load_images(make_folder(tmp_path, images[:4, :31, :31].numpy(), classes=1) / "class0")


# ---- training


def test_padding_reflects():
    ramp = torch.arange(32, dtype=torch.uint8).view(1, 32, 1, 1).expand(1, 32, 32, 3)
    expected = [4, 3, 2, 1, *range(32), 30, 29, 28, 27]
    result = train_features.padded(ramp)
    assert result.shape == (1, 40, 40, 3)
    assert result[0, :, 7, 1].tolist() == expected
    assert train_features.padded(ramp.transpose(1, 2))[0, 7, :, 1].tolist() == expected


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


def test_training_lowers_the_loss(monkeypatch, capsys):
    monkeypatch.setattr(features, "WIDTHS", (16, 32, features.FEATURES))  # a quarter of the work
    monkeypatch.setattr(features, "DEPTHS", (1, 1, 1))
    images, labels = coloured(32)
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        net = CifarFeatures()
        runs.append(train_features.fit(net, images, labels, epochs=4, batch_size=16, rate=0.02))
        assert not net.training
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)  # the same seed
    assert runs[0][-1] < runs[0][0] - 0.3
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert lines[0].startswith("epoch   1/4  loss ")
    with pytest.raises(ValueError, match="diverged in epoch 1"):
        train_features.fit(net, images, labels, epochs=1, batch_size=16, rate=1e30)


def test_commands(tmp_path, capsys):
    images, labels = coloured(8)
    data = pack(tmp_path / "a.npz", images.numpy(), labels.numpy())
    out = tmp_path / "w.safetensors"
    command = ["train", "--data", data, "--test", data, "--out", out, "--epochs", "1", "--limit", "6"]
    assert features.main([*map(str, command), "--device", "cpu"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("6 images, 1.3")
    assert said[1].startswith("epoch   1/1")
    assert said[2].startswith("test accuracy ")
    assert said[-1] == f"sha256 {load_features(out).sha256}"
    assert features.main(["check", "--test", str(data), "--weights", str(out), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith(said[2])  # what was measured is what was stored
    np.savez(tmp_path / "b.npz", images.numpy())
    command = ["distance", data, tmp_path / "b.npz", "--weights", out, "--device", "cpu"]
    assert features.main(list(map(str, command))) == 0
    said = capsys.readouterr()
    assert float(said.out.split()[2]) == pytest.approx(0, abs=1e-6)
    assert "between 8 and 8 images" in said.out
    assert "fewer than 2048 images" in said.err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train"], "required: --data"),
        (["train", "--data", "none.npz", "--out", "w.pt"], "does not end in .safetensors"),
        (["train", "--data", "none.npz", "--out", "w.safetensors"], "none.npz"),
        (["train", "--data", "x", "--epochs", "0"], "--epochs 0 is outside 1..10000"),
        (["check", "--test", "x", "--weights", "none.safetensors"], "the feature weights none.safetensors are missing"),
        (["check", "--test", "x", "--device", "nowhere"], "--device nowhere"),
        (["fly"], "invalid choice"),
    ],
)
def test_mistakes_are_one_line(capsys, monkeypatch, tmp_path, args, message):
    monkeypatch.chdir(tmp_path)
    try:
        code = features.main(args)
    except SystemExit as leaving:
        code = leaving.code
    said = capsys.readouterr()
    assert code == 2
    assert message in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not features.WEIGHTS.is_file(), reason="no packaged weights")
def test_the_packaged_weights_can_tell_the_classes():
    network = load_features()
    assert features.WEIGHTS.stat().st_size <= 3_000_000
    assert features.WEIGHTS.with_name(f"{features.WEIGHTS.name}.sha256").is_file()
    if not CIFAR10_TEST.is_file():
        pytest.skip("no test images: ADACORR_CIFAR10_TEST names the packed file")
    images, test = load_images(CIFAR10_TEST, labelled=True)
    # 90.35 % of all 10,000 and 87.5 % of these; one standard error of 400 is 1.6 %.
    assert features.accuracy(network, images[:400], test.labels[:400]) > 0.86
