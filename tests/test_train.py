"""train.py: the loss by hand, randomness, resuming after a kill, ranks, what is said of errors."""

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import code
from filelock import FileLock
from images import make_folder, pictures

import models
import pipeline
import sample
import train
from checkpoint import build_model, load_checkpoint
from data import order, read_data
from diffusion import linear_betas, make_sampler
from objective import Objective

ROOT = Path(__file__).resolve().parents[1]
FEW = ["--steps", 10, "--batch-size", 6, "--save-every", 4, "--log-every", 2, "--device", "cpu", "--lr", 1e-3]
FORK = multiprocessing.get_context("fork")
TINY = partial(models.DiT, patch_size=2, hidden_size=32, depth=2, num_heads=2)
# The same model in another process, which has no diffusers.
CHILD = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
sys.modules["diffusers"] = None
from functools import partial
import models, train
models.DiT_models["tiny"] = partial(models.DiT, patch_size=2, hidden_size=32, depth=2, num_heads=2)
sys.exit(train.main(sys.argv[1:]))
"""


def die_in_a_step():
    update = train.Trainer.update

    def dying(self, step):
        if step == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return update(self, step)

    train.Trainer.update = dying


def die_while_saving():
    replace, calls = os.replace, []

    def dying(source, target):
        calls.append(str(target).endswith("state.pt"))
        if sum(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = dying


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setitem(models.DiT_models, "tiny", TINY)


@pytest.fixture
def data(tmp_path):
    return make_folder(tmp_path / "data", pictures(10))


def state(out):
    return torch.load(out / "state.pt", weights_only=True)


def lines(out):
    """log.jsonl without the times."""
    content = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in content]


def assert_same(a, b, where=""):
    """Nested dicts and lists, equal to the last bit."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - {"seconds"}:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}.{i}")
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, where


# ------------------------------------------------------------------------------------------ whole runs


