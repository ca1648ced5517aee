"""record.py: what belongs to a run, locks between jobs and their processes, logs and the statistics from them."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from fid_run import record
from fid_run.protocol import differences, run_id
from fid_run.record import RunFolder, RunMismatch, append, statistics

FORK = multiprocessing.get_context("fork")
LONG = 30  # seconds after which a test that waits has failed
PROTOCOL = {"sampler": {"spec": "ddim", "steps": 50}, "seed": 0, "model": {"num_classes": 4}}
SESSION = {"count": 3, "environment": {"argv": ["sample_ddp.py"], "torch": "2"}}


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "ddim-cfg1.5")
    folder.path.mkdir()
    return folder


def begin(folder, labels=None):
    return folder.begin(PROTOCOL, labels, SESSION)


def read(path):
    return json.loads(path.read_text())


def killed_after(seconds, process):
    """A process that kills another one."""
    killer = FORK.Process(target=lambda: (time.sleep(seconds), os.kill(process.pid, signal.SIGKILL)), daemon=True)
    killer.start()
    return killer


# ---------------------------------------------------------------------------------------------- the protocol


def test_run_id_is_of_the_values_not_of_the_order_of_keys():
    other = {"model": {"num_classes": 4}, "seed": 0, "sampler": {"steps": 50, "spec": "ddim"}}
    assert run_id(PROTOCOL) == run_id(other) != run_id({**PROTOCOL, "seed": 1})
    assert len(run_id(PROTOCOL)) == 16
    with pytest.raises(ValueError, match="JSON"):
        run_id({"scale": float("nan")})


def test_differences_name_every_field_on_both_sides_and_agree_with_the_id():
    now = {"sampler": {"spec": "ddpm", "steps": 50, "eta": 1.0}, "seed": 0.0, "vae": None}
    assert differences(PROTOCOL, now) == [
        'model: {"num_classes":4} in the folder, not asked',
        "sampler.eta: not in the folder, 1.0 asked",
        'sampler.spec: "ddim" in the folder, "ddpm" asked',
        "seed: 0 in the folder, 0.0 asked",
        "vae: not in the folder, null asked",
    ]
    assert differences(PROTOCOL, json.loads(json.dumps(PROTOCOL))) == []
    for a, b in ((1, 1.0), (1, True), (0, False), (None, {}), ({}, {"x": 1}), ("1", 1)):
        assert run_id({"x": a}) != run_id({"x": b})
        assert differences({"x": a}, {"x": b})


# ------------------------------------------------------------------------------------------------ the record


def test_a_fresh_folder_is_none_and_a_second_start_finds_the_record(folder):
    assert folder.npz.name == "ddim-cfg1.5.npz"
    assert folder.check(PROTOCOL) is None
    first = begin(folder, labels=np.array([3, 1, 2]))
    assert np.load(folder.labels).tolist() == [3, 1, 2]
    assert read(folder.run_json)["sessions"][0]["state"] == "running"
    folder.end("complete", {"images": 3}, "fine")
    record = RunFolder(folder.path).check(PROTOCOL)
    (session,) = record["sessions"]
    assert (session["state"], session["count"], session["message"], session["session"]) == ("complete", 3, "fine", 1)
    assert record["statistics"] == {"images": 3}
    again = RunFolder(folder.path)
    second = begin(again)
    assert [s["state"] for s in again.record["sessions"]] == ["complete", "running"]
    assert (again.has(second), again.has(first)) == (True, False)
    begin(RunFolder(folder.path))  # the second was killed: it did not say how it ended
    assert [s["state"] for s in read(folder.run_json)["sessions"]] == ["complete", "killed", "running"]


@pytest.mark.parametrize("name", ["images/000000.png", "labels.npy", "log/rank-000.jsonl", "../ddim-cfg1.5.npz", "x/y"])
def test_files_without_a_record_are_refused(folder, name):
    path = folder.path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("")
    with pytest.raises(RunMismatch, match="has no run.json but .*, which may be another run's"):
        folder.check(PROTOCOL)


def test_what_a_start_leaves_that_was_killed_before_the_record_is_no_obstacle(folder):
    for name in ("lock", "log/rank-001.lock", "images", ".run.json.host.17.tmp", ".labels.npy.host.17.tmp"):
        path = folder.path / name
        path.parent.mkdir(exist_ok=True)
        path.mkdir() if name == "images" else path.write_text("")
    left = folder.path.with_name(".ddim-cfg1.5.npz.host.17.tmp")
    left.write_text("as large as the .npz")
    foreign = folder.path.with_name(".ddim-cfg2.npz.host.17.tmp")
    foreign.write_text("another run's")
    assert folder.check(PROTOCOL) is None
    assert folder.tidy() == 3
    assert sorted(path.name for path in folder.path.rglob("*")) == ["images", "lock", "log", "rank-001.lock"]
    assert (left.exists(), foreign.exists()) == (False, True)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "",
        lambda text: "[]",
        lambda text: "{}",
        lambda text: text[:100],
        lambda text: text.replace('"schema": 2', '"schema": 3'),
        lambda text: text.replace('"steps": 50', '"steps": 20'),
        lambda text: json.dumps(json.loads(text) | {"sessions": []}),
        lambda text: json.dumps(json.loads(text) | {"sessions": [{}]}),
        lambda text: json.dumps(json.loads(text) | {"sessions": 7}),
    ],
    ids=["empty", "list", "no fields", "cut", "newer", "edited", "no sessions", "hollow session", "number"],
)
def test_a_damaged_or_newer_record_is_refused(folder, change):
    begin(folder)
    folder.run_json.write_text(change(folder.run_json.read_text()))
    for call in (folder.read, lambda: folder.check(PROTOCOL), lambda: begin(folder)):
        with pytest.raises(RunMismatch, match=r"run.json is damaged or of another version .*--overwrite"):
            call()


def test_a_full_disk_leaves_the_old_record(folder, monkeypatch):
    begin(folder)
    before = folder.run_json.read_bytes()

    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(OSError, match=r"run.json: the disk, its inodes or the quota are used up: \d+ bytes needed"):
        folder.end("failed", {})
    assert folder.run_json.read_bytes() == before
    assert [path.name for path in folder.path.iterdir() if path.suffix == ".tmp"] == []


def test_overwriting_removes_what_is_the_runs_and_nothing_else(folder):
    begin(folder, labels=np.arange(3))
    append(folder.log(0), [{"index": 0}])
    folder.npz.write_text("")
    folder.succeed("0", 3, "abc")
    (folder.path / "notes.txt").write_text("mine")
    (folder.path / "log" / "notes.txt").write_text("mine")
    folder.clear()
    assert sorted(p.name for p in folder.path.rglob("*") if p.is_file()) == ["notes.txt", "notes.txt"]
    assert not folder.npz.exists()
    folder.clear()


# --------------------------------------------------------------------------------------------------- success


def test_the_npz_is_believed_while_everything_fits(folder):
    token = begin(folder)
    assert folder.packed("run") == 0
    folder.npz.write_text("12345678")
    folder.succeed("run", 3, "abc")
    mark = read(folder.success_json)
    assert (mark["count"], mark["npz"], mark["npz_bytes"], mark["npz_sha256"]) == (3, "ddim-cfg1.5.npz", 8, "abc")
    assert (folder.packed("run"), folder.packed("another")) == (3, 0)
    folder.npz.write_text("123")
    assert folder.packed("run") == 0
    folder.npz.unlink()
    assert folder.packed("run") == 0
    folder.succeed("run", 3, None)  # --no-pack
    assert folder.packed("run") == 0
    for content in ("", "[]", "{}", "7"):
        folder.success_json.write_text(content)
        assert folder.packed("run") == 0
    assert folder.has(token)
    begin(folder)
    assert not folder.success_json.exists()  # the run is no longer finished


# ----------------------------------------------------------------------------------------------------- locks


def hold(path, rank, pipe):
    """Another job's rank 0, or a rank that outlived its job, until it is killed."""
    folder = RunFolder(path)
    with folder.lock(print) if rank == 0 else FileLock(folder.log(rank, "lock")):
        pipe.send("locked")
        time.sleep(LONG)


