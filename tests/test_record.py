"""record.py: what belongs to a run, its record, and the locks between jobs and their processes."""

import json
import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock

from fid_run import record
from fid_run.protocol import differences, run_id
from fid_run.record import RunFolder, RunMismatch

FORK = multiprocessing.get_context("fork")
LONG = 30  # seconds after which a test that waits has failed
PROTOCOL = {"sampler": {"spec": "ddim", "steps": 50}, "seed": 0, "model": {"num_classes": 4}}


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "ddim-cfg1.5")
    folder.path.mkdir()
    return folder


def begin(folder):
    folder.begin(PROTOCOL, {"count": 3})


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


def test_sessions_and_what_is_known_at_their_end(folder):
    assert folder.npz.name == "ddim-cfg1.5.npz"
    assert folder.check(PROTOCOL) is None
    begin(folder)
    folder.end("stopped by SIGTERM")
    begin(RunFolder(folder.path))  # is killed
    last = RunFolder(folder.path)
    begin(last)
    assert (last.is_current(), folder.is_current()) == (True, False)
    folder.npz.write_text("12345678")
    last.end("complete", {"count": 3, "bytes": 8, "sha256": "abc"}, {"images": 3})
    found = folder.check(PROTOCOL)
    assert [session.get("outcome") for session in found["sessions"]] == ["stopped by SIGTERM", None, "complete"]
    assert [session["ended"] is None for session in found["sessions"]] == [False, True, False]
    assert (found["statistics"], found["sessions"][0]["count"]) == ({"images": 3}, 3)
    run = run_id(PROTOCOL)
    assert (folder.packed(run), folder.packed("another")) == (3, 0)
    for change in (lambda: folder.npz.write_text("123"), folder.npz.unlink, lambda: begin(folder)):
        change()
        assert folder.packed(run) == 0


@pytest.mark.parametrize("name", ["images/000000.png", "profile.safetensors", "../ddim-cfg1.5.npz", "x/y"])
def test_files_without_a_record_are_refused(folder, name):
    path = folder.path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("")
    with pytest.raises(RunMismatch, match="has no run.json but .*, which may be another run's"):
        folder.check(PROTOCOL)


def test_what_a_start_leaves_that_was_killed_before_the_record_is_no_obstacle(folder):
    for name in ("lock-000", "lock-001", "images", ".run.json.host.17.tmp", "images/.000001.png.host.17.tmp"):
        (folder.path / name).mkdir() if name == "images" else (folder.path / name).write_text("")
    left = folder.path.with_name(".ddim-cfg1.5.npz.host.17.tmp")
    left.write_text("as large as the .npz")
    foreign = folder.path.with_name(".ddim-cfg2.npz.host.17.tmp")
    foreign.write_text("another run's")
    folder.tidy()
    assert folder.check(PROTOCOL) is None
    assert sorted(path.name for path in folder.path.rglob("*")) == ["images", "lock-000", "lock-001"]
    assert (left.exists(), foreign.exists()) == (False, True)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "",
        lambda text: "[]",
        lambda text: "{}",
        lambda text: text[:100],
        lambda text: text.replace('"schema": 3', '"schema": 2'),
        lambda text: text.replace('"steps": 50', '"steps": 20'),
    ],
    ids=["empty", "list", "no fields", "cut", "older", "edited"],
)
def test_a_damaged_or_other_record_is_refused(folder, change):
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
        folder.end("failed")
    assert folder.run_json.read_bytes() == before
    assert [path.name for path in folder.path.iterdir() if path.suffix == ".tmp"] == []


def test_clearing_removes_what_is_the_runs_and_nothing_else(folder):
    begin(folder)
    folder.images.mkdir()
    for path in (folder.npz, folder.profile, folder.images / "000003.png", folder.images / "1000003.png"):
        path.write_text("")
    others = [folder.path / "notes.txt", folder.images / "notes.txt", folder.images / "2024-holiday.png"]
    for path in others:
        path.write_text("mine")
    for _ in range(2):
        folder.clear()
        assert {path for path in folder.path.parent.rglob("*") if path.is_file()} == {*others}


# ----------------------------------------------------------------------------------------------------- locks


def hold(path, rank, pipe):
    """Another job's rank 0, or a rank that outlived its job, until it is killed."""
    folder = RunFolder(path)
    with folder.lock(print) if rank == 0 else FileLock(folder.path / f"lock-{rank:03d}"):
        pipe.send("locked")
        time.sleep(LONG)


@pytest.fixture
def holder(folder):
    """Starts a process that holds the lock of a rank; with `seconds` it is killed after them."""
    begin(folder)
    started = []

    def start(rank, seconds=None):
        mine, other = FORK.Pipe()
        process = FORK.Process(target=hold, args=(folder.path, rank, other), daemon=True)
        process.start()
        started.append(process)
        assert mine.poll(LONG)
        if seconds is not None:
            threading.Timer(seconds, process.kill).start()

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
    with pytest.raises(RunMismatch, match=f"is in use by .*, pid {os.getpid()} .lock-0{rank:02d} is locked.: wait for"):
        folder.lock(notes.append).__enter__()
    assert len(notes) == 1
    assert "waiting for up to 0 s" in notes[0]
    if rank > 0:  # and nothing is left locked
        FileLock(folder.path / "lock-000").acquire(timeout=0).lock.release()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_job_waits_for_one_that_is_killed_whose_lock_is_free_at_once(folder, holder, rank):
    holder(rank, seconds=0.5)
    notes = []
    with folder.lock(notes.append):
        assert len(notes) == 1
    with folder.lock(notes.append):  # let go at the end of the block, not when it is collected
        assert len(notes) == 1


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
    begin(folder)
    with folder.join(2) as lock:
        assert (folder.path / "lock-002").exists()
    assert not lock.is_locked
    monkeypatch.setattr(record, "VISIBLE", 0.3)
    begin(RunFolder(folder.path))
    with pytest.raises(OSError, match="does not see this job in .*run.json: give a --sample-dir .*share"):
        folder.join(2)


def test_rank_0_waits_until_the_others_are_through(folder, holder):
    start = time.monotonic()
    holder(1, seconds=0.6)
    folder.await_ranks(3)  # of rank 2 there is nothing
    assert time.monotonic() - start > 0.5
