"""run_folder.py: record and mismatch, lock and takeover, signs of life, logs after kills, statistics, success."""

import errno
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from adacorr.files import write_json
from ddp import run_folder
from ddp.run_folder import (
    RankLog,
    RunFolder,
    RunLocked,
    RunMismatch,
    await_session,
    differences,
    format_ranges,
    parse_ranges,
    run_id,
    statistics,
    wait_for_ranks,
)

PROTOCOL = {"sampler": {"name": "ddim", "num_steps": 50}, "cfg_scale": 1.5, "cache": None}
FORK = multiprocessing.get_context("fork")  # children start at once: they need not import torch again
LONG = 30  # seconds after which a test that waits has failed


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "samples" / "DiT-B-2 cfg1.5 né")


def read(path):
    return json.loads(path.read_text())


def until(condition):
    end = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def start(target, *args):
    process = FORK.Process(target=target, args=args, daemon=True)
    process.start()
    return process


def set_age(path, seconds):
    """By the clock of the file system."""
    path.touch()
    stamp = path.stat().st_mtime - seconds
    os.utime(path, (stamp, stamp))


# ----------------------------------------------------------------------------------------------------
# Protocol


def test_run_id_is_of_the_values_not_of_the_order_of_keys():
    # sha256 of {"a":1,"b":{"c":[1,2],"d":"x"}}
    expected = "402a3ca52530f07e"
    assert run_id({"a": 1, "b": {"c": [1, 2], "d": "x"}}) == expected
    assert run_id({"b": {"d": "x", "c": (1, 2)}, "a": 1}) == expected
    assert run_id({"a": 1, "b": {"c": [2, 1], "d": "x"}}) != expected
    with pytest.raises(ValueError, match="JSON"):
        run_id({"a": float("nan")})


def test_differences_name_every_field_on_both_sides():
    before = {"sampler": {"num_steps": 50, "name": "ddim"}, "cfg": 1.5, "old": [1, 2], "cache": None, "same": {"x": 1}}
    now = {
        "same": {"x": 1},
        "sampler": {"name": "ddpm", "num_steps": 20},
        "cfg": 1.5,
        "new": "a",
        "cache": {"gamma": 1},
    }
    assert differences(before, now) == [
        'cache: null in the folder, {"gamma":1} asked',
        'new: not in the folder, "a" asked',
        "old: [1,2] in the folder, not asked",
        'sampler.name: "ddim" in the folder, "ddpm" asked',
        "sampler.num_steps: 50 in the folder, 20 asked",
    ]


@pytest.mark.parametrize(("a", "b"), [(1, 1.0), (1, True), (0, False), (None, {}), ({}, {"x": 1}), ("1", 1)])
def test_differences_and_run_id_agree_on_what_is_equal(a, b):
    assert differences({"k": a}, {"k": b})
    assert run_id({"k": a}) != run_id({"k": b})


def test_a_tuple_is_the_list_that_json_makes_of_it():
    assert differences({"k": [1, 2]}, {"k": (1, 2)}) == []


# ----------------------------------------------------------------------------------------------------
# Record


def test_npz_is_beside_the_folder_and_keeps_dots(folder):
    assert folder.npz.name == "DiT-B-2 cfg1.5 né.npz"
    assert folder.npz.parent == folder.path.parent


def test_a_fresh_folder_is_none_and_a_second_start_finds_the_record(folder):
    assert folder.check(PROTOCOL) is None
    assert not folder.path.exists()  # looking leaves nothing
    assert folder.begin(PROTOCOL, {"count": 7, "processes": 2}) == 1
    folder.end("interrupted", reason="SIGTERM")
    record = RunFolder(folder.path).check(dict(reversed(PROTOCOL.items())))
    assert record["schema"] == 1
    assert record["run_id"] == run_id(PROTOCOL)
    assert record["protocol"] == PROTOCOL
    (session,) = record["sessions"]
    assert (session["session"], session["state"], session["count"]) == (1, "interrupted", 7)
    assert session["reason"] == "SIGTERM"
    assert session["seconds"] >= 0
    assert session["ended"] >= session["started"]  # ISO text sorts by time
    assert session["ended"].endswith("+00:00")


def test_seconds_do_not_follow_the_wall_clock(folder, monkeypatch):
    clock = iter([100.0, 107.5])
    monkeypatch.setattr(run_folder.time, "monotonic", lambda: next(clock))
    folder.begin(PROTOCOL, {})
    monkeypatch.setattr(run_folder, "now", lambda: "1970-01-01T00:00:00+00:00")
    folder.end("complete", {"images": 3})
    record = read(folder.run_json)
    assert record["sessions"][0]["seconds"] == 7.5
    assert record["statistics"] == {"images": 3}


