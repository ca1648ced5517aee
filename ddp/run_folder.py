"""What a run of sample_ddp.py keeps beside its images: record, lock, signs of life, statistics, success marker.

    samples/<name>/run.json              protocol, sessions (one for each start), statistics
    samples/<name>/labels.npy            of all images, not there for an unconditional model
    samples/<name>/images/               see image_store.py
    samples/<name>/log/rank-003.jsonl    a line for each batch that the rank finished, over all sessions
    samples/<name>/ranks/003.json        the rank's state in the current session; its time is the sign of life
    samples/<name>/lock                  the job that works here
    samples/<name>/SUCCESS.json          written last
    samples/<name>.npz

One process, which holds the lock, writes everything but log/ and ranks/, where each rank has files of its own. Ranks
are told of each other by these files alone: none waits in a collective.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from adacorr.files import existing_parent, write_json, written_whole
from download import file_sha256

SCHEMA = 1  # of run.json and SUCCESS.json
BEAT = 15.0  # seconds between two signs of life
STALE = 180.0  # seconds without one after which another host's lock is up for taking; network file systems lag up to 60
WAYS_OUT = "give another --sample-dir, or --overwrite to start it anew"

RECORD_FILES = r"run\.json|labels\.npy|\.(run\.json|labels\.npy)\..*\.tmp"
RANK_FILES = r"\d{3,}\.json|\.\d{3,}\.json\..*\.tmp"  # of ranks/, temporaries included


class RunMismatch(ValueError):
    """The folder holds another run, or what cannot be told to be this one."""


class RunLocked(OSError):
    """Another job works in the folder."""


# ------------------------------------------------------------------------------------------------ protocol


def canonical(value: Any) -> str:
    """JSON text that depends on the value alone, not on the order of keys; ValueError for nan and infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def run_id(protocol: dict[str, Any]) -> str:
    """16 hexadecimal digits that name a protocol."""
    return hashlib.sha256(canonical(protocol).encode()).hexdigest()[:16]


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Every field that differs, such as "sampler.num_steps: 50 in the folder, 20 asked"; empty if the run ids agree."""
    return _differences(json.loads(canonical(before)), json.loads(canonical(now)), "")


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str) -> list[str]:
    lines = []
    for key in sorted(before.keys() | now.keys()):
        name = prefix + key
        if key not in now:
            lines.append(f"{name}: {canonical(before[key])} in the folder, not asked")
        elif key not in before:
            lines.append(f"{name}: not in the folder, {canonical(now[key])} asked")
        elif isinstance(before[key], dict) and isinstance(now[key], dict):
            lines += _differences(before[key], now[key], f"{name}.")
        elif canonical(before[key]) != canonical(now[key]):  # as the run id: 1, 1.0 and true differ
            lines.append(f"{name}: {canonical(before[key])} in the folder, {canonical(now[key])} asked")
    return lines


# -------------------------------------------------------------------------------------------------- folder


class RunFolder:
    """The folder of one run. Whoever calls begin, end, succeed or clear must hold the lock."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.images = self.path / "images"
        self.npz = self.path.with_name(f"{self.path.name}.npz")  # names hold dots, which with_suffix would cut at
        self.record: dict[str, Any] = {}  # run.json of the session that begin opened
        self._began = 0.0

    @property
    def run_json(self) -> Path:
        return self.path / "run.json"

    @property
    def success_json(self) -> Path:
        return self.path / "SUCCESS.json"

    @property
    def labels_npy(self) -> Path:
        return self.path / "labels.npy"

    def log(self, rank: int) -> Path:
        return self.path / "log" / f"rank-{rank:03d}.jsonl"

    def state(self, rank: int) -> Path:
        return self.path / "ranks" / f"{rank:03d}.json"

    def check_writable(self) -> None:
        """OSError unless the run folder and its .npz can be written."""
        if self.npz.is_dir():
            raise OSError(f"{self.npz} is a folder, where the .npz must go: give another --sample-dir")
        if self.path.exists() and not self.path.is_dir():
            raise OSError(f"{self.path} is a file, not a folder: give another --sample-dir")
        parent = existing_parent(self.path)
        if not parent.is_dir():
            raise OSError(f"{self.path}: {parent} is a file, not a folder: give another --sample-dir")
        for folder in (parent, self.path) if self.path.exists() else (parent,):
            try:  # by doing it: os.access says yes to root even where a quota or the server says no
                with tempfile.TemporaryFile(dir=folder):
                    pass
            except OSError as error:
                raise OSError(
                    f"{folder} cannot be written ({error.strerror}): give another --sample-dir or free it"
                ) from error

    def check(self, protocol: dict[str, Any]) -> dict[str, Any] | None:
        """The record if the folder holds this run, None if it holds nothing; RunMismatch with every field that differs.

        Files without a record are refused, as is a record that is damaged, altered or of a newer version.
        """
        record = self._read_record(protocol)
        if record is None:
            self._check_empty()
        return record

    def _read_record(self, protocol: dict[str, Any] | None) -> dict[str, Any] | None:
        """The record, held to a protocol if there is one; None where there is no run.json."""
        try:
            record = json.loads(self.run_json.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError as error:
            raise RunMismatch(f"{self.run_json} is damaged ({error}); {WAYS_OUT}") from None
        schema = record.get("schema") if isinstance(record, dict) else None
        if isinstance(schema, int) and schema > SCHEMA:
            raise RunMismatch(
                f"{self.run_json} has schema {schema}, this version knows {SCHEMA}: update it, or {WAYS_OUT}"
            )
        try:
            whole = schema == SCHEMA and record["run_id"] == run_id(record["protocol"])
            whole = whole and all(isinstance(session["session"], int) for session in record["sessions"])
        except (KeyError, TypeError):
            whole = False
        if not whole:
            raise RunMismatch(f"{self.run_json} is damaged: its fields do not fit together; {WAYS_OUT}")
        if protocol is not None and (lines := differences(record["protocol"], protocol)):
            raise RunMismatch(f"{self.path} holds another run: {'; '.join(lines)}; {WAYS_OUT}")
        return record

    def _check_empty(self) -> None:
        """RunMismatch if there is anything but what a start leaves that was killed before run.json."""
        found = []
        for path in sorted(self.path.iterdir()) if self.path.is_dir() else ():
            leftover = re.fullmatch(r"lock(\.\w+)?|\.run\.json\..*\.tmp|\.nfs.*", path.name) is not None
            hollow = path.name in ("images", "log", "ranks") and path.is_dir() and not any(path.iterdir())
            if not leftover and not hollow:
                found.append(path)
        found += [self.npz] if self.npz.exists() else []
        if found:
            raise RunMismatch(
                f"{self.path} has no run.json but {len(found)} files or folders, such as {found[0]}, that may be "
                "another run's; give another --sample-dir, or --overwrite, which leaves what is no run's"
            )

    def open(self) -> dict[str, Any]:
        """The record of whatever run the folder holds; RunMismatch if there is none or it cannot be read."""
        record = self._read_record(None)
        if record is None or not record["sessions"]:
            raise RunMismatch(f"{self.path} is no run folder: it has no run.json with a session")
        self.record = record
        return record

    def keep_labels(self, labels: np.ndarray | None) -> None:
        """Write the labels (N,) of the run's images, for packing them later; None for an unconditional model."""
        if labels is not None:
            with written_whole(self.labels_npy) as temporary, open(temporary, "wb") as file:
                np.save(file, labels)

    def read_labels(self, count: int) -> np.ndarray | None:
        """(count,) int64, or None for an unconditional model; ValueError if they were lost."""
        if not self.record["protocol"]["model"]["num_classes"]:
            return None
        try:
            labels = np.load(self.labels_npy)
        except (OSError, ValueError) as error:
            raise RunMismatch(f"{self.labels_npy} cannot be read ({error}): run the command of the run again") from None
        if len(labels) < count:
            raise RunMismatch(f"{self.labels_npy} has {len(labels)} labels for {count} images: run the command again")
        return labels[:count]

    def begin(self, protocol: dict[str, Any], session: dict[str, Any]) -> int:
        """Open a session in run.json and return its number, from 1; RunMismatch if that is another run's.

        `session` describes this start: number of images, processes, batch size, versions. A session that is still
        "running" becomes "killed": its process had no time to say so. The success marker goes, because the run is no
        longer finished.
        """
        record = self._read_record(protocol) or {
            "schema": SCHEMA,
            "run_id": run_id(protocol),
            "protocol": protocol,
            "sessions": [],
            "statistics": None,
        }
        for earlier in record["sessions"]:
            if earlier.get("state") == "running":
                earlier["state"] = "killed"
        number = max((earlier["session"] for earlier in record["sessions"]), default=0) + 1
        opened = {"session": number, "state": "running", "started": now(), "ended": None, "seconds": None}
        record["sessions"].append({**opened, **session})
        self._remove(("", r"SUCCESS\.json|\.(SUCCESS|run)\.json\..*\.tmp"), ("ranks", RANK_FILES))
        write_json(self.run_json, record)
        self.record, self._began = record, time.monotonic()
        return number

    def end(self, state: str, statistics: dict[str, Any] | None = None, **details: Any) -> None:
        """Close the session as "complete", "interrupted", "failed" or "incomplete", with the run's statistics.

        RunLocked if another job has begun a session since, which it may after this one was asleep for long.
        """
        opened = self.record["sessions"][-1]
        if later_session(self, opened["session"]):
            raise RunLocked(f"{self.path} was taken over by another job while this one showed no sign of life")
        opened |= {"state": state, "ended": now(), "seconds": round(time.monotonic() - self._began, 3), **details}
        if statistics is not None:
            self.record["statistics"] = statistics
        write_json(self.run_json, self.record)

    def clear(self) -> None:
        """Delete the run's record, logs, states, marker and .npz; the images are the image store's, others stay.

        The marker goes first and the record last: killed in between, the folder still says whose it is.
        """
        self._remove(("", r"SUCCESS\.json|\.SUCCESS\.json\..*\.tmp"))
        if self.npz.is_file():
            self.npz.unlink()
        self._remove(("log", r"rank-\d{3,}\.jsonl"), ("ranks", RANK_FILES), ("", RECORD_FILES))
        for name in ("log", "ranks"):
            with suppress(OSError):  # not there, or not empty
                (self.path / name).rmdir()

    def _remove(self, *groups: tuple[str, str]) -> None:
        """Delete the files of each (subfolder, pattern of the whole name)."""
        for folder, pattern in groups:
            for path in (self.path / folder).glob("*"):
                if re.fullmatch(pattern, path.name) and not path.is_dir():
                    path.unlink(missing_ok=True)

    def succeed(self, count: int, npz_sha256: str | None) -> None:
        """Write SUCCESS.json: all `count` images are there, and in the .npz of that digest if there is one.

        After `end`: the marker holds for the run.json that it finds.
        """
        marker = {"schema": SCHEMA, "run_id": self.record["run_id"], "count": count, "finished": now()}
        if npz_sha256 is not None:
            marker |= {"npz": self.npz.name, "npz_bytes": self.npz.stat().st_size, "npz_sha256": npz_sha256}
        write_json(self.success_json, {**marker, "run_json_sha256": file_sha256(self.run_json)})

    def succeeded(self, run: str, count: int, *, npz: bool = True, verify: bool = False) -> bool:
        """Whether SUCCESS.json is there and fits: run id, number of images, run.json, and with `npz` the .npz.

        The .npz is held to its size, with `verify` to its sha256, for which it is read.
        """
        try:
            marker = json.loads(self.success_json.read_bytes())
            fits = [marker["schema"], marker["run_id"], marker["count"]] == [SCHEMA, run, count]
            fits = fits and marker["run_json_sha256"] == file_sha256(self.run_json)
            if npz:
                fits = fits and marker["npz_bytes"] == self.npz.stat().st_size
                fits = fits and (not verify or marker["npz_sha256"] == file_sha256(self.npz))
            return fits
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # one of them is gone, or the marker is damaged
            return False

    @contextmanager
    def lock(self) -> Iterator[list[str]]:
        """Keep other jobs out of the folder, which is made if need be; RunLocked if one is in it.

        Yields notes: that the lock of a dead process was taken over. The lock goes at the end, also after an exception,
        unless another job has it by then.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = _acquire(self.path / "lock")
        try:
            for guard in self.path.glob("lock.*"):  # of one that died while it took over a lock, which is now gone
                guard.unlink(missing_ok=True)
            with closing(Pulse(lambda: os.utime(lock.file))):  # by descriptor: the path may be another's by now
                yield [lock.note] if lock.note else []
        finally:
            lock.release()


def now() -> str:
    """The time for people, UTC; no duration is ever taken from it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


class Pulse:
    """A thread that calls `beat` every BEAT seconds until `close`. A beat that fails is left out."""

    def __init__(self, beat: Callable[[], None]):
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(beat,), daemon=True)
        self._thread.start()

    def _run(self, beat: Callable[[], None]) -> None:
        while not self._stopping.wait(BEAT):
            with suppress(OSError):  # a hiccup of the file system; only many in a row look like death
                beat()

    def close(self) -> None:
        self._stopping.set()
        self._thread.join()


