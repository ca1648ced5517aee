"""`python -m evaluate cost`: what reuse forced off still does, the arithmetic of a row, the command."""

import json
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from toy import sample

import pipeline
from adacorr import AdaCorrection, CacheManager, Policy
from adacorr.store import GateSumStore
from diffusion import make_sampler
from evaluate import cost
from evaluate.__main__ import main
from evaluate.cost import EveryStep

STEPS = 8


@pytest.mark.parametrize(
    ("policy", "adacorr"),
    [
        ("interval:every=4", None),
        ("dicache:threshold=10", None),  # units after a probe
        ("taylorseer", ""),
        ("dicache:threshold=10", ""),
        (None, "budget=3"),
        (None, "gamma=0.1"),
        (None, "literal:gamma=1000000"),
    ],
)
def test_reuse_forced_off_gives_the_uncached_image_and_still_fills_the_cache(model, policy, adacorr):
    cache = CacheManager.of(policy, adacorr)
    sample(model, STEPS, cache=cache)
    forced = EveryStep(cache.policy, cache.correction)
    plain = sample(model, STEPS)
    assert_close(sample(model, STEPS, cache=forced), plain, rtol=0, atol=1e-5 * float(plain.abs().max()))
    assert (forced.trace.executed == 1).all()
    assert forced.bytes == cache.bytes > 0
    if adacorr is not None:
        assert np.isfinite(forced.trace.score[1:]).all()  # each step was forecast and measured


def test_reuse_forced_off_asks_and_forecasts_once_a_step(model, monkeypatch):
    asked, forecast, predict = [], [], GateSumStore.predict

    @dataclass
    class Lazy(Policy):
        """Never compute again."""

        name = "lazy"

        def decide(self, view):
            asked.append(view.step)
            return view.everyone(False)

    monkeypatch.setattr(GateSumStore, "predict", lambda *args: forecast.extend(args[2]) or predict(*args))
    for correction in (None, AdaCorrection()):
        sample(model, STEPS, cache=EveryStep(Lazy(), correction))
    assert asked == [*range(STEPS)] * 2
    assert forecast == [*range(1, STEPS)]
    forecast.clear()
    sample(model, STEPS, cache=EveryStep(correction=AdaCorrection(gamma=0.1)))
    assert forecast == [*range(1, STEPS)]  # though wide intervals ask for many steps ahead


def test_a_row_by_hand(model, monkeypatch):
    turns = [1.0, 0.5, 1.5, 0.1, 2.0, 0.25, 12.0, 0.3, 10.0, 0.5, 10.2, 0.2]  # uncached, cached, every step, decoding
    spent = iter(turns)
    monkeypatch.setattr(cost, "timed", lambda job, device: (job(), next(spent)))
    vae, origin = SimpleNamespace(decode=lambda z: SimpleNamespace(sample=z)), SimpleNamespace(sha256="toy")
    pipe = pipeline.Pipeline(model, make_sampler("ddim", STEPS), vae, origin, 1.5, "all", torch.device("cpu"))
    runs = []
    progress = SimpleNamespace(update=lambda: runs.append(1))
    record = cost.measure(pipe, CacheManager.of("interval:every=4", None), 2, 0, 3, progress)
    assert len(runs) == 3 * (3 + 3)
    assert record["seconds"]["uncached"] == {"median": 2.0, "p10": 1.2, "p90": 8.4, "all": [1.0, 2.0, 10.0]}
    assert record["seconds"]["decode"]["median"] == 0.2
    assert record["images_per_second"] == {"uncached": 1.0, "cached": 4.0, "every_step": 2 / 10.2}
    assert record["speedup"] == 4.0
    assert record["compute"] == pytest.approx(3 / 8, abs=0.02)  # steps 0, 3 and 7, and a few gates
    flops = 4 * 3 * sum(model.branch_flops()) * 2 * STEPS / 4  # for an image: layers, halves, steps
    assert record["block_flops_per_image_uncached"] == flops
    assert record["overhead_seconds"] == 0.5  # turn by turn: 0.5, 10 and 0.2
    assert record["peak_bytes"] is None
    assert record["uncached_flops_per_second"] == 2 * flops / 2.0
    assert cost.cells(record | {"matmul_flops_per_second": 4 * flops}) == {
        "batch": "2",
        "uncached s, median / p10 / p90": "2.000 / 1.200 / 8.400",
        "cached s, median / p10 / p90": "0.500 / 0.300 / 0.500",
        "images/s": "1.00 / 4.00",
        "speed-up": "4.00x",
        "compute": f"{record['compute']:.3f}",
        "of 1 / compute": f"{4 * record['compute']:.0%}",
        "overhead s": "0.500 (+25.0%)",
        "of peak": "25%",
        "decode s": "0.200",
        "cache MB per image": f"{record['cache_bytes_per_image'] / 1e6:.2f}",
        "peak GB": "",
    }


