"""`python -m evaluate theory`: a linear block whose Lipschitz constant is known, the bound by hand, the command."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import printed
from torch.testing import assert_close
from toy import TINY, TimedDiT, redraw, rows_at, show, tiny_dit

from adacorr import Algorithm1, CacheManager
from diffusion import make_sampler
from evaluate.__main__ import main
from evaluate.theory import NORMS, Observer, lipschitz, observe, proposition, theorem
from models import DiTBlock
from pipeline import Pipeline

SLOPES, GAMMA = (0.5, 2.0), 0.01


class LinearBlock(DiTBlock):
    """x -> slope * x Q + t * drift with an orthogonal Q: the Lipschitz constant in x is the slope."""

    def forward(self, x, c, tap=None):
        return self.slope * x @ self.turn + self.drift * c[:, :1, None]


def linear_model(drift):
    model = redraw(TimedDiT(**{**TINY, "depth": 2}), 0.15, seed=1)
    for i, block in enumerate(model.blocks):
        block.__class__, block.slope, block.drift = LinearBlock, SLOPES[i], drift
        generator = torch.Generator().manual_seed(i)
        block.register_buffer("turn", torch.linalg.qr(torch.randn(32, 32, generator=generator)).Q)
    return model


def size(v):
    """Mean over both halves' tokens of the L2 norm, for each of two images: (4, T, D) -> (2,)."""
    return v.norm(dim=2).unflatten(0, (2, 2)).mean(dim=(0, 2))


def by_hand(model, sampler, states, labels):
    """NORMS, score and weight (S - 1, L, 2) of Algorithm 1 on given states, the first image uncorrected."""
    found, past = {}, {}
    for step, x in enumerate(states):
        z, t, y = rows_at(model, sampler, step, x, labels, 2)
        h, c = model.embed(z), model.condition(t, y)
        for layer, block in enumerate(model.blocks):
            fresh = out = block(h, c)
            if step:
                was, cached, before = past[layer]
                score = size(h - was) + h.var(dim=2, correction=0).sqrt().unflatten(0, (2, 2)).mean(dim=(0, 2))
                weight = torch.stack([torch.tensor(1.0), (GAMMA * score[1]).clamp(0, 1)])
                w = weight.repeat(2).view(-1, 1, 1)
                out = (1 - w) * cached + w * fresh
                own = {"score": score, "weight": weight, "deviation": (1 - weight) * size(fresh - cached)}
                own |= {"change": size(h - was), "input": SLOPES[layer] * size(h - was), "blend": size(before - cached)}
                turned = 1e-3 * (sampler.timesteps[step] - sampler.timesteps[step - 1]).float() * block.drift
                own |= {"timestep": (turned.abs() * 32**0.5).expand(2)}
                true = out.unflatten(0, (2, 2))[:, :1].expand(2, 2, -1, -1).flatten(0, 1)
                own |= {"distance": size(out - true), "size": size(out)}
                for name, values in own.items():
                    found.setdefault(name, []).append(values)
            past[layer], h = (h, out, fresh), out
    return {name: torch.stack(values).unflatten(0, (-1, 2)) for name, values in found.items()}


@pytest.mark.parametrize("drift", [0.0, 50.0])
def test_linear_blocks_by_hand(drift):
    model, sampler, labels = linear_model(drift), make_sampler("ddim", 4), torch.tensor([1, 1])
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(4, 1, 3, 8, 8, generator=generator).expand(-1, 2, -1, -1, -1)
    manager = Observer([GAMMA])
    show(model, manager, sampler, states, labels)
    log = {**manager.log, "score": manager.trace.score, "weight": manager.trace.weight}
    assert set(NORMS) < set(log)
    log = {name: values[None, 1:].astype(np.float64) for name, values in log.items()}
    expected = by_hand(model, sampler, states, labels)
    for name, values in log.items():
        assert_close(torch.from_numpy(values[0]), expected[name].double(), rtol=1e-3, atol=2e-4, msg=name)
    slopes = lipschitz(log)
    assert slopes == pytest.approx(SLOPES, rel=1e-3)

    own = {name: values[..., 1].numpy() for name, values in expected.items()}
    assert own["weight"].max() < 1
    holds = own["deviation"] <= (1 - own["weight"]) * np.array(SLOPES) * own["score"]
    found = proposition(log, 1, slopes)
    assert found["holds"] == found["holds_below_1"] == holds.mean()
    assert sum(found["deviation_from"].values()) == pytest.approx(1)
    if drift == 0:  # the cache holds fresh outputs at first, so the proposition covers everything but the drift
        assert holds[0].all()
        assert found["deviation_from"]["timestep"] < 1e-5
    else:
        assert not holds[0].any()
    uncached = proposition(log, 0, slopes)
    assert [uncached[key] for key in ("weights_at_1", "holds", "holds_below_1")] == [1, 1, None]