# ---------------------------------------------------------------------------------------------------- lock


@dataclass(frozen=True)
class Holder:
    """Who made a lock file. `process` is when the pid started, in clock ticks since the boot, "" where not known."""

    token: str
    host: str
    machine: str
    pid: int
    process: str
    since: str

    def __str__(self) -> str:
        return f"{self.host}, pid {self.pid}, since {self.since}"


UNKNOWN = Holder("unreadable", "unknown host", "", 0, "", "unknown time")  # killed between making and filling the file


@dataclass(frozen=True)
class Lock:
    """A lock file that this process made."""

    path: Path
    token: str
    file: int  # descriptor
    note: str  # whose lock was taken over and why, or ""

    def release(self) -> None:
        os.close(self.file)
        found = _read_lock(self.path)
        if found is not None and found[0].token == self.token:  # else it was taken over
            self.path.unlink(missing_ok=True)


def _acquire(path: Path) -> Lock:
    """Make the lock file, after removing that of a dead holder; RunLocked if the holder lives.

    Who removes a lock first locks that very lock, under a name made of its token, and looks again. So of several that
    find it stale one removes it, and none removes what another has made in its place.
    """
    while True:
        with suppress(FileExistsError):
            return _create(path, "")
        found = _read_lock(path)
        if found is None:  # released in between
            continue
        holder, touched = found
        why = _why_dead(path, holder, touched)
        if not why:
            raise RunLocked(_refusal(path, holder, touched))
        guard = _acquire(path.with_name(f"{path.name}.{holder.token}"))
        try:
            if _read_lock(path) == found:
                path.unlink()
                with suppress(FileExistsError):  # of a third job that came in between
                    return _create(path, f"took over {path.parent} from {holder}: {why}")
        finally:
            guard.release()