@pytest.fixture
def holder(folder):
    """Starts a process that holds the lock of a rank."""
    begin(folder)
    started = []

    def start(rank):
        mine, other = FORK.Pipe()
        process = FORK.Process(target=hold, args=(folder.path, rank, other), daemon=True)
        process.start()
        assert mine.poll(LONG)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join(LONG)


@pytest.mark.parametrize("rank", [0, 12])
def test_a_second_job_is_refused_and_told_by_whom(folder, holder, monkeypatch, rank):
    """By rank 0 of the first job, and by any of its processes that is left when rank 0 is gone."""
    holder(rank)
    monkeypatch.setattr(record, "WAIT", 0.3)
    notes = []
    with pytest.raises(RunMismatch, match=f"is in use by .*, pid {os.getpid()} .*is locked.: wait for"):
        folder.lock(notes.append).__enter__()
    assert len(notes) == 1
    assert "waiting for up to 0 s" in notes[0]
    if rank > 0:  # and nothing is left locked
        FileLock(folder.path / "lock").acquire(timeout=0).lock.release()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_job_waits_for_one_that_is_killed_whose_lock_is_free_at_once(folder, holder, rank):
    notes, killer = [], killed_after(0.5, holder(rank))
    with folder.lock(notes.append):
        assert len(notes) == 1
    killer.join(LONG)