@pytest.mark.parametrize("death", [die_in_a_step, die_while_saving])
def test_resumed_after_kill_is_bit_identical(tmp_path, data, death):
    flags = ["--data", data, "--model", "tiny", *FEW, "--schedule", "cosine", "--warmup-steps", 2, "--learn-sigma"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert code(train.main, *flags, "--out", whole) == 0
    process = FORK.Process(target=lambda: (death(), code(train.main, *flags, "--out", broken)))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert state(broken)["step"] == 4
    stale = list(broken.glob(".*.tmp"))
    assert len(stale) == (death is die_while_saving)
    with open(broken / "log.jsonl", "a") as file:
        file.write('{"step": 9, "lo')  # a line cut short
    assert code(train.main, *flags, "--out", broken) == 0
    assert_same(state(broken), state(whole))
    assert_same(lines(broken), lines(whole))
    assert sorted(p.name for p in broken.iterdir()) == ["ema.safetensors", "lock", "log.jsonl", "run.json", "state.pt"]
    torch.testing.assert_close(
        load_checkpoint(broken / "ema.safetensors").state_dict, state(whole)["ema"], rtol=0, atol=0
    )


def test_two_ranks_equal_one(tmp_path, data):
    flags = ["--data", data, "--model", "tiny", *FEW]
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, *flags]
    command = [str(word) for word in (*command, "--out", tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert result.returncode == 0, result.stderr
    assert code(train.main, *flags, "--out", tmp_path / "one") == 0
    one, two = state(tmp_path / "one"), state(tmp_path / "two")
    torch.testing.assert_close(two["ema"], one["ema"], rtol=1e-4, atol=1e-5)
    for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert b == pytest.approx(a, rel=1e-4)


def test_overfits_a_handful(tmp_path):
    images = pictures(4, size=4)
    data, out = make_folder(tmp_path / "data", images, classes=4), tmp_path / "run"
    flags = ["--steps", 500, "--batch-size", 128, "--lr", 4e-3, "--schedule", "cosine", "--warmup-steps", 50]
    models.DiT_models["tiny"] = partial(models.DiT, patch_size=2, hidden_size=64, depth=2, num_heads=2, mlp_ratio=2)
    flags += ["--ema-decay", 0.99, "--no-flip", "--label-dropout", 0, "--log-every", 100, "--device", "cpu"]
    assert code(train.main, "--data", data, "--model", "tiny", "--out", out, *flags) == 0
    losses = [line["loss"] for line in lines(out)]
    assert all(after < before for before, after in pairwise(losses))
    assert losses[-1] < 0.02
    checkpoint = load_checkpoint(out / "ema.safetensors")
    sampler = make_sampler("ddim", 50)
    pipe = pipeline.Pipeline(build_model(checkpoint), sampler, None, checkpoint, 1.0, "all", torch.device("cpu"))
    labels = torch.arange(8) % 4
    found = pipe.decode(pipe.sample(0, np.arange(8), labels)).numpy().astype(float)
    distance = np.abs(found[:, None] - images[None]).mean((2, 3, 4))  # (sample, image)
    assert distance.argmin(1).tolist() == labels.tolist()
    assert distance.min(1).max() < 20  # of 255; another image is some 80 away


def test_checkpoint_samples(tmp_path, data):
    out = tmp_path / "run"
    assert code(train.main, "--data", data, "--model", "tiny", *FEW, "--out", out) == 0
    for name, key in (("ema.safetensors", "flat"), ("state.pt", "ema")):
        checkpoint = load_checkpoint(out / name)
        assert checkpoint.source_key == key
        assert checkpoint.class_names == ["class0", "class1"]
        assert checkpoint.config["num_classes"] == 2
        assert_same(dict(checkpoint.state_dict), dict(state(out)["ema"]))
    parts = "class_names config data ema model optimizer options seconds step"  # what older checkpoints have, too
    assert sorted(state(out)) == parts.split()
    assert state(out)["options"].keys() == vars(train.Recipe()).keys()
    png = tmp_path / "x.png"
    argv = ["--ckpt", out / "ema.safetensors", "--num-sampling-steps", 3, "--device", "cpu", "--out", png]
    assert sample.main([str(a) for a in argv]) == 0
    record = json.loads((out / "run.json").read_text())
    assert record["parameters"] == sum(p.numel() for p in state(out)["model"].values()) - 16 * 32  # all but positions
    assert [line["step"] for line in lines(out)] == [2, 4, 6, 8, 10]
    assert lines(out)[-1].keys() == {"step", "loss", "grad_norm", "lr", "images"}
    assert lines(out)[-1]["images"] == 60


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_signals_save_and_stop(tmp_path, data, monkeypatch, number, expected):
    out, flags = tmp_path / "run", ["--data", data, "--model", "tiny", *FEW]
    update, handler = train.Trainer.update, signal.getsignal(number)

    def signalled(self, step):
        if step == 2:
            os.kill(os.getpid(), number)
        return update(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "update", signalled)
        assert code(train.main, *flags, "--out", out) == expected
    assert state(out)["step"] == 3
    assert signal.getsignal(number) is handler
    assert code(train.main, *flags, "--out", out) == 0
    assert code(train.main, *flags, "--out", tmp_path / "whole") == 0
    assert_same(state(out), state(tmp_path / "whole"))


def test_minutes_and_steps(tmp_path, data, capsys):
    out, flags = tmp_path / "run", ["--data", data, "--model", "tiny", *FEW, "--minutes", 0]
    for done in (1, 2):
        assert code(train.main, *flags, "--out", out) == 0
        assert state(out)["step"] == done
    assert [line["step"] for line in lines(out)] == [1, 2]
    assert code(train.main, *flags, "--out", out, "--steps", 2) == 0
    assert "is done: 2 steps" in capsys.readouterr().out
    assert code(train.main, *flags, "--out", out, "--overwrite", "--schedule", "cosine") == 0
    assert [line["step"] for line in lines(out)] == [1]
    assert code(train.main, *flags, "--out", out, "--schedule", "cosine", "--steps", 20) == 2
    assert "steps was 10, is 20" in capsys.readouterr().err


@pytest.mark.parametrize(("column", "word"), [(0, "loss"), (1, "gradient")])
def test_non_finite_stops(tmp_path, data, monkeypatch, capsys, column, word):
    out, update = tmp_path / "run", train.Trainer.update

    def broken(self, step):
        result = update(self, step)
        if step >= 6:
            result[column] = math.nan
        return result

    monkeypatch.setattr(train.Trainer, "update", broken)
    flags = ["--data", data, "--model", "tiny", *FEW, "--log-every", 50]
    assert code(train.main, *flags, "--out", out) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"train.py: error: the {word} is nan at step 7; ")
    assert error.count("\n") == 1
    assert state(out)["step"] == 4
    assert [line["step"] for line in lines(out)] == [4]


def test_latents_bf16_and_learnt_variance(tmp_path):
    latents, path = np.random.default_rng(0).standard_normal((5, 4, 8, 8)).astype(np.float16), tmp_path / "latents.npz"
    np.savez(path, latents=latents, labels=np.array([0, 2, 1, 2, 0]))
    flags = ["--data", path, "--model", "tiny", *FEW, "--precision", "bf16", "--learn-sigma", "--clip", 0]
    assert code(train.main, *flags, "--out", tmp_path / "run") == 0
    config = load_checkpoint(tmp_path / "run" / "ema.safetensors").config
    assert (config["in_channels"], config["num_classes"], config["learn_sigma"]) == (4, 3, True)
    assert {p.dtype for p in state(tmp_path / "run")["model"].values()} == {torch.float32}


# ---------------------------------------------------------------------------------------- loss and rates


def hand(t, x0, noise, eps, v):
    """Bits of one value, from the two Gaussians themselves, in double precision."""
    beta = linear_betas()
    abar = np.cumprod(1 - beta)
    before = np.append(1.0, abar)[t]
    x_t = math.sqrt(abar[t]) * x0 + math.sqrt(1 - abar[t]) * noise

    def posterior(start):
        a, b = math.sqrt(before) * beta[t] / (1 - abar[t]), math.sqrt(1 - beta[t]) * (1 - before) / (1 - abar[t])
        return a * start + b * x_t

    least = beta[max(t, 1)] * (1 - abar[max(t, 1) - 1]) / (1 - abar[max(t, 1)])
    variance = beta[t] ** ((v + 1) / 2) * least ** ((1 - v) / 2)
    mean = posterior((x_t - math.sqrt(1 - abar[t]) * eps) / math.sqrt(abar[t]))
    if t > 0:
        quotient = (least + (posterior(x0) - mean) ** 2) / variance
        return 0.5 * (math.log(variance / least) + quotient - 1) / math.log(2)
    low, high = ((1 + math.erf((x0 + side / 255 - mean) / math.sqrt(2 * variance))) / 2 for side in (-1, 1))
    low, high = (0.0 if x0 == -1 else low), (1.0 if x0 == 1 else high)
    return -math.log2(high - low)


@pytest.mark.parametrize(
    ("t", "x0", "noise", "eps", "v"),
    [(5, 0.5, 0.2, 0.3, 0.4), (999, -0.2, 1.0, 0.9, -0.5), (1, 0.1, -1.0, -0.7, 2.0), (300, 0.6, 0.5, 0.4, 0.0)]
    + [(0, x0, 0.4, 0.1, 0.2) for x0 in (-1.0, 5 / 255, 1.0)],
)
def test_bound_by_hand(t, x0, noise, eps, v):
    x0, noise, eps, v = (torch.full((2, 1, 1, 1), value) for value in (x0, noise, eps, v))
    objective, steps = Objective(True), torch.tensor([t, t])
    bits = objective.bound(eps, v, x0, objective.diffuse(x0, steps, noise), steps)
    assert bits.shape == (2,)
    expected = hand(t, *(tensor[0].item() for tensor in (x0, noise, eps, v)))
    assert bits.tolist() == pytest.approx([expected, expected], rel=2e-3, abs=1e-5)


def test_levels_are_a_distribution():
    x0 = (torch.arange(256.0) / 127.5 - 1).view(-1, 1, 1, 1)
    x_t, zero = torch.full_like(x0, 0.3), torch.zeros(256, dtype=torch.int64)
    bits = Objective(True).bound(torch.zeros_like(x0), torch.ones_like(x0), x0, x_t, zero)
    assert (2.0**-bits).sum().item() == pytest.approx(1, abs=1e-4)


def test_bound_is_zero_for_the_posterior_and_leaves_the_noise_alone():
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 3, 2, 4, 4, generator=generator)
    t = torch.tensor([3, 400, 900])
    objective, plain = Objective(True), Objective(False)
    x_t = objective.diffuse(x0, t, noise)
    assert objective.bound(noise, -torch.ones_like(noise), x0, x_t, t).abs().max() < 1e-4
    out = torch.randn(3, 4, 4, 4, generator=generator, requires_grad=True)
    (hybrid,) = torch.autograd.grad(objective(out, x0, x_t, t, noise), out)
    (simple,) = torch.autograd.grad(plain(out[:, :2], x0, x_t, t, noise), out)
    torch.testing.assert_close(hybrid[:, :2], simple[:, :2])
    assert (hybrid[:, 2:] != 0).all()
    torch.testing.assert_close(plain(out[:, :2], x0, x_t, t, noise), (out[:, :2] - noise).square().mean())