def test_the_rate_of_a_matrix_product_is_that_of_the_fastest(monkeypatch):
    spent = iter([3.0, 2.0, *[4.0] * 8])
    monkeypatch.setattr(cost, "timed", lambda job, device: (job(), next(spent)))
    assert cost.matmul_rate(torch.device("cpu"), torch.bfloat16) == 2 * 2048**3 / 2.0


def test_the_command_writes_what_it_prints(tiny32, tmp_path, monkeypatch, capsys):
    spent, out = iter([1.0, 1.5, 1.5, 1.0, 0.5, 1.5]), tmp_path / "cost.json"  # batch 1, then batch 3
    monkeypatch.setattr(cost, "timed", lambda job, device: (job(), next(spent)))
    monkeypatch.setattr(cost, "matmul_rate", lambda device, dtype: 1e12)
    common = f"--num-sampling-steps {STEPS} --device cpu --repeats 1 --ckpt {tiny32} --out {out}"
    assert main(f"cost --adacorr gamma=0.1 --calibrate off --batch-size 1 3 {common}".split()) == 0
    content, lines = json.loads(out.read_text()), capsys.readouterr().out.splitlines()
    columns, rows = content["table"]["columns"], content["table"]["rows"]
    assert [f"| {' | '.join(cells)} |" for cells in (columns, *rows)] == [lines[0], *lines[2:4]]
    assert content["notes"] == lines[5:]
    assert lines[6:] == ["At batch 1 the cached run is slower: its own work eats the gain."]
    assert (content["kind"], content["protocol"]["adacorr"]) == ("cost", "gamma=0.1")
    assert [row[0] for row in rows] == ["1", "3"]
    assert "decode s" not in columns
    assert [row["batch_size"] for row in content["rows"]] == [1, 3]


def test_a_batch_that_does_not_fit_loses_no_other(tiny32, tmp_path, monkeypatch, capsys):
    def run(pipe, cache, batch, *others):
        if batch > 1:
            raise torch.OutOfMemoryError("of the test")
        return measure(pipe, cache, batch, *others)

    measure = cost.measure
    monkeypatch.setattr(cost, "measure", run)
    out = tmp_path / "cost.json"
    given = f"cost --cache interval --repeats 1 --batch-size 1 64 --device cpu --ckpt {tiny32} --out {out}"
    assert main(given.split()) == 1
    out_text, err = capsys.readouterr()
    assert "--batch-size 64 does not fit" in err
    assert out_text.splitlines()[2].startswith("| 1 |")
    assert len(json.loads(out.read_text())["rows"]) == 1


@pytest.mark.gpu
def test_peak_memory(tiny32, tmp_path):
    out = tmp_path / "cost.json"
    given = f"cost --cache interval --device cuda --repeats 1 --batch-size 1 64 --ckpt {tiny32} --out {out}"
    assert main(given.split()) == 0
    few, many = (row["peak_bytes"] for row in json.loads(out.read_text())["rows"])
    assert many["uncached"] > few["uncached"] > tiny32.stat().st_size / 2
    assert many["cached"] > many["uncached"]  # what the cache holds


def test_random_weights(tmp_path, monkeypatch, capsys):
    compiled, measured, out = [], [], tmp_path / "cost.json"
    monkeypatch.setattr(cost, "compile_blocks", compiled.append)
    monkeypatch.setattr(cost, "with_profile", lambda *_: measured.append(1))
    small = "--random-weights DiT-Ti/2 --image-size 32 --num-sampling-steps 4 --device cpu --repeats 1 --compile"
    assert main(f"cost {small} --adacorr budget=3 --out {out}".split()) == 0
    row = json.loads(out.read_text())["rows"][0]
    assert row["compute"] <= 3 / 4 + 0.02  # and the gates
    assert (len(compiled), measured) == (1, [])  # what is known of one random model is of no use to another
    block = compiled[0].blocks[0]
    assert [float(gate.std()) > 0.05 for gate in block.gates(torch.randn(4, 192))] == [True, True]
