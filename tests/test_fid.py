"""Metrics between sets: by hand, against torch-fidelity and pytorch-fid on the same weights, and as a command."""

import inspect
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import timm
import torch
from commands import code, one_line, printed
from images import Colours, pictures
from torch import nn
from torch.utils.data import TensorDataset

from evaluate import dinov2, fid, reference, setmetrics
from evaluate.__main__ import main
from evaluate.frechet import Moments, frechet_distance
from evaluate.imagesets import open_images
from evaluate.inception import Inception, architecture, prepared, resizing
from evaluate.networks import Features, load_network
from evaluate.reference import measure
from evaluate.setmetrics import inception_score, kernel_distance, precision_recall


def cloud(n, d=4, seed=0, shift=0.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + shift


# ---- the metrics


def test_precision_and_recall():
    real = cloud(200)
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real + 1000, real) == (0, 0)
    modes = torch.cat([real, real + 1000])
    precision, recall = precision_recall(real + 0.01, modes)  # half of the modes are dropped
    assert precision > 0.95
    assert 0.45 < recall <= 0.5
    # On a line: the third neighbours of 0, 1, 2, 3 are 3, 2, 2, 3 away.
    line = torch.tensor([[0.0], [1], [2], [3]])
    assert precision_recall(torch.tensor([[-3.0], [-3.1], [6.1], [9]]), line)[0] == 0.25


def test_precision_and_recall_do_not_depend_on_tiles_or_order(monkeypatch):
    a, b = cloud(150), cloud(120, seed=1, shift=0.8)
    whole = precision_recall(a, b)
    assert 0 < whole[0] < 1
    monkeypatch.setattr(setmetrics, "TILE", 7)
    assert precision_recall(a.flip(0), b[torch.randperm(120)]) == whole


def test_inception_score():
    assert inception_score(50 * torch.eye(10).repeat(3, 1))[0] == pytest.approx(10, rel=1e-6)
    assert inception_score(torch.zeros(30, 10)) == pytest.approx((1, 0))
    two = 50 * torch.eye(10)[[0, 1, 0, 1]]
    unequal = torch.cat([two, 50 * torch.eye(10)[[3, 3, 3]]])
    entropy = -(4 / 7 * np.log(2 / 7) + 3 / 7 * np.log(3 / 7))
    assert inception_score(unequal)[0] == pytest.approx(np.exp(entropy), rel=1e-6)
    assert inception_score(two.repeat(2501, 1))[0] == pytest.approx(2, rel=1e-6)  # a second split, of four


def test_kernel_distance(monkeypatch):
    a, b = cloud(40), cloud(40, seed=1, shift=1.0)
    mean, deviation = kernel_distance(a, b)  # one subset of everything, in another order each time
    assert deviation == pytest.approx(0, abs=1e-12)
    x, y = a.double().numpy(), b.double().numpy()
    kernel = lambda u, v: (u @ v.T / 4 + 1) ** 3  # noqa: E731
    within = sum((kernel(u, u).sum() - np.trace(kernel(u, u))) / (40 * 39) for u in (x, y))
    assert mean == pytest.approx(within - 2 * kernel(x, y).mean(), rel=1e-9)
    monkeypatch.setattr(setmetrics, "KERNEL_SIZE", 10)
    assert kernel_distance(a, b)[1] > 0.01