def test_diffuse():
    abar = np.cumprod(1 - linear_betas())[[0, 999]]
    one, t = torch.ones(2, 1, 1, 1), torch.tensor([0, 999])
    found = Objective(False).diffuse(one, t, 2 * one).flatten()
    assert found.tolist() == pytest.approx((np.sqrt(abar) + 2 * np.sqrt(1 - abar)).tolist())


def test_learning_rate():
    recipe = train.Recipe(lr=2.0, warmup_steps=4, steps=12, schedule="cosine")
    rates = [recipe.rate(step) for step in range(12)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[8] == pytest.approx(1.0)  # half way down
    assert all(after < before for before, after in pairwise(rates[4:]))
    assert 0 < rates[11] < 0.1
    recipe = replace(recipe, schedule="constant")
    assert [recipe.rate(step) for step in (0, 3, 11, 10**6)] == [0.5, 2.0, 2.0, 2.0]


def make_trainer(data, **options):
    model = TINY(input_size=8, in_channels=3, num_classes=2, learn_sigma=False)
    recipe = train.Recipe(**{"batch_size": 8, **options})
    return train.Trainer(recipe, read_data(data), model, train.Ranks(), torch.device("cpu"))


def test_average(data):
    trainer = make_trainer(data, ema_decay=0.15, lr=0.1)
    assert [trainer.recipe.decay(step) for step in range(3)] == [0.1, 0.15, 0.15]
    assert train.Recipe().decay(10**6) == 0.9999
    name = "final_layer.linear.bias"
    expected = trainer.ema[name].clone()
    for step, decay in enumerate((0.1, 0.15, 0.15)):
        trainer.update(step)
        expected = decay * expected + (1 - decay) * trainer.model.state_dict()[name]
        torch.testing.assert_close(trainer.ema[name], expected)
    assert not torch.equal(trainer.ema[name], trainer.model.state_dict()[name])
    assert torch.equal(trainer.ema["pos_embed"], trainer.model.pos_embed)


def test_clip(data):
    for clip in (0.0, 1e-3):
        trainer = make_trainer(data, clip=clip)
        norms = []
        trainer.optimizer.step = lambda trainer=trainer, norms=norms: norms.append(
            torch.cat([p.grad.flatten() for p in trainer.weights]).norm().item()
        )
        reported = trainer.update(0)[1].item()
        assert reported > 0.01  # before clipping
        assert norms[0] == pytest.approx(clip or reported, rel=1e-2)


# ---------------------------------------------------------------------------------------- randomness


def test_batches(data):
    trainer = make_trainer(data, batch_size=400, label_dropout=0.25)
    x0, noise, t, labels = trainer.batch(5)
    again = make_trainer(data, batch_size=400, label_dropout=0.25).batch(5)
    assert all(torch.equal(a, b) for a, b in zip((x0, noise, t, labels), again, strict=True))
    other = trainer.batch(6)
    assert not any(torch.equal(a, b) for a, b in zip((x0, noise, t, labels), other, strict=True))
    images = trainer.images.float() / 127.5 - 1
    index = order(0, 10, 5 * 400, 400)
    mirrored = (x0 == images[index].flip(3)).flatten(1).all(1)
    assert (mirrored | (x0 == images[index]).flatten(1).all(1)).all()
    assert 0.4 < mirrored.float().mean() < 0.6
    dropped = labels == 2
    assert 0.15 < dropped.float().mean() < 0.35
    assert torch.equal(labels[~dropped], trainer.labels[index][~dropped])
    assert not trainer.model.y_embedder.training  # which would drop once more
    assert (t.min() >= 0, t.max() < 1000) == (True, True)
    assert 400 < t.float().mean() < 600
    assert noise.mean().abs() < 0.02
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    plain = make_trainer(data, batch_size=400, label_dropout=0.0, flip=False)
    assert torch.equal(plain.batch(5)[0], images[index])
    assert torch.equal(plain.batch(5)[3], plain.labels[index])


def test_ranks_share_the_batch(data):
    whole, halves = make_trainer(data).batch(3), []
    for rank in (0, 1):
        trainer = make_trainer(data)
        trainer.ranks = train.Ranks(rank, 2, rank)
        halves.append(trainer.batch(3))
    for row, *parts in zip(whole, *halves, strict=True):
        assert torch.equal(row, torch.cat(parts))


def test_batch_must_divide(tmp_path, data, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(train.Ranks, "open", lambda _: None)
    assert code(train.main, "--data", data, "--out", tmp_path / "run", "--batch-size", 6) == 2
    assert "--batch-size 6 cannot be divided among 4 ranks" in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["--device cuda:1 cannot be used: busy", "this process finds other data"])
def test_a_rank_says_what_it_alone_meets(tmp_path, data, capsys, monkeypatch, fault):
    options = train.parse([str(word) for word in ("--data", data, *FEW, "--out", tmp_path)])
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(train.Ranks, "open", lambda _: None)
    monkeypatch.setattr(train.Ranks, "from_leader", lambda _, value: options if value is None else "another digest")
    if "busy" in fault:
        monkeypatch.setattr(train.Ranks, "device", lambda *_: (_ for _ in ()).throw(ValueError(fault)))
    assert code(train.main) == 2
    assert capsys.readouterr().err.startswith(f"train.py: process 1: error: {fault}")


def test_resuming_another_run(tmp_path, data, capsys, monkeypatch):
    out, flags = tmp_path / "run", ["--model", "tiny", *FEW, "--steps", 1]
    assert code(train.main, "--data", data, "--out", out, *flags) == 0
    before = (out / "state.pt").read_bytes()
    capsys.readouterr()
    changed = ["--steps", 2, "--lr", 0.5, "--no-flip"]
    assert code(train.main, "--data", data, "--out", out, *flags, *changed) == 2
    error = capsys.readouterr().err
    assert "flip was True, is False; lr was 0.001, is 0.5; give them as they were, or --overwrite" in error
    other = make_folder(tmp_path / "other", pictures(10, seed=1))
    assert code(train.main, "--data", other, "--out", out, *flags, "--steps", 2) == 2
    assert "was trained on other data than" in capsys.readouterr().err
    assert (out / "state.pt").read_bytes() == before
    assert code(train.main, "--data", data, "--out", out, *flags, "--steps", 2) == 0  # more steps at a constant rate
    assert state(out)["step"] == 2
    assert code(train.main, "--data", other, "--out", out, *flags, *changed, "--overwrite") == 0
    assert state(out)["options"]["lr"] == 0.5
    monkeypatch.setattr(train, "ENDING", 0)
    with FileLock(out / "lock"):
        capsys.readouterr()
        assert code(train.main, "--data", other, "--out", out, *flags) == 2
        assert "is in use by another run" in capsys.readouterr().err
    for content, message in ((before[:1000], "cannot be resumed"), (None, "ema.safetensors without state.pt")):
        capsys.readouterr()
        (out / "state.pt").write_bytes(content) if content else (out / "state.pt").unlink()
        assert code(train.main, "--data", other, "--out", out, *flags) == 2
        assert message in capsys.readouterr().err


def test_a_restart_by_torchrun_overwrites_nothing(tmp_path, data, monkeypatch):
    out, flags = tmp_path / "run", ["--data", data, "--model", "tiny", *FEW, "--overwrite", "--steps"]
    assert code(train.main, *flags, 1, "--out", out) == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert code(train.main, *flags, 2, "--out", out) == 0
    assert [line["step"] for line in lines(out)] == [1, 2]