def test_mismatch_names_every_field_and_the_ways_out(folder):
    folder.begin(PROTOCOL, {})
    content = folder.run_json.read_bytes()
    other = {"sampler": {"name": "ddim", "num_steps": 20}, "cfg_scale": 4.0, "cache": None, "dtype": "bf16"}
    for attempt in (folder.check, lambda protocol: folder.begin(protocol, {})):
        with pytest.raises(RunMismatch) as error:
            attempt(other)
        text = str(error.value)
        assert "sampler.num_steps: 50 in the folder, 20 asked" in text
        assert "cfg_scale: 1.5 in the folder, 4.0 asked" in text
        assert 'dtype: not in the folder, "bf16" asked' in text
        assert "cache" not in text
        assert "--sample-dir" in text
        assert "--overwrite" in text
        assert "\n" not in text
    assert folder.run_json.read_bytes() == content


@pytest.mark.parametrize(
    "name", ["000001.png", "images/000001.png", "SUCCESS.json", "log/rank-000.jsonl", "locked.txt"]
)
def test_files_without_a_record_are_refused(folder, name):
    path = folder.path / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x")
    with pytest.raises(RunMismatch, match="no run.json") as error:
        folder.check(PROTOCOL)
    assert str(folder.path / Path(name).parts[0]) in str(error.value)


def test_an_npz_without_its_folder_is_refused(folder):
    folder.npz.parent.mkdir()
    folder.npz.write_bytes(b"x")
    with pytest.raises(RunMismatch, match="npz"):
        folder.check(PROTOCOL)


def test_what_a_start_leaves_that_was_killed_before_the_record_is_no_obstacle(folder):
    folder.images.mkdir(parents=True)
    for name in ("lock", "lock.0123abcd", ".run.json.node7.12.tmp"):
        (folder.path / name).write_bytes(b"")
    assert folder.check(PROTOCOL) is None
    folder.begin(PROTOCOL, {})
    assert not (folder.path / ".run.json.node7.12.tmp").exists()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "damaged"),
        (b'{"schema": 1, "run_', "damaged"),
        (b"\xff\xfe\x00", "damaged"),
        (b"[1]", "damaged"),
        (b'{"schema": 1}', "damaged"),
        (b'{"schema": 2, "anything": 0}', "schema 2, this version knows 1"),
    ],
)
def test_an_unreadable_or_newer_record_is_refused(folder, content, match):
    folder.path.mkdir(parents=True)
    folder.run_json.write_bytes(content)
    with pytest.raises(RunMismatch, match=match) as error:
        folder.check(PROTOCOL)
    assert str(folder.run_json) in str(error.value)
    assert "--overwrite" in str(error.value)


def test_a_record_that_was_edited_to_fit_is_refused(folder):
    folder.begin(PROTOCOL, {})
    asked = {**PROTOCOL, "cfg_scale": 4.0}
    write_json(folder.run_json, {**read(folder.run_json), "protocol": asked})
    with pytest.raises(RunMismatch, match="do not fit together"):
        folder.check(asked)


def test_a_killed_session_is_told_from_one_that_ended(folder):
    def session():
        RunFolder(folder.path).begin(PROTOCOL, {})
        os.kill(os.getpid(), signal.SIGKILL)

    folder.begin(PROTOCOL, {})
    folder.end("failed")
    start(session).join(LONG)
    assert folder.begin(PROTOCOL, {}) == 3
    assert [s["state"] for s in read(folder.run_json)["sessions"]] == ["failed", "killed", "running"]


def test_a_full_disk_leaves_the_old_record(folder, monkeypatch):
    folder.begin(PROTOCOL, {})
    folder.end("interrupted")
    content = folder.run_json.read_bytes()

    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        folder.begin(PROTOCOL, {})
    assert folder.run_json.read_bytes() == content
    assert [p.name for p in folder.path.iterdir()] == ["run.json"]


def test_a_job_that_lost_the_folder_does_not_overwrite_the_next_ones_record(folder):
    folder.begin(PROTOCOL, {})
    RunFolder(folder.path).begin(PROTOCOL, {})
    content = folder.run_json.read_bytes()
    with pytest.raises(RunLocked, match="taken over"):
        folder.end("complete")
    assert folder.run_json.read_bytes() == content


def test_overwriting_removes_what_is_the_runs_and_nothing_else(folder):
    folder.begin(PROTOCOL, {})
    rank = RankLog(folder, 1, 3, 4)
    rank.state("done")
    rank.append({"indices": [0], "seconds": 1.0})
    folder.npz.write_bytes(b"x")
    folder.end("complete")
    folder.succeed(1, "0" * 64)
    folder.images.mkdir()
    foreign = ["notes.txt", "images/000000.png", "log/rank-notes.jsonl", "ranks/best.json", "run.json.old", "lock"]
    for name in [*foreign, ".SUCCESS.json.node7.1.tmp", ".run.json.1.tmp", "ranks/.003.json.node7.1.tmp"]:
        (folder.path / name).write_bytes(b"x")
    folder.clear()
    left = {str(p.relative_to(folder.path)) for p in folder.path.rglob("*") if p.is_file()}
    assert left == set(foreign)
    assert not folder.npz.exists()
    assert folder.begin({"another": "run"}, {}) == 1  # foreign files do not stop one that was told to overwrite