def _refusal(path: Path, holder: Holder, touched: int) -> str:
    age = _age(path.parent, touched)
    advice = "wait for that job, end it, or give another --sample-dir"
    if holder.machine != _machine():  # here it would have been found dead
        advice += f"; if it was killed, run this again {max(STALE - age, 0):.0f} s from now, or delete {path}"
    return f"{path.parent} is in use by {holder}, last sign of life {age:.0f} s ago: {advice}"


def _create(path: Path, note: str) -> Lock:
    token = uuid.uuid4().hex
    holder = Holder(token, socket.gethostname(), _machine(), os.getpid(), _process(os.getpid()) or "", now())
    file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    try:
        os.write(file, json.dumps(asdict(holder)).encode())
    except BaseException:
        os.close(file)
        path.unlink(missing_ok=True)
        raise
    return Lock(path, token, file, note)


def _read_lock(path: Path) -> tuple[Holder, int] | None:
    """Holder and time of the last sign of life (ns, the file system's clock), both of the same file; None if gone."""
    try:
        with open(path, "rb") as file:
            touched, content = os.fstat(file.fileno()).st_mtime_ns, file.read()
    except FileNotFoundError:
        return None
    try:
        holder = Holder(**json.loads(content))
        return (holder if holder.token.isalnum() and isinstance(holder.pid, int) else UNKNOWN), touched
    except (ValueError, TypeError, AttributeError):
        return UNKNOWN, touched


