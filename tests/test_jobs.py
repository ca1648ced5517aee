"""Work on a bench in several processes: it finds what one process finds."""

import multiprocessing
import os
import time
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from adacorr.command import Failure
from evaluate.bench import Bench, Setting
from evaluate.compare import make_bench
from evaluate.jobs import run_jobs
from pipeline import ModelOptions

SETTINGS = [Setting("interval:every=2"), Setting("interval:every=3"), Setting(sampler="ddim", steps=4)]
KNOWN = SETTINGS[0]


@pytest.fixture
def make(tiny32):
    options = asdict(ModelOptions(ckpt=str(tiny32), num_sampling_steps=8, device="cpu"))
    return partial(make_bench, SimpleNamespace(
        **options, seed=7, num_images=3, solution_steps=16, search_images=1, calibrate="auto"))  # fmt: skip


@pytest.fixture
def forked(monkeypatch):
    """Processes that have imported everything; those of the first test start anew."""
    monkeypatch.setattr("evaluate.jobs.get_context", lambda _: multiprocessing.get_context("fork"))


def threads(bench):
    return torch.get_num_threads()


def test_two_processes_find_what_one_does(make, monkeypatch):
    jobs = [partial(Bench.run, method="m", form="alone", setting=setting) for setting in SETTINGS]
    alone, spread = make({}), make({})
    expected = [row for _, row in run_jobs(alone, jobs, 1, None)]
    known = {(KNOWN, 3): replace(expected[0], method="known")}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    found = dict(run_jobs(spread, [*jobs, threads], 2, partial(make, known)))
    assert found.pop(3) == 3  # its share of them
    assert found[0] == known[KNOWN, 3]  # not run again
    for number in (1, 2):
        assert found[number].speedup > 0
        same = replace(found[number], speedup=expected[number].speedup)
        assert same.psnr["mean"] == pytest.approx(expected[number].psnr["mean"], abs=0.05)
        assert same.solution_psnr["min"] == pytest.approx(expected[number].solution_psnr["min"], abs=0.05)
        assert (same.compute, same.images) == (expected[number].compute, 3)
    assert spread.rows == {(setting, 3): found[number] for number, setting in enumerate(SETTINGS) if number}


def slow(bench):
    time.sleep(0.5)
    return bench.run("m", "alone", SETTINGS[1])


def mistaken(bench):
    raise ValueError("a mistake")


def test_what_other_processes_find_is_kept_when_one_job_fails(make, forked):
    bench, found = make({}), []
    with pytest.raises(ValueError, match="a mistake"):
        found.extend(run_jobs(bench, [mistaken, slow], 2, partial(make, {})))
    ((number, row),) = found
    assert number == 1
    assert bench.rows == {(SETTINGS[1], 3): row}


def die(bench):
    os._exit(9)


def test_a_process_that_dies_is_told(make, forked):
    with pytest.raises(Failure, match="one of 2 processes died.*try fewer"):
        list(run_jobs(make({}), [die], 2, partial(make, {})))