# ---- the networks


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights of the Inception network, which tell images apart."""
    torch.manual_seed(0)
    net = architecture()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(net.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def inception(weights):
    return Inception(weights)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two sets of 12 images, the second brighter."""
    folder = tmp_path_factory.mktemp("sets")
    a, b = pictures(12, 40), pictures(12, 40, seed=1)
    paths = folder / "a.npz", folder / "b.npz"
    for path, images in zip(paths, (a, b // 2 + 120), strict=True):
        np.savez(path, images)
    return paths


@pytest.fixture(scope="module")
def measured(sets, inception):
    return [measure(open_images(path), inception, 12) for path in sets]


def test_resizing_is_that_of_tensorflow_1():
    ramp = torch.tensor([0.0, 100, 200])
    row = resizing(3) @ ramp
    assert row[:2].tolist() == pytest.approx([0, 100 * 3 / 299])  # pixel i is taken at 3 i / 299, not half a pixel on
    assert row[100].item() == pytest.approx(100 * 300 / 299)
    assert row[-99:].tolist() == [200] * 99  # beyond the last pixel it repeats
    assert torch.equal(resizing(299), torch.eye(299))
    x = prepared(torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 299, 3))
    assert x[0, 0, ::100, 0].tolist() == pytest.approx([-1, 0, 0.992], abs=0.005)


def test_features_are_those_of_torch_fidelity(weights, inception):
    extractor = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    theirs = extractor("x", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights))
    for size in (32, 299, 310):
        images = torch.from_numpy(pictures(2, size + size % 2))[:, :size, :size].contiguous()
        pool, logits = theirs(images.permute(0, 3, 1, 2))
        found = inception.features(images)
        assert (found.pool - pool).norm() < 1e-4 * pool.norm()
        assert (found.logits - logits).norm() < 1e-4 * logits.norm()


def test_spatial_features_are_in_the_order_of_adm(inception):
    kept = []
    inception.net.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, out: kept.append(out))
    found = inception.features(torch.from_numpy(pictures(2, 32))).spatial
    assert found.shape == (2, 17 * 17 * 7)
    assert torch.equal(found[1].view(17, 17, 7)[3, 5], kept[0][1, :7, 3, 5])


def test_metrics_are_those_of_others(sets, weights, inception, measured, monkeypatch):
    torch_fidelity = pytest.importorskip("torch_fidelity")
    score = pytest.importorskip("pytorch_fid.fid_score")
    distance = pytest.importorskip("torch_fidelity.metric_fid").fid_statistics_to_metric
    manifold = pytest.importorskip("torch_fidelity.metric_prc").calculate_precision_recall_full
    monkeypatch.setattr(setmetrics, "KERNEL_SIZE", 8)
    # Of 64 features: distances of all 2048 take the others half a minute.
    a, b = (replace(m, moments=Moments.of(m.pool[:, :64]), spatial=Moments.of(m.pool[:, 64:128])) for m in measured)
    found, left_out = fid.metrics(a, b, inception)
    assert left_out == []

    class Images(TensorDataset):
        def __getitem__(self, i):
            return super().__getitem__(i)[0]

    images = [Images(torch.from_numpy(np.load(path)["arr_0"]).permute(0, 3, 1, 2)) for path in sets]
    theirs = torch_fidelity.calculate_metrics(
        input1=images[0], input2=images[1], cuda=False, isc=True, kid=True, cache=False,
        feature_extractor_weights_path=str(weights), kid_subset_size=8, isc_splits=1, samples_shuffle=False,
        verbose=False, save_cpu_ram=True,
    )  # fmt: skip
    assert found["kernel_distance"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)
    assert found["kernel_distance_deviation"] == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-3)
    assert found["inception_score"] == pytest.approx(theirs["inception_score_mean"], rel=1e-3)
    assert (found["precision"], found["recall"]) == pytest.approx(manifold(a.pool, b.pool))
    pair = [{"mu": m.moments.mean, "sigma": m.moments.covariance} for m in (a, b)]
    assert found["fid"] == pytest.approx(distance(*pair, False)["frechet_inception_distance"], rel=1e-3)
    if "disp" in inspect.signature(scipy.linalg.sqrtm).parameters:  # without it pytorch-fid does not run
        flat = [value for each in pair for value in each.values()]
        assert found["fid"] == pytest.approx(score.calculate_frechet_distance(*flat), rel=1e-3)


