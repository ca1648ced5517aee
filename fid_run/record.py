"""What a run keeps beside its images: record, locks, logs and their statistics, and the mark of success.

Rank 0 holds `lock` and writes everything but the logs; each other rank holds the lock of its own log. The kernel frees
a lock when its holder ends, however it ends. So a held lock means a living process: a job begins only when no process
of another job is left, and finishes only when all of its own are through.
"""

import glob
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from adacorr.files import write_json, written_whole
from fid_run.images import disk_errors, is_temporary
from fid_run.protocol import differences, run_id

SCHEMA = 2  # of run.json and SUCCESS.json
WAIT = 120.0  # seconds for the lock of another job: a file server frees those of a dead host after 90 or so
VISIBLE = 90.0  # seconds: a network file system may show a new file of another host only after a minute
WAYS_OUT = "give another --sample-dir, or --overwrite to start it anew"


class RunMismatch(ValueError):
    """The folder holds another run or job, or what cannot be told to be this one."""


class RunFolder:
    """The folder of one run. Whoever calls tidy, clear, begin, end or succeed must hold the lock."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.images, self.run_json = self.path / "images", self.path / "run.json"
        self.labels, self.success_json = self.path / "labels.npy", self.path / "SUCCESS.json"
        self.profile = self.path / "profile.safetensors"  # what AdaCorrection knows of the model
        self.npz = self.path.with_name(f"{self.path.name}.npz")  # names hold dots, where with_suffix would cut
        self.record: dict[str, Any] = {}  # run.json, since `begin`

    def log(self, rank: int, suffix: str = "jsonl") -> Path:
        return self.path / "log" / f"rank-{rank:03d}.{suffix}"

    # --------------------------------------------------------------------------------------- before the work

    def read(self, protocol: dict[str, Any] | None = None) -> dict[str, Any] | None:
        """The record of the run that is here, None where there is none.

        RunMismatch for one that is damaged, and with every field that differs from a given protocol.
        """
        try:
            record = json.loads(self.run_json.read_bytes())
            if record["schema"] != SCHEMA:
                raise ValueError(f"it has schema {record['schema']}, this version knows {SCHEMA}")
            last = record["sessions"][-1]
            if record["run_id"] != run_id(record["protocol"]) or not {"count", "environment", "host", "pid"} <= {*last}:
                raise ValueError("its fields do not fit together")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise RunMismatch(f"{self.run_json} is damaged or of another version ({error}); {WAYS_OUT}") from None
        if protocol is not None and (lines := differences(record["protocol"], protocol)):
            raise RunMismatch(f"{self.path} holds another run: {'; '.join(lines)}; {WAYS_OUT}")
        return record

    def check(self, protocol: dict[str, Any]) -> dict[str, Any] | None:
        """As `read`. A folder with files but without a record is refused, too: they may be another run's."""
        record = self.read(protocol)
        for path in (*self.path.rglob("*"), self.npz) if record is None else ():
            if path.is_file() and not path.name.endswith("lock") and not is_temporary(path):
                raise RunMismatch(f"{self.path} has no run.json but {path}, which may be another run's; {WAYS_OUT}")
        return record

    @contextmanager
    def lock(self, note: Callable[[str], None]) -> Iterator[None]:
        """Keep other jobs out of the folder, which is made if need be.

        Waits up to WAIT seconds for all processes of another job to end, also for those that outlived its rank 0;
        RunMismatch if they do not.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with self._acquire(self.path / "lock", note):
            for path in sorted((self.path / "log").glob("rank-*.lock")):
                self._acquire(path, note).release()
            yield

    def _acquire(self, path: Path, note: Callable[[str], None]) -> FileLock:
        lock = FileLock(path)
        try:
            return lock.acquire(timeout=0).lock
        except Timeout:
            session = (self.read() or {"sessions": [{"host": "another job", "pid": "unknown"}]})["sessions"][-1]
            held = "{0} is in use by {host}, pid {pid} ({1} is locked)".format(self.path, path.name, **session)
            note(f"{held}: waiting for up to {WAIT:.0f} s")
        try:
            return lock.acquire(timeout=WAIT, poll_interval=0.2).lock
        except Timeout:
            way_out = "wait for that job, end all of its processes, or give another --sample-dir"
            raise RunMismatch(f"{held}: {way_out}") from None

    def join(self, token: str, rank: int) -> FileLock:
        """This rank's lock, held until it is released. OSError if run.json does not show the session in time."""
        deadline = time.monotonic() + VISIBLE
        while not self.has(token):
            if time.monotonic() >= deadline:
                raise OSError(
                    f"{socket.gethostname()} does not see this job in {self.run_json.absolute()}: give a --sample-dir "
                    "on a file system that all nodes share"
                )
            time.sleep(0.2)
        return FileLock(self.log(rank, "lock")).acquire().lock

    def has(self, token: str) -> bool:
        """Whether run.json is there and its last session is the one with this token."""
        try:
            return json.loads(self.run_json.read_bytes())["sessions"][-1]["token"] == token
        except (OSError, ValueError, KeyError, IndexError):
            return False

    def await_ranks(self, world: int) -> None:
        """Return once no other rank of the session is at work."""
        for rank in range(1, world):
            FileLock(self.log(rank, "lock")).acquire(poll_interval=0.5).lock.release()

    # --------------------------------------------------------------------------------------------- the record

    def tidy(self) -> int:
        """Delete the unfinished files that killed processes left: how many there were."""
        left = [*filter(is_temporary, self.path.rglob("*"))]
        left += self.path.parent.glob(f".{glob.escape(self.npz.name)}.*.tmp")
        for path in left:
            path.unlink()
        return len(left)

    def clear(self) -> None:
        """Delete the run's record, logs, mark and .npz; the images are the image store's, other files stay."""
        logs = (self.path / "log").glob("rank-*.jsonl")
        # The record goes last: killed in between, the folder still says whose it is.
        for path in (self.success_json, self.npz, *logs, self.labels, self.profile, self.run_json):
            path.unlink(missing_ok=True)

    def begin(self, protocol: dict[str, Any], labels: np.ndarray | None, session: dict[str, Any]) -> str:
        """Open a session in run.json and return its token.

        A session that is still "running" becomes "killed": its process had no time to say so. The mark of success goes.
        """
        run = {"schema": SCHEMA, "run_id": run_id(protocol), "protocol": protocol, "sessions": [], "statistics": None}
        self.record = self.read(protocol) or run
        for earlier in self.record["sessions"]:
            if earlier["state"] == "running":
                earlier["state"] = "killed"
        opened = {"session": len(self.record["sessions"]) + 1, "token": os.urandom(8).hex(), "state": "running"}
        opened |= {"started": now(), "ended": None, "host": socket.gethostname(), "pid": os.getpid()}
        self.record["sessions"].append(opened | session)
        self.success_json.unlink(missing_ok=True)
        self._write(self.run_json, self.record)
        (self.path / "log").mkdir(exist_ok=True)
        if labels is not None:
            with disk_errors(self.labels, labels.nbytes), written_whole(self.labels) as path, open(path, "wb") as file:
                np.save(file, labels)
        return opened["token"]

    def end(self, state: str, statistics: dict[str, Any], message: str = "") -> None:
        """Close the session as "complete", "interrupted" or "failed", with the run's statistics."""
        self.record["sessions"][-1] |= {"state": state, "ended": now(), "message": message}
        self._write(self.run_json, self.record | {"statistics": statistics})

    def succeed(self, run: str, count: int, npz_sha256: str | None) -> None:
        """Write SUCCESS.json: all `count` images are there, and in the .npz of that digest if there is one."""
        mark = {"schema": SCHEMA, "run_id": run, "count": count, "finished": now()}
        if npz_sha256 is not None:
            mark |= {"npz": self.npz.name, "npz_bytes": self.npz.stat().st_size, "npz_sha256": npz_sha256}
        self._write(self.success_json, mark)

    def packed(self, run: str) -> int:
        """How many images of the run the .npz holds by SUCCESS.json and its size, 0 if there is none that fits."""
        try:
            mark = json.loads(self.success_json.read_bytes())
            fits = mark["run_id"] == run and mark["npz_bytes"] == self.npz.stat().st_size
            return int(mark["count"]) if fits else 0
        except (OSError, ValueError, KeyError, TypeError):  # one of them is gone, or the mark is damaged
            return 0

    def _write(self, path: Path, content: dict[str, Any]) -> None:
        with disk_errors(path, len(json.dumps(content))):
            write_json(path, content)