def toy_pipe(sampler):
    origin = SimpleNamespace(sha256="toy")
    return Pipeline(tiny_dit(), make_sampler(sampler, 6), None, origin, 1.5, "all", torch.device("cpu"))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_the_copies_of_an_image_are_its_uncached_run_and_algorithm_1(sampler):
    pipe, labels = toy_pipe(sampler), torch.tensor([3, 3, 3])
    together = pipe.sample(0, np.full(3, 7), labels, Observer([0.005, 0.001]))
    caches = None, *(CacheManager(correction=Algorithm1(gamma)) for gamma in (0.005, 0.001))
    alone = torch.cat([pipe.sample(0, np.array([7]), labels[:1], cache) for cache in caches])
    assert_close(together, alone, rtol=1e-3, atol=1e-3)  # the order of sums differs with the batch
    assert min(float((alone[i] - alone[j]).abs().max()) for i, j in ((0, 1), (0, 2), (1, 2))) > 0.01


def test_observed_images():
    steps = []
    log = observe(toy_pipe("ddim"), 0, 2, [1e6, 0.001], SimpleNamespace(update=lambda: steps.append(1)))
    assert len(steps) == 2 * 6
    assert {values.shape for values in log.values()} == {(2, 5, 3, 3)}  # images, steps after the first, layers, runs
    assert all(np.isfinite(values).all() for values in log.values())
    for run in (0, 1):  # weights of 1: the run is the uncached one
        assert proposition(log, run, lipschitz(log))["weights_at_1"] == 1
        assert not log["deviation"][..., run].any()
        assert max(theorem(log, run)["distance_by_step"]) < 1e-4
    assert theorem(log, 2)["distance_by_step"][0] > 1e-3
    assert (log["distance"][0] != log["distance"][1]).any()


def test_theorem_1_by_hand():
    distance = np.array([[[4.0, 2.0], [5.0, 3.0], [1.0, 1.0]], [[4.0, 2.0], [5.0, 3.0], [3.0, 3.0]]])  # 2 images
    log = {"distance": np.stack([np.zeros_like(distance), distance], axis=-1)}
    log["size"] = np.stack([np.full_like(distance, 8.0), np.full_like(distance, 9.0)], axis=-1)
    assert theorem(log, 1) == {"distance_by_step": [3.0, 4.0, 2.0], "last_relative": 0.25, "falls": 1}


def test_inputs_that_stay_say_nothing_of_a_block():
    log = {"input": np.array([0.0, 6.0]).reshape(1, 2, 1, 1), "change": np.array([0.0, 2.0]).reshape(1, 2, 1, 1)}
    assert lipschitz(log).tolist() == [3.0]


def test_the_command_writes_what_it_prints(tiny32, tmp_path, capsys):
    out = tmp_path / "theory.json"
    flags = f"--num-sampling-steps 6 --gammas 1000000,0.05 --num-images 1 --device cpu --ckpt {tiny32} --out {out}"
    assert main(f"theory {flags}".split()) == 0
    content, table = json.loads(out.read_text()), printed(capsys)
    assert [content["table"]["columns"], *content["table"]["rows"]] == table
    assert table[1][:4] == ["1e+06", "100.0%", "100.0%", ""]
    assert table[2][0] == "0.05"
    assert content["kind"] == "theory"
    assert len(content["lipschitz_by_layer"]) == 2
    assert [len(row["distance_by_step"]) for row in content["rows"]] == [5, 5]