def test_weights_of_others_are_refused(tmp_path, monkeypatch):
    torch.save({"x": torch.zeros(1)}, tmp_path / "x.pth")
    (tmp_path / "y.pth").write_text("<html>")
    model = "dinov2:vit_small_patch14_dinov2.lvd142m"
    for name, path, message in (
        ("inception", "x.pth", "another network than FID's Inception"),
        ("inception", "y.pth", "a web page"),
        (model, "x.pth", "another network than timm's"),
        ("dinov2:none", "x.pth", "timm cannot make none"),
        ("dinov2:resnet18", "x.pth", "timm's resnet18 is no vision transformer"),
        ("incepton", "x.pth", "--features incepton is unknown: choose one of inception, dinov2, cifar10"),
        ("cifar10:x", "x.pth", "is unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            load_network(name, tmp_path / path)
    monkeypatch.setenv("ADACORR_HOME", str(tmp_path / "none"))
    for name in ("inception", "dinov2"):
        with pytest.raises(ValueError, match="--offline forbids"):
            load_network(name, offline=True)


def test_dinov2_takes_the_class_token_at_224_pixels(tmp_path):
    model = "vit_small_patch14_dinov2.lvd142m"
    torch.manual_seed(0)
    net = timm.create_model(model, pretrained=False, num_classes=0)
    torch.save(net.state_dict(), tmp_path / "x.pth")
    found = load_network(f"dinov2:{model}", tmp_path / "x.pth")
    images = torch.from_numpy(pictures(2, 224))
    features = found.features(images).pool
    assert features.shape == (2, found.dim) == (2, 384)
    positions = dinov2.positions(net.pos_embed)
    assert positions.shape == (1, 257, 384)
    assert torch.equal(positions[:, 0], net.pos_embed[:, 0])
    other = timm.create_model(model, pretrained=False, num_classes=0, img_size=224).eval()
    other.load_state_dict({**net.state_dict(), "pos_embed": positions})
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (dinov2.MEAN, dinov2.STD))
    x = (images.permute(0, 3, 1, 2) / 255 - mean) / deviation
    torch.testing.assert_close(features, other.forward_features(x)[:, 0].detach(), rtol=1e-3, atol=1e-4)


# ---- sets and references


@pytest.fixture
def colours(monkeypatch):
    monkeypatch.setattr(reference, "network_of", lambda *_: Colours())
    return Colours()


def test_batches_do_not_matter(sets, inception, measured):
    one, two = measured[0], measure(open_images(sets[0]), inception, 5)
    torch.testing.assert_close(one.pool, two.pool, rtol=1e-4, atol=1e-4)
    assert one.sha256 == two.sha256
    a, b = (Moments.of(found.pool[:, :64]) for found in (one, two))
    assert frechet_distance(a, b) < 1e-5 * np.trace(a.covariance)


def values(path):
    return [entry["metrics"] for entry in json.loads(path.read_text())["sets"]]


def test_arrays_of_an_adm_reference_are_used_for_what_they_are_for(sets, tmp_path, colours, capsys):
    """mu and sigma for FID, mu_s and sigma_s for sFID, the images for KID, precision and recall alone."""
    a = measure(open_images(sets[0]), colours)
    mu, sigma = a.moments.mean + 3, a.moments.covariance  # not those of the images
    stored = {"mu": mu, "sigma": sigma, "mu_s": mu[:2] + 1, "sigma_s": sigma[:2, :2]}
    images = np.load(sets[0])["arr_0"]
    np.savez(tmp_path / "adm.npz", images, **stored)
    np.savez(tmp_path / "mar.npz", mu=mu, sigma=sigma)
    out = tmp_path / "out.json"
    assert code(main, "fid", sets[0], "--reference", tmp_path / "adm.npz", "--out", out) == 0
    (found,) = values(out)
    assert (found["fid"], found["sfid"]) == pytest.approx((27, 32))
    assert (found["precision"], found["recall"]) == (1, 1)
    assert "| FID | sFID | IS | precision | recall | KID x 1000 |" in capsys.readouterr().out
    assert code(main, "fid", sets[0], "--reference", tmp_path / "mar.npz", "--out", out) == 0
    assert values(out)[0].keys() == {"fid", "inception_score", "inception_score_deviation"}
    said = capsys.readouterr().out
    assert "sFID is left out: the reference holds no mu_s and sigma_s" in said
    assert "KID, precision and recall are left out: the reference holds no images" in said
    record = json.loads(out.read_text())
    assert record["evaluator"]["weights_sha256"] == "0" * 64
    assert record["reference"] | {"path": 0} == {"path": 0, "sha256": record["reference"]["sha256"], "count": None}
    assert record["sets"][0]["count"] == 12


def test_saved_statistics_are_as_good_as_the_images(sets, tmp_path, colours, capsys, monkeypatch):
    stats, out = tmp_path / "b.npz", [tmp_path / "1.json", tmp_path / "2.json"]
    assert code(main, "statistics", sets[1], "--out", stats) == 0
    for ref, path in zip((sets[1], stats), out, strict=True):
        assert code(main, "fid", sets[0], "--reference", ref, "--out", path) == 0
    assert values(out[0])[0] == pytest.approx(values(out[1])[0])
    assert values(out[0])[0]["fid"] > 100
    capsys.readouterr()
    monkeypatch.setattr(Colours, "sha256", "1" * 64)
    assert code(main, "fid", sets[0], "--reference", stats) == 2
    one_line(capsys, "by another evaluator", "weights_sha256 '000", "make them again")
    content = bytearray(stats.read_bytes())
    content[len(content) // 3] ^= 255
    stats.write_bytes(content)
    assert code(main, "fid", sets[0], "--reference", stats) == 2
    one_line(capsys, "b.npz is damaged")


def test_the_change_since_an_earlier_result_and_the_uncached_set(sampled, sets, tmp_path, colours, monkeypatch, capsys):
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    ref = ["--reference", sampled("seed")]
    assert code(main, "fid", sampled("uncached"), *ref, "--out", before) == 0
    flags = ["--uncached", sampled("uncached"), "--baseline", before]
    assert code(main, "fid", sampled("cached"), *ref, *flags, "--out", after) == 0
    (old,), (new,) = values(before), values(after)
    assert new["change"] == pytest.approx(new["fid"] - old["fid"])
    assert 0 < new["to_uncached"] < new["fid"]
    capsys.readouterr()
    assert code(main, "fid", sampled("cached"), "--reference", sampled("guidance"), "--baseline", before) == 2
    one_line(capsys, "measured otherwise", "reference")
    monkeypatch.setattr(Colours, "features", lambda *_: pytest.fail("measured"))  # the others are told before
    for samples, flag, path, *words in (
        (sampled("guidance"), "--uncached", sampled("uncached"), "--uncached", "differ in guidance.scale"),
        (sampled("guidance"), "--baseline", before, "--baseline", "differ in guidance.scale"),
        (sampled("cached"), "--baseline", sampled("cached") / "run.json", "no result of `python -m evaluate`"),
        (sampled("cached"), "--baseline", tmp_path / "none.json", "none.json"),
        (sampled("cached"), "--uncached", sets[0], "the number of images (6 and 12)"),
        (sets[0], "--baseline", before, "the number of images (12 and 6)"),
    ):
        assert code(main, "fid", samples, *ref, flag, path) == 2
        one_line(capsys, *words)


def test_seeds_give_the_spread(sampled, sets, colours, capsys):
    assert code(main, "fid", sampled("uncached"), sampled("seed"), "--reference", sets[0], "--seeds") == 0
    a, b, both = (row[2] for row in printed(capsys)[1:])
    a, b = float(a), float(b)
    assert [*map(float, both.split(" ± "))] == pytest.approx([(a + b) / 2, abs(a - b) / 2**0.5], rel=0.01)
    assert code(main, "fid", sampled("uncached"), sampled("cached"), "--reference", sets[0], "--seeds") == 2
    one_line(capsys, "--seeds", "differ in cache")
    assert code(main, "fid", sampled("uncached"), "--reference", sets[0], "--seeds") == 2
    one_line(capsys, "--seeds needs two sets")


def test_a_reader_is_told_what_the_numbers_are_worth(tmp_path, colours, capsys):
    np.savez(tmp_path / "x.npz", pictures(20), arr_1=np.arange(20) // 2)
    assert code(main, "fid", tmp_path / "x.npz", "--reference", tmp_path / "x.npz") == 0
    said = capsys.readouterr().out
    for words in ("has 20 images, not 2048", "not those of published FIDs", "carries no protocol", "sorted by class"):
        assert words in said


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--reference none.npz", "none.npz does not exist"),
        ("--reference {a} --features vgg", "--features vgg is unknown"),
        ("--reference {a} --features cifar10", "expected shape (N, 32, 32, 3)"),
        ("--reference {a} --batch-size 0", "--batch-size: 0 is outside 1"),
        ("--reference {a} --device nowhere", "--device nowhere"),
        ("--reference {one} --features cifar10", "one.npz holds 1 image"),
        ("--reference {stats} --features cifar10", "do not say of which network"),
        ("--reference {a} --out {a}/x", "a.npz"),
    ],
)
def test_sets_that_cannot_be_measured(sets, tmp_path, capsys, argv, words):
    np.savez(tmp_path / "one.npz", pictures(1, 32))
    np.savez(tmp_path / "stats.npz", mu=np.zeros(3), sigma=np.eye(3))
    names = {"a": sets[0], "one": tmp_path / "one.npz", "stats": tmp_path / "stats.npz"}
    assert code(main, "fid", sets[0], argv.format(**names)) == 2
    one_line(capsys, words)


def test_features_without_a_value_are_named(sets, colours, monkeypatch):
    monkeypatch.setattr(Colours, "features", lambda self, images: Features(torch.full((len(images), 3), torch.nan)))
    with pytest.raises(ValueError, match="a.npz: features of image 0 are infinite or undefined"):
        measure(open_images(sets[0]), colours)


def test_a_set_that_is_too_small_for_a_metric_has_the_others(sets, tmp_path, colours, capsys):
    np.savez(tmp_path / "three.npz", pictures(3, 32))
    out = tmp_path / "out.json"
    assert code(main, "fid", sets[0], tmp_path / "three.npz", "--reference", sets[1], "--out", out) == 0
    many, few = values(out)
    assert many.keys() - few.keys() == {"precision", "recall"}
    assert "kernel_distance" in few
    said = capsys.readouterr().out
    assert "precision and recall are left out: they need more than 3 images" in said
    row = next(line for line in said.splitlines() if "three.npz" in line).split(" | ")
    assert row[5:7] == ["", ""]


def test_statistics_are_read_in_any_type_and_order_but_not_of_another_width(sets, tmp_path, colours):
    found = measure(open_images(sets[0]), colours).moments
    covariance = np.asfortranarray(found.covariance.astype(np.float32))
    np.savez(tmp_path / "x.npz", mu=found.mean.astype(np.float32), sigma=covariance)
    read = reference.reference(tmp_path / "x.npz", colours).moments
    assert frechet_distance(read, found) == pytest.approx(0, abs=1e-3)
    np.savez(tmp_path / "x.npz", mu=np.zeros(2), sigma=np.eye(2))
    with pytest.raises(ValueError, match=r"mu is \(2,\), inception has 3 features"):
        reference.reference(tmp_path / "x.npz", colours)


def test_what_was_measured_is_kept_where_a_later_set_is_damaged(sampled, tmp_path, colours, capsys):
    copy, out = tmp_path / "damaged", tmp_path / "kept.json"
    shutil.copytree(sampled("cached"), copy)
    picture = sorted((copy / "images").iterdir())[-1]
    picture.write_bytes(picture.read_bytes()[:-20])
    sets = sampled("uncached"), copy
    assert code(main, "fid", *sets, "--reference", sampled("seed"), "--out", out) != 0
    assert len(values(out)) == 1
    assert "run sample_ddp.py on this run again with --verify" in capsys.readouterr().err