def _why_dead(path: Path, holder: Holder, touched: int) -> str:
    """What shows that a lock's holder is dead, "" if nothing does.

    A process of this machine is looked up, and while it lives the lock is its own, even if it is stopped.
    """
    if holder.machine == _machine():
        process = _process(holder.pid)
        if process is None:
            return "that process has ended"
        reused = process and holder.process and process != holder.process
        return "its pid is another process's by now" if reused else ""
    age = _age(path.parent, touched)
    if age <= STALE:
        return ""
    # The clock of the file system may have jumped just now. A living holder shows itself within a beat, and the lock is
    # removed only as it was read.
    time.sleep(BEAT * 4 / 3)
    return f"no sign of life for {age:.0f} s"


def _age(folder: Path, touched: int) -> float:
    """Seconds since a file's time, by the clock that stamped it: clocks of hosts differ."""
    with tempfile.TemporaryFile(dir=folder) as probe:
        os.utime(probe.fileno())
        return max(os.fstat(probe.fileno()).st_mtime_ns - touched, 0) / 1e9


def _machine() -> str:
    """Names what a pid is unique in: one boot of one machine and, for containers, the pid namespace."""
    parts = [socket.gethostname()]
    with suppress(OSError):  # systems without /proc
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def _process(pid: int) -> str | None:
    """When a living process started, in clock ticks since the boot: "" where not to be had, None for a dead one."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # another user's
        pass
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # the name before may hold anything
    except OSError:
        return ""
    return None if fields[0] in "ZX" else fields[19]  # killed, but its parent has not asked for the exit code yet


# --------------------------------------------------------------------------------------------------- ranks


class RankLog:
    """Log, state and sign of life of one process in one session; a context that marks an exception as "failed"."""

    def __init__(self, folder: RunFolder, session: int, rank: int, world: int):
        self.folder, self.session, self.rank, self.world = folder, session, rank, world
        self._state = ""

    def __enter__(self) -> RankLog:
        self.state("running")
        self._pulse = Pulse(self._beat)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        self._pulse.close()
        if error is not None and self._state == "running":
            state = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            with suppress(OSError):  # the exception matters more than that it could not be told
                self.state(state, " ".join(f"{kind.__name__}: {error}".split()))

    def state(self, state: str, message: str = "") -> None:
        """Say that the rank is "running", "done", "failed" or "interrupted"; a later session's file is left alone."""
        self._state = state
        if not self.superseded():
            content = {"session": self.session, "rank": self.rank, "world": self.world, "state": state}
            content |= {"message": message, "host": socket.gethostname(), "pid": os.getpid(), "time": now()}
            write_json(self.folder.state(self.rank), content)

    def superseded(self) -> bool:
        """Whether a later session has begun: this process outlived its job on another host and should stop."""
        return later_session(self.folder, self.session)

    def _beat(self) -> None:
        if not self.superseded():
            os.utime(self.folder.state(self.rank))

    def append(self, entry: dict[str, Any]) -> None:
        """A line of the log for a finished batch; ValueError for numbers that JSON does not have.

        The entry has `indices` of the images and `seconds`; with a cache flops, uncached_flops, hits, evaluations and
        fallbacks, summed over the batch, and cache_bytes; and `recomputed`, the images that were made again without the
        cache: {"index", "label", "seed", "step"}.
        """
        entry = {"session": self.session, "rank": self.rank, **entry, "indices": format_ranges(entry["indices"])}
        line = json.dumps(entry, allow_nan=False).encode() + b"\n"
        path = self.folder.log(self.rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a kill or a full disk left half a line, which must not spoil this one
                    line = b"\n" + line
            file.write(line)


def await_session(folder: RunFolder, session: int, *, patience: float = 90.0, poll: float = 0.5) -> None:
    """Return once run.json has the session; OSError if it has not after `patience` seconds.

    A network file system may show a new file of another host only after a minute.
    """
    deadline = time.monotonic() + patience
    while session not in _sessions(folder):
        if time.monotonic() >= deadline:
            raise OSError(
                f"{socket.gethostname()} does not see session {session} in {folder.run_json.absolute()}: give a "
                "--sample-dir on a file system that all nodes share"
            )
        time.sleep(poll)


def later_session(folder: RunFolder, session: int) -> bool:
    """Whether run.json has a session after this one; False if that cannot be told at the moment."""
    return any(other > session for other in _sessions(folder))


def _sessions(folder: RunFolder) -> list[int]:
    """Numbers of the sessions in run.json; none if it cannot be read at the moment."""
    try:
        return [int(session["session"]) for session in json.loads(folder.run_json.read_bytes())["sessions"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def format_ranges(indices: Iterable[int]) -> str:
    """The indices 0, 1, 2, 5 as "0-2,5": ascending, each once."""
    ranges: list[list[int]] = []
    for index in sorted({int(i) for i in indices}):
        if ranges and index == ranges[-1][1] + 1:
            ranges[-1][1] = index
        else:
            ranges.append([index, index])
    return ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in ranges)


def parse_ranges(text: str) -> list[tuple[int, int]]:
    """First and last of each range of "0-2,5", [(0, 2), (5, 5)]; ValueError if it reads otherwise."""
    ranges = []
    for item in text.split(","):
        first, _, last = item.partition("-")
        ranges.append((int(first), int(last or first)))
        if ranges[-1][0] > ranges[-1][1]:
            raise ValueError(f"range {item} descends")
    return ranges


def wait_for_ranks(
    folder: RunFolder, session: int, world: int, *, silence: float = 120.0, poll: float = 1.0
) -> list[str]:
    """Wait until no rank of the session is at work; the caller must have set its own rank's state.

    Returns a line for each rank that is not done: failed or interrupted with its message, without a sign of life for
    `silence` seconds, or never seen in that time. Polls every `poll` seconds and times by this process's monotonic
    clock when a sign of life was seen to change.
    """
    seen: dict[int, tuple[int | None, float]] = {rank: (None, time.monotonic()) for rank in range(world)}
    while True:
        faults, working = [], False
        for rank in range(world):
            state, touched = _read_state(folder, session, rank)
            if touched != seen[rank][0]:
                seen[rank] = touched, time.monotonic()
            quiet = time.monotonic() - seen[rank][1]
            if state.get("state") == "done":
                continue
            if state.get("state") in ("failed", "interrupted"):
                faults.append((rank, state, f"{state['state']}: {state['message'] or 'no reason given'}"))
            elif quiet > silence:
                faults.append((rank, state, f"{'no sign of life' if state else 'never showed up'} for {quiet:.0f} s"))
            else:
                working = True
        if not working:
            return [_describe(folder, session, *fault) for fault in faults]
        time.sleep(poll)


def _read_state(folder: RunFolder, session: int, rank: int) -> tuple[dict[str, Any], int | None]:
    """A rank's state in the session and the time of its last sign of life in ns; ({}, None) if there is none."""
    try:
        with open(folder.state(rank), "rb") as file:  # opening asks the server, where a mere stat may be a minute old
            touched, state = os.fstat(file.fileno()).st_mtime_ns, json.load(file)
    except (OSError, ValueError):
        return {}, None
    known = isinstance(state, dict) and state.get("session") == session
    return (state, touched) if known else ({}, None)


def _describe(folder: RunFolder, session: int, rank: int, state: dict[str, Any], what: str) -> str:
    where = f" ({state['host']}, pid {state['pid']})" if state else ""
    lines = [line for line in _read_log(folder.log(rank))[0] if line.session == session]
    last = f"images {lines[-1].indices}" if lines else "none"
    return f"rank {rank}{where}: {what}; last finished batch: {last}"


# ---------------------------------------------------------------------------------------------- statistics


COUNTS = ("flops", "uncached_flops", "hits", "evaluations", "fallbacks", "cache_bytes")


@dataclass(frozen=True)
class Line:
    """One finished batch of a log. All from flops on is 0 for an uncached run."""

    session: int
    rank: int
    indices: str
    seconds: float
    flops: int
    uncached_flops: int
    hits: int
    evaluations: int
    fallbacks: int
    cache_bytes: int
    recomputed: list[dict[str, Any]]

    @property
    def ranges(self) -> list[tuple[int, int]]:
        return parse_ranges(self.indices)

    @property
    def images(self) -> int:
        return sum(last - first + 1 for first, last in self.ranges)


def _read_log(path: Path) -> tuple[list[Line], int]:
    """The lines of a rank's log and how many were broken."""
    lines, broken = [], 0
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    for text in filter(bytes.strip, content.split(b"\n")):
        try:
            entry = json.loads(text)
            counts = [int(entry.get(key, 0)) for key in COUNTS]
            again = [{**image, "index": int(image["index"])} for image in entry.get("recomputed", [])]
            session, rank, indices = int(entry["session"]), int(entry["rank"]), str(entry["indices"])
            parse_ranges(indices)
            lines.append(Line(session, rank, indices, float(entry["seconds"]), *counts, again))
        except (ValueError, KeyError, TypeError, AttributeError):
            broken += 1
    return lines, broken


def statistics(folder: RunFolder, count: int) -> dict[str, Any]:
    """What the logs of all sessions say of images 0..count-1, in all and by rank.

    Seconds are summed over ranks, so `images_per_second` is that of one process. Compute is FLOPs over those of the
    uncached run, the hit rate is hits over evaluations. An image that was made twice counts as the later session made
    it; of a line that counts in part, the numbers count in proportion. `unaccounted` images have no line: they are
    missing, or their process was killed before it wrote one.
    """
    lines, broken = [], 0
    for path in sorted((folder.path / "log").glob("rank-*.jsonl")):
        found, damaged = _read_log(path)
        lines, broken = lines + found, broken + damaged
    lines.sort(key=lambda line: (line.session, line.rank))  # stable: within both, as written
    maker = np.full(count, -1)
    for number, line in enumerate(lines):
        for first, last in line.ranges:
            maker[first : last + 1] = number
    kept = np.bincount(maker[maker >= 0], minlength=len(lines)).tolist()
    counted = [(line, images) for line, images in zip(lines, kept, strict=True) if images]
    again = [
        image
        for number, line in enumerate(lines)
        for image in line.recomputed
        if 0 <= image["index"] < count and maker[image["index"]] == number
    ]
    ranks = sorted({line.rank for line, _ in counted})
    return {
        **_totals(counted),
        "unaccounted": count - sum(kept),
        "broken_lines": broken,
        "recomputed": sorted(again, key=lambda image: image["index"]),
        "ranks": {f"{rank}": _totals([(line, n) for line, n in counted if line.rank == rank]) for rank in ranks},
    }


def _totals(counted: list[tuple[Line, int]]) -> dict[str, Any]:
    """Sums over (line, images of it that count)."""

    def total(name: str) -> float:
        return sum(getattr(line, name) * images / line.images for line, images in counted)

    images, seconds = sum(images for _, images in counted), total("seconds")
    flops, uncached, evaluations = total("flops"), total("uncached_flops"), total("evaluations")
    return {
        "images": images,
        "seconds": round(seconds, 3),
        "images_per_second": images / seconds if seconds else None,
        "hit_rate": total("hits") / evaluations if evaluations else 0.0,
        "compute": flops / uncached if uncached else 1.0,
        "saved_flops": round(uncached - flops),
        "fallbacks": round(total("fallbacks")),
        "cache_bytes": max((line.cache_bytes for line, _ in counted), default=0),
    }