def test_of_several_jobs_that_start_together_one_is_at_work_at_a_time(folder, tmp_path):
    begin(folder)
    busy = tmp_path / "busy"

    def job():
        for _ in range(5):
            with folder.lock(lambda text: None):
                busy.mkdir()  # FileExistsError if another is here
                time.sleep(0.01)
                busy.rmdir()

    jobs = [FORK.Process(target=job, daemon=True) for _ in range(4)]
    for process in jobs:
        process.start()
    for process in jobs:
        process.join(LONG)
    assert [process.exitcode for process in jobs] == [0] * 4


def test_a_rank_joins_the_session_that_it_was_told_of(folder, monkeypatch):
    token = begin(folder)
    with RunFolder(folder.path).join(token, 2):
        assert folder.log(2, "lock").exists()
    monkeypatch.setattr(record, "VISIBLE", 0.3)
    with pytest.raises(OSError, match="does not see this job in .*run.json: give a --sample-dir .*share"):
        RunFolder(folder.path).join("another", 2)


def test_rank_0_waits_until_the_others_are_through(folder, holder):
    start, killer = time.monotonic(), killed_after(0.6, holder(1))
    folder.await_ranks(3)  # of rank 2 there is nothing
    assert time.monotonic() - start > 0.5
    killer.join(LONG)


# ------------------------------------------------------------------------------------------------ statistics


def line(index, session=1, rank=0, **numbers):
    return {"session": session, "rank": rank, "index": index, "seconds": 2.0, "recomputed": None, **numbers}


def test_statistics_by_hand(folder):
    begin(folder)
    cached = {"flops": 25, "uncached_flops": 100, "hits": 30, "evaluations": 40}
    append(folder.log(0), [line(i, **cached, cache_bytes=7) for i in (0, 2)])
    fault = {"index": 1, "after": "step 3"}
    again = line(1, rank=1, **{**cached, "flops": 75, "hits": 10}, cache_bytes=9, fallbacks=2)
    append(folder.log(1), [{**again, "recomputed": fault}])
    totals = statistics(folder, 4)
    assert (totals["images"], totals["unaccounted"], totals["broken_lines"]) == (3, 1, 0)
    assert (totals["seconds"], totals["images_per_second"]) == (6.0, 0.5)
    assert (totals["compute"], totals["hit_rate"]) == (125 / 300, 70 / 120)
    assert (totals["saved_flops"], totals["fallbacks"], totals["cache_bytes"]) == (175, 2, 9)
    assert totals["recomputed"] == [fault]
    assert statistics(folder, 1)["images"] == 1  # images beyond the count do not count


def test_without_a_cache_or_a_log(folder):
    totals = statistics(folder, 5)
    assert (totals["images"], totals["unaccounted"], totals["images_per_second"]) == (0, 5, None)
    begin(folder)
    append(folder.log(0), [line(0)])
    totals = statistics(folder, 1)
    assert (totals["compute"], totals["hit_rate"], totals["saved_flops"], totals["cache_bytes"]) == (1.0, 0.0, 0, 0)


def test_an_image_that_was_made_twice_counts_as_the_last_session_made_it(folder):
    begin(folder)
    append(folder.log(0), [line(0, session=2, seconds=5.0), line(1, session=1, seconds=1.0)])
    append(folder.log(1), [line(0, session=1, rank=1, seconds=9.0, recomputed={"index": 0})])
    append(folder.log(1), [line(1, session=2, rank=1, seconds=3.0), line(1, session=2, rank=1, seconds=4.0)])
    totals = statistics(folder, 2)
    assert (totals["images"], totals["seconds"], totals["recomputed"]) == (2, 9.0, [])


@pytest.mark.parametrize(
    "text",
    [b"x", b"7", b"{}", b'{"session": 1}', b'{"half": ', b"\xff\xfe", json.dumps(line(0, flops=None)).encode()],
)
def test_broken_lines_are_counted_and_cost_no_other(folder, text):
    begin(folder)
    append(folder.log(0), [line(0)])
    with open(folder.log(0), "ab") as file:
        file.write(text)  # without its end, as a kill leaves it
    append(folder.log(0), [line(1)])
    totals = statistics(folder, 2)
    assert (totals["images"], totals["broken_lines"]) == (2, 1)


def test_a_number_that_json_does_not_have_writes_nothing(folder):
    begin(folder)
    with pytest.raises(ValueError, match="JSON"):
        append(folder.log(0), [line(0), line(1, seconds=float("nan"))])
    assert not folder.log(0).exists()