def now() -> str:
    """The time for people, UTC; no duration is ever taken from it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


# ---------------------------------------------------------------------------------------------- statistics

COUNTS = ("seconds", "flops", "uncached_flops", "hits", "evaluations", "fallbacks", "cache_bytes")


def append(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Add lines to a log. ValueError for numbers that JSON does not have, before anything is written."""
    text = b"".join(json.dumps(line, allow_nan=False).encode() + b"\n" for line in lines)
    with disk_errors(path, len(text)), open(path, "ab") as file:
        file.write(b"\n" + text)  # a kill or a full disk may have left half a line, which must not spoil this one


def statistics(folder: RunFolder, count: int) -> dict[str, Any]:
    """What the logs of all sessions say of images 0..count-1.

    A log has one line for each image; that of the last session counts. Seconds are summed over ranks, so
    `images_per_second` is that of one process. Compute is FLOPs over those of the uncached run, the hit rate is hits
    over evaluations. `unaccounted` images have no line: they are missing, or their process was killed before it wrote.
    """
    lines, broken = [], 0
    for path in sorted((folder.path / "log").glob("rank-*.jsonl")):
        for text in filter(bytes.strip, path.read_bytes().split(b"\n")):
            try:
                line = json.loads(text)
                numbers = [float(line.get(name, 0)) for name in COUNTS]
                lines.append((int(line["session"]), int(line["index"]), numbers, line.get("recomputed")))
            except (ValueError, KeyError, TypeError, AttributeError):
                broken += 1
    table, faults = np.full((count, len(COUNTS)), np.nan), {}
    for _, index, numbers, fault in sorted(lines, key=lambda line: line[0]):  # stable: within a session as written
        if 0 <= index < count:
            table[index], faults[index] = numbers, fault
    table = table[~np.isnan(table[:, 0])]
    seconds, flops, uncached, hits, evaluations, fallbacks, _ = table.sum(0).tolist()
    return {
        "images": len(table),
        "unaccounted": count - len(table),
        "broken_lines": broken,
        "recomputed": [faults[index] for index in sorted(faults) if faults[index]],
        "seconds": round(seconds, 3),
        "images_per_second": len(table) / seconds if seconds else None,
        "hit_rate": hits / evaluations if evaluations else 0.0,
        "compute": flops / uncached if uncached else 1.0,
        "saved_flops": round(uncached - flops),
        "fallbacks": round(fallbacks),
        "cache_bytes": int(table[:, -1].max(initial=0)),
    }