def test_overwriting_an_empty_folder_and_none(folder):
    folder.clear()
    folder.begin(PROTOCOL, {})
    RankLog(folder, 1, 0, 1).state("done")
    folder.clear()
    assert list(folder.path.iterdir()) == []


# ----------------------------------------------------------------------------------------------------
# Writable


def test_a_folder_that_can_be_made_or_written_is_fine_and_left_as_it_was(folder):
    folder.check_writable()
    assert not folder.path.parent.exists()
    folder.path.mkdir(parents=True)
    folder.check_writable()
    assert list(folder.path.iterdir()) == []
    assert list(folder.path.parent.iterdir()) == [folder.path]


def test_files_where_folders_must_be(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "run.npz").mkdir()
    for path in ("file", "file/run", "file/deep/run", "run"):
        with pytest.raises(OSError, match="give another --sample-dir") as error:
            RunFolder(tmp_path / path).check_writable()
        assert str(tmp_path / path.partition("/")[0]) in str(error.value)
        assert "\n" not in str(error.value)


def test_a_folder_that_cannot_be_written(folder, monkeypatch):
    """Root may write anywhere, so the refusal of a read-only file system is made here."""
    folder.path.mkdir(parents=True)
    make = run_folder.tempfile.TemporaryFile

    def read_only(dir):
        if dir == folder.path:
            raise OSError(errno.EROFS, "Read-only file system")
        return make(dir=dir)

    monkeypatch.setattr(run_folder.tempfile, "TemporaryFile", read_only)
    with pytest.raises(OSError, match=r"Read-only file system.*--sample-dir") as error:
        folder.check_writable()
    assert str(folder.path) in str(error.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_parent_without_permission(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(OSError, match="cannot be written"):
        RunFolder(tmp_path / "run").check_writable()
    tmp_path.chmod(0o755)


# ----------------------------------------------------------------------------------------------------
# Lock


def hold(path, pipe):
    """A job that stays in the folder."""
    with RunFolder(path).lock():
        pipe.send("in")
        time.sleep(LONG)


@pytest.fixture
def holder(folder):
    """A living process that holds the lock."""
    here, there = FORK.Pipe()
    process = start(hold, folder.path, there)
    assert here.poll(LONG)
    yield process
    process.kill()
    process.join()


def lock_path(folder):
    return folder.path / "lock"


def edit_lock(folder, **fields):
    path = lock_path(folder)
    path.write_text(json.dumps({**read(path), **fields}))


def kill(process):
    process.kill()
    process.join()


def test_lock_is_there_while_it_is_held_and_goes_with_an_exception(folder):
    def job():
        with folder.lock() as notes:
            assert notes == []
            assert read(lock_path(folder))["pid"] == os.getpid()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        job()
    assert list(folder.path.iterdir()) == []


def test_a_second_job_is_refused_and_told_by_whom(folder, holder):
    with pytest.raises(RunLocked) as error, folder.lock():
        pass
    text = str(error.value)
    assert read(lock_path(folder))["host"] in text
    assert f"pid {holder.pid}" in text
    assert str(folder.path) in text
    assert "last sign of life" in text
    assert "wait for that job" in text
    assert "\n" not in text
    assert read(lock_path(folder))["pid"] == holder.pid


def test_a_living_process_of_this_machine_keeps_its_lock_however_silent(folder, holder):
    os.kill(holder.pid, signal.SIGSTOP)
    set_age(lock_path(folder), 10 * run_folder.STALE)
    with pytest.raises(RunLocked), folder.lock():
        pass


def test_lock_of_a_killed_job_is_taken_over_with_a_note(folder, holder):
    os.kill(holder.pid, signal.SIGKILL)
    until(lambda: Path(f"/proc/{holder.pid}/stat").read_text().split()[2] == "Z")  # dead, but nobody asked for the code
    with folder.lock() as notes:
        assert read(lock_path(folder))["pid"] == os.getpid()
        assert [p.name for p in folder.path.iterdir()] == ["lock"]
    (note,) = notes
    assert f"pid {holder.pid}" in note
    assert "has ended" in note
    holder.join()


def test_lock_of_a_killed_job_is_taken_over_after_its_pid_went(folder, holder):
    kill(holder)
    with folder.lock() as notes:
        assert "has ended" in notes[0]


def test_lock_whose_pid_is_another_process_by_now_is_taken_over(folder, holder):
    kill(holder)
    edit_lock(folder, pid=os.getpid())  # the dead holder's number is this process's, which started later
    with folder.lock() as notes:
        assert "another process" in notes[0]


def test_same_pid_in_another_container_or_boot_is_not_looked_up(folder, holder):
    kill(holder)
    edit_lock(folder, machine="same name, another boot")
    with pytest.raises(RunLocked), folder.lock():
        pass


def test_fresh_lock_of_another_host_is_refused(folder, holder, monkeypatch):
    kill(holder)
    edit_lock(folder, machine="elsewhere", host="node7", pid=os.getpid())
    set_age(lock_path(folder), run_folder.STALE - 60)
    monkeypatch.setattr(run_folder.time, "time", lambda: 4e9)  # this host's clock plays no part
    with pytest.raises(RunLocked, match="node7, pid ") as error, folder.lock():
        pass
    text = str(error.value)
    assert "last sign of life 120 s ago" in text
    assert "60 s from now" in text
    assert f"delete {lock_path(folder)}" in text


def test_stale_lock_of_another_host_is_taken_over(folder, holder, monkeypatch):
    kill(holder)
    edit_lock(folder, machine="elsewhere", host="node7")
    set_age(lock_path(folder), run_folder.STALE + 5)
    monkeypatch.setattr(run_folder, "BEAT", 0.01)
    with folder.lock() as notes:
        assert read(lock_path(folder))["pid"] == os.getpid()
    assert "node7" in notes[0]
    assert "no sign of life for 185 s" in notes[0]


def test_a_holder_that_shows_itself_after_a_jump_of_the_clock_keeps_its_lock(folder, holder, monkeypatch):
    kill(holder)
    edit_lock(folder, machine="elsewhere")
    set_age(lock_path(folder), 9999)
    monkeypatch.setattr(run_folder.time, "sleep", lambda seconds: lock_path(folder).touch())
    with pytest.raises(RunLocked, match="last sign of life 0 s ago"), folder.lock():
        pass


def test_time_that_went_back_is_no_sign_of_death(folder, holder):
    kill(holder)
    edit_lock(folder, machine="elsewhere")
    set_age(lock_path(folder), -9999)
    with pytest.raises(RunLocked, match="last sign of life 0 s ago"), folder.lock():
        pass


@pytest.mark.parametrize("content", [b"", b'{"token": "ab', b"{}", b'{"token": "../up", "pid": 1}', b"7"])
def test_an_unreadable_lock_is_judged_by_its_age(folder, content, monkeypatch):
    folder.path.mkdir(parents=True)
    lock_path(folder).write_bytes(content)
    with pytest.raises(RunLocked, match="unknown host"), folder.lock():
        pass
    set_age(lock_path(folder), run_folder.STALE + 5)
    monkeypatch.setattr(run_folder, "BEAT", 0.01)
    with folder.lock() as notes:
        assert len(notes) == 1


def test_lock_is_touched(folder, monkeypatch):
    monkeypatch.setattr(run_folder, "BEAT", 0.01)
    with folder.lock():
        set_age(lock_path(folder), 1000)
        before = lock_path(folder).stat().st_mtime_ns
        until(lambda: lock_path(folder).stat().st_mtime_ns > before + 500e9)


def test_a_lock_that_another_took_over_is_neither_touched_nor_removed(folder, monkeypatch):
    monkeypatch.setattr(run_folder, "BEAT", 0.01)
    with folder.lock():
        content = read(lock_path(folder))
        lock_path(folder).unlink()
        lock_path(folder).write_text(json.dumps({**content, "token": "another"}))
        set_age(lock_path(folder), 1000)
        before = lock_path(folder).stat().st_mtime_ns
        time.sleep(0.1)
    assert read(lock_path(folder))["token"] == "another"
    assert lock_path(folder).stat().st_mtime_ns == before


def test_a_folder_that_was_deleted_does_not_hide_the_end(folder):
    with folder.lock():
        lock_path(folder).unlink()
        folder.path.rmdir()


def test_a_full_disk_leaves_no_empty_lock(folder, monkeypatch):
    def full(file, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"), folder.lock():
            pass
    assert list(folder.path.iterdir()) == []


def race(path, judged, tried, results):
    """One of several that all find the lock stale before any of them acts on it."""
    why_dead, waited = run_folder._why_dead, []

    def slow(*args):
        why = why_dead(*args)
        if not waited:
            waited.append(judged.wait(LONG))
        return why

    run_folder._why_dead = slow
    try:
        with RunFolder(path).lock() as notes:
            results.scatter(("won", len(notes)))
            tried.wait(LONG)  # nobody leaves before all have tried
    except RunLocked:
        results.scatter(("refused", 0))
        tried.wait(LONG)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_of_several_that_find_a_stale_lock_exactly_one_wins(folder, holder, monkeypatch, elsewhere):
    kill(holder)
    if elsewhere:
        monkeypatch.setattr(run_folder, "BEAT", 0.01)
        edit_lock(folder, machine="elsewhere")
        set_age(lock_path(folder), run_folder.STALE + 5)
    stale = lock_path(folder).read_bytes(), lock_path(folder).stat().st_mtime_ns
    for _ in range(5):
        lock_path(folder).write_bytes(stale[0])
        os.utime(lock_path(folder), ns=(stale[1], stale[1]))
        judged, tried, results = FORK.Barrier(6), FORK.Barrier(6), FORK.Queue()
        racers = [start(race, folder.path, judged, tried, results) for _ in range(6)]
        found = sorted(results.get(timeout=LONG) for _ in racers)
        for racer in racers:
            racer.join(LONG)
        assert found == [("refused", 0)] * 5 + [("won", 1)]
        assert list(folder.path.iterdir()) == []


def test_one_that_died_while_taking_over_does_not_bar_the_way(folder, holder):
    def take(path):
        Path.unlink = lambda self, missing_ok=False: os.kill(os.getpid(), signal.SIGKILL)
        with RunFolder(path).lock():
            pass

    kill(holder)
    start(take, folder.path).join(LONG)
    assert len(list(folder.path.iterdir())) == 2  # the lock of the first, and that on this lock
    with folder.lock() as notes:
        assert f"pid {holder.pid}" in notes[0]
        assert [p.name for p in folder.path.iterdir()] == ["lock"]


# ----------------------------------------------------------------------------------------------------
# Ranks


def test_a_ranks_state_says_who_and_what(folder):
    folder.begin(PROTOCOL, {})
    with RankLog(folder, 1, 3, 8) as rank:
        state = read(folder.path / "ranks" / "003.json")
        assert {k: state[k] for k in ("session", "rank", "world", "state", "pid")} == {
            "session": 1,
            "rank": 3,
            "world": 8,
            "state": "running",
            "pid": os.getpid(),
        }
        rank.state("done")
    assert read(folder.state(3))["state"] == "done"


@pytest.mark.parametrize(
    ("error", "state"),
    [(RuntimeError("CUDA\nout of memory"), "failed"), (KeyboardInterrupt(), "interrupted"), (SystemExit(3), "failed")],
)
def test_an_exception_marks_the_rank(folder, error, state):
    folder.begin(PROTOCOL, {})
    with pytest.raises(type(error)), RankLog(folder, 1, 0, 1):
        raise error
    found = read(folder.state(0))
    assert found["state"] == state
    assert type(error).__name__ in found["message"]
    assert "\n" not in found["message"]


def test_an_exception_after_the_rank_was_marked_changes_nothing(folder):
    folder.begin(PROTOCOL, {})

    def job():
        with RankLog(folder, 1, 0, 1) as rank:
            rank.state("interrupted", "stopped by SIGTERM")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        job()
    assert read(folder.state(0))["message"] == "stopped by SIGTERM"


def test_an_exception_is_not_hidden_by_a_full_disk(folder, monkeypatch):
    folder.begin(PROTOCOL, {})

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    def job():
        with RankLog(folder, 1, 0, 1):
            monkeypatch.setattr(os, "replace", full)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        job()


def test_a_rank_shows_that_it_lives(folder, monkeypatch):
    monkeypatch.setattr(run_folder, "BEAT", 0.01)
    folder.begin(PROTOCOL, {})
    with RankLog(folder, 1, 0, 1):
        os.utime(folder.state(0), (0, 0))
        until(lambda: folder.state(0).stat().st_mtime_ns > 0)
    os.utime(folder.state(0), (0, 0))
    time.sleep(0.1)
    assert folder.state(0).stat().st_mtime_ns == 0  # not after its end


def test_a_rank_that_outlived_its_job_does_not_speak_for_the_next(folder):
    folder.begin(PROTOCOL, {})
    old = RankLog(folder, 1, 0, 1)
    old.state("running")
    assert not old.superseded()
    assert folder.begin(PROTOCOL, {}) == 2
    assert not folder.state(0).exists()  # of the session before
    RankLog(folder, 2, 0, 1).state("running")
    os.utime(folder.state(0), (0, 0))
    assert old.superseded()
    old._beat()
    old.state("failed")
    assert read(folder.state(0))["session"] == 2
    assert read(folder.state(0))["state"] == "running"
    assert folder.state(0).stat().st_mtime_ns == 0


class Clock:
    """Time that passes only in sleep, where events happen at their second."""

    def __init__(self, monkeypatch, events):
        self.time, self.events = 0.0, events
        monkeypatch.setattr(run_folder.time, "monotonic", lambda: self.time)
        monkeypatch.setattr(run_folder.time, "sleep", self.sleep)

    def sleep(self, seconds):
        self.time += seconds
        self.events.pop(round(self.time), lambda: None)()
        assert self.time < 10_000, "waited for ever"


def test_waiting_ends_with_a_line_for_each_rank_that_is_not_done(folder, monkeypatch):
    folder.begin(PROTOCOL, {})
    folder.begin(PROTOCOL, {})
    ranks = [RankLog(folder, 2, rank, 6) for rank in range(6)]
    ranks[0].state("done")
    ranks[1].state("failed", "CUDA out of memory")
    RankLog(folder, 1, 1, 6).append({"indices": [90], "seconds": 1.0})  # of the session before: not its last batch
    ranks[2].state("running")
    ranks[2].append({"indices": range(8), "seconds": 1.0})
    ranks[2].append({"indices": [8, 9, 10, 15], "seconds": 1.0})
    write_json(folder.state(3), {"session": 1, "state": "done"})  # rank 3 is not there, this is of the session before
    ranks[4].state("running")
    ranks[5].state("interrupted", "stopped by SIGTERM")
    beats = {t: lambda t=t: os.utime(folder.state(4), (t, t)) for t in range(50, 300, 50)}
    clock = Clock(monkeypatch, {**beats, 300: lambda: ranks[4].state("done")})
    problems = wait_for_ranks(folder, 2, 6, silence=120, poll=1)
    assert clock.time == 300
    host = read(folder.state(1))["host"]
    assert problems == [
        f"rank 1 ({host}, pid {os.getpid()}): failed: CUDA out of memory; last finished batch: none",
        f"rank 2 ({host}, pid {os.getpid()}): no sign of life for 300 s; last finished batch: images 8-10,15",
        "rank 3: never showed up for 300 s; last finished batch: none",
        f"rank 5 ({host}, pid {os.getpid()}): interrupted: stopped by SIGTERM; last finished batch: none",
    ]


def test_waiting_for_ranks_that_are_done_ends_at_once(folder, monkeypatch):
    folder.begin(PROTOCOL, {})
    for rank in range(2):
        RankLog(folder, 1, rank, 2).state("done")
    clock = Clock(monkeypatch, {})
    assert wait_for_ranks(folder, 1, 2) == []
    assert clock.time == 0


def test_a_silent_rank_that_comes_back_is_no_problem(folder, monkeypatch):
    folder.begin(PROTOCOL, {})
    ranks = [RankLog(folder, 1, rank, 2) for rank in range(2)]
    for rank in ranks:
        rank.state("running")
    beats = {t: lambda t=t: os.utime(folder.state(0), (t, t)) for t in range(60, 601, 60)}
    Clock(monkeypatch, {**beats, 200: lambda: ranks[1].state("done"), 600: lambda: ranks[0].state("done")})
    assert wait_for_ranks(folder, 1, 2) == []


def test_waiting_begins_its_own_count_and_ignores_what_files_say_of_time(folder, monkeypatch):
    folder.begin(PROTOCOL, {})
    RankLog(folder, 1, 0, 1).state("running")
    os.utime(folder.state(0), (0, 0))  # half a century old, by a clock that is wrong
    clock = Clock(monkeypatch, {})
    assert len(wait_for_ranks(folder, 1, 1, silence=120, poll=10)) == 1
    assert clock.time == 130


# ----------------------------------------------------------------------------------------------------
# Log and statistics


@pytest.mark.parametrize(
    ("indices", "text"), [([0, 1, 2, 5], "0-2,5"), ([7], "7"), ([3, 1, 2, 2], "1-3"), ([0, 2, 4], "0,2,4")]
)
def test_ranges(indices, text):
    assert format_ranges(indices) == text
    assert [i for first, last in parse_ranges(text) for i in range(first, last + 1)] == sorted(set(indices))


@pytest.mark.parametrize("text", ["", "a", "5-3", "1,,2", "-1", "1-2-3"])
def test_ranges_that_are_none(text):
    with pytest.raises(ValueError, match=r"."):
        parse_ranges(text)


def write_log(folder, session, rank, *entries):
    for indices, seconds, numbers in entries:
        RankLog(folder, session, rank, 2).append({"indices": indices, "seconds": seconds, **numbers})


def test_statistics_by_hand(folder):
    one = {"flops": 40, "uncached_flops": 100, "hits": 6, "evaluations": 10, "fallbacks": 1, "cache_bytes": 500}
    two = {"flops": 60, "uncached_flops": 200, "hits": 4, "evaluations": 20, "fallbacks": 0, "cache_bytes": 900}
    fault = {"index": 5, "label": 3, "seed": 0, "step": 7}
    write_log(folder, 1, 0, ([0, 1, 2, 3], 2.0, one))
    write_log(folder, 1, 1, ([4, 5], 3.0, {**two, "recomputed": [fault]}))
    found = statistics(folder, 8)
    ranks = found.pop("ranks")
    assert found == {
        "images": 6,
        "seconds": 5.0,
        "images_per_second": 6 / 5,
        "hit_rate": 10 / 30,
        "compute": 100 / 300,
        "saved_flops": 200,
        "fallbacks": 1,
        "cache_bytes": 900,
        "unaccounted": 2,
        "broken_lines": 0,
        "recomputed": [fault],
    }
    assert ranks.keys() == {"0", "1"}
    assert (ranks["0"]["images"], ranks["0"]["images_per_second"], ranks["0"]["hit_rate"]) == (4, 2.0, 0.6)
    assert (ranks["1"]["images"], ranks["1"]["compute"], ranks["1"]["cache_bytes"]) == (2, 0.3, 900)


def test_an_uncached_run_computes_all_and_hits_nothing(folder):
    write_log(folder, 1, 0, ([0, 1], 4.0, {}))
    found = statistics(folder, 2)
    assert (found["compute"], found["hit_rate"], found["saved_flops"], found["cache_bytes"]) == (1.0, 0.0, 0, 0)
    assert found["images_per_second"] == 0.5


def test_no_log_at_all(folder):
    found = statistics(folder, 3)
    assert (found["images"], found["unaccounted"], found["images_per_second"], found["ranks"]) == (0, 3, None, {})


def test_a_session_that_another_host_cannot_see(folder):
    folder.path.mkdir(parents=True)
    number = folder.begin(PROTOCOL, {})
    await_session(folder, number, patience=0)
    with pytest.raises(OSError, match=r"does not see session 2 in .*run\.json: give a --sample-dir on a"):
        await_session(folder, number + 1, patience=0)
    with pytest.raises(OSError, match="all nodes share"):
        await_session(RunFolder(folder.path / "elsewhere"), number, patience=0)


def test_a_session_that_another_host_sees_later(folder):
    def begin():
        time.sleep(0.1)
        folder.path.mkdir(parents=True)
        folder.begin(PROTOCOL, {})

    process = start(begin)
    await_session(folder, 1, patience=LONG, poll=0.01)
    process.join()


def test_an_image_that_was_made_twice_counts_as_the_last_session_made_it(folder):
    before = {"flops": 400, "uncached_flops": 400, "hits": 0, "evaluations": 40, "cache_bytes": 7}
    after = {"flops": 30, "uncached_flops": 100, "hits": 5, "evaluations": 10, "cache_bytes": 3}
    old, new = ({"index": 3, "label": 0, "seed": 0, "step": step} for step in (1, 2))
    write_log(folder, 2, 0, ([3], 1.0, {**after, "recomputed": [new]}))  # the later session's file comes first by name
    write_log(folder, 1, 1, ([0, 1, 2, 3], 8.0, {**before, "recomputed": [old]}))
    found = statistics(folder, 4)
    assert found["images"] == 4
    assert found["seconds"] == 8.0 * 3 / 4 + 1.0
    assert found["compute"] == (300 + 30) / (300 + 100)
    assert found["hit_rate"] == 5 / (30 + 10)
    assert found["recomputed"] == [new]
    assert found["unaccounted"] == 0


def test_a_line_without_an_image_that_counts_gives_nothing(folder):
    write_log(folder, 1, 0, ([0, 1], 8.0, {"cache_bytes": 99}), ([0, 1], 1.0, {"cache_bytes": 5}))
    found = statistics(folder, 2)
    assert (found["images"], found["seconds"], found["cache_bytes"]) == (2, 1.0, 5)


def test_images_beyond_the_count_do_not_count(folder):
    write_log(folder, 1, 0, ([0, 1, 2, 3], 4.0, {"recomputed": [{"index": 3, "label": 0, "seed": 0, "step": 1}]}))
    found = statistics(folder, 1)
    assert (found["images"], found["seconds"], found["unaccounted"], found["recomputed"]) == (1, 1.0, 0, [])


def test_a_half_line_is_closed_and_costs_no_other(folder):
    write_log(folder, 1, 0, ([0], 1.0, {}))
    whole = folder.log(0).read_bytes()
    folder.log(0).write_bytes(whole + b'{"session": 1, "rank": 0, "indi')
    write_log(folder, 2, 0, ([1], 1.0, {}), ([2], 1.0, {}))
    lines = folder.log(0).read_bytes().split(b"\n")
    assert len(lines) == 5
    assert lines[1] == b'{"session": 1, "rank": 0, "indi'
    assert lines[4] == b""
    found = statistics(folder, 4)
    assert (found["images"], found["broken_lines"], found["unaccounted"]) == (3, 1, 1)


def test_a_last_line_that_lacks_only_its_end_counts(folder):
    write_log(folder, 1, 0, ([0], 1.0, {}))
    folder.log(0).write_bytes(folder.log(0).read_bytes().rstrip(b"\n"))
    write_log(folder, 2, 0, ([1], 1.0, {}))
    found = statistics(folder, 2)
    assert (found["images"], found["broken_lines"]) == (2, 0)


@pytest.mark.parametrize(
    "line",
    [
        "\0\0\0\0",
        "[]",
        "7",
        "{}",
        '{"session": 1, "rank": 0, "indices": "1"}',
        '{"session": 1, "rank": 0, "seconds": 1, "indices": [1]}',
        '{"session": 1, "rank": 0, "seconds": 1, "indices": "9-1"}',
        '{"session": 1, "rank": 0, "seconds": null, "indices": "1"}',
        '{"session": 1, "rank": 0, "seconds": 1, "indices": "1", "flops": "many"}',
        '{"session": 1, "rank": 0, "seconds": 1, "indices": "1", "recomputed": [5]}',
    ],
)
def test_broken_lines_are_counted_and_skipped(folder, line):
    folder.log(0).parent.mkdir(parents=True)
    folder.log(0).write_text(line + "\n")
    write_log(folder, 1, 0, ([0], 1.0, {}))
    found = statistics(folder, 2)
    assert (found["images"], found["broken_lines"]) == (1, 1)


def test_a_number_that_json_does_not_have_writes_nothing(folder):
    with pytest.raises(ValueError, match="JSON"):
        write_log(folder, 1, 0, ([0], float("nan"), {}))
    assert not folder.log(0).exists()


def test_lines_of_a_rank_that_is_killed_again_and_again_are_whole(folder):
    def work(first):
        rank = RankLog(folder, 1, 0, 1)
        for index in range(first, 10**6):
            rank.append({"indices": [index], "seconds": 1.0, "note": "x" * 3000})

    first = 0
    for _ in range(3):
        process = start(work, first)
        until(lambda: folder.log(0).exists() and statistics(folder, 10**6)["images"] > first)  # noqa: B023
        kill(process)
        found = statistics(folder, 10**6)
        assert found["broken_lines"] <= 3
        first = found["images"]
    write_log(folder, 2, 0, ([first], 1.0, {}))
    assert statistics(folder, 10**6)["images"] == first + 1


# ----------------------------------------------------------------------------------------------------
# Success


@pytest.fixture
def finished(folder):
    """A run of 7 images that ended in success."""
    folder.begin(PROTOCOL, {})
    folder.npz.write_bytes(b"pixels")
    folder.end("complete", {"images": 7})
    folder.succeed(7, run_folder.file_sha256(folder.npz))
    return folder


def test_success_is_believed_while_everything_fits(finished):
    again, run = RunFolder(finished.path), run_id(PROTOCOL)
    assert again.succeeded(run, 7)
    assert again.succeeded(run, 7, verify=True)
    assert not again.succeeded(run, 8)
    assert not again.succeeded(run_id({"another": "run"}), 7)
    marker = read(finished.success_json)
    assert (marker["count"], marker["npz_bytes"], marker["run_id"]) == (7, 6, run)


def test_success_is_over_when_a_session_begins(finished):
    finished.begin(PROTOCOL, {})
    assert not finished.success_json.exists()
    assert not finished.succeeded(run_id(PROTOCOL), 7)


def test_success_needs_the_npz_that_it_speaks_of(finished):
    run = run_id(PROTOCOL)
    finished.npz.write_bytes(b"pixelS")
    assert finished.succeeded(run, 7)  # only the size is looked at
    assert not finished.succeeded(run, 7, verify=True)
    finished.npz.write_bytes(b"pixel")
    assert not finished.succeeded(run, 7)
    finished.npz.unlink()
    assert not finished.succeeded(run, 7)
    assert finished.succeeded(run, 7, npz=False)


def test_a_run_is_marked_later_without_a_session(finished):
    finished.npz.write_bytes(b"packed again")
    again = RunFolder(finished.path)
    assert again.open()["protocol"] == PROTOCOL
    again.succeed(7, run_folder.file_sha256(finished.npz))
    assert again.succeeded(run_id(PROTOCOL), 7, verify=True)


def test_opening_what_is_no_run_is_refused(folder):
    with pytest.raises(RunMismatch, match="no run.json"):
        folder.open()
    folder.begin(PROTOCOL, {})
    folder.run_json.write_bytes(b"{")
    with pytest.raises(RunMismatch, match="damaged"):
        folder.open()


@pytest.mark.parametrize("classes", [10, 0])
def test_labels_are_kept_for_packing_later(folder, classes):
    labels = np.array([3, 1, 4, 1], dtype=np.int64) if classes else None
    folder.begin({"model": {"num_classes": classes}}, {})
    folder.keep_labels(labels)
    again = RunFolder(folder.path)
    again.open()
    found = again.read_labels(3)
    if classes:
        assert found.dtype == np.int64
        assert found.tolist() == [3, 1, 4]
        again.labels_npy.write_bytes(b"x")
        with pytest.raises(RunMismatch, match="labels.npy cannot be read"):
            again.read_labels(3)
        folder.clear()
        assert list(folder.path.iterdir()) == []
    else:
        assert found is None
        assert not again.labels_npy.exists()


def test_success_without_an_npz_is_none_with_one(folder):
    folder.begin(PROTOCOL, {})
    folder.end("complete")
    folder.succeed(7, None)
    folder.npz.write_bytes(b"pixels")
    assert folder.succeeded(run_id(PROTOCOL), 7, npz=False)
    assert not folder.succeeded(run_id(PROTOCOL), 7)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"schema": 1, "run_id'])
def test_a_damaged_marker_is_no_success(finished, content):
    finished.success_json.write_bytes(content)
    assert not finished.succeeded(run_id(PROTOCOL), 7)


def test_a_record_that_changed_after_the_marker_is_no_success(finished):
    finished.run_json.write_text(finished.run_json.read_text() + " ")
    assert not finished.succeeded(run_id(PROTOCOL), 7, npz=False)
    finished.run_json.unlink()
    assert not finished.succeeded(run_id(PROTOCOL), 7, npz=False)


def test_a_marker_that_cannot_be_written_is_not_there(folder, monkeypatch):
    folder.begin(PROTOCOL, {})
    folder.end("complete")

    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        folder.succeed(7, None)
    assert [p.name for p in folder.path.iterdir()] == ["run.json"]
