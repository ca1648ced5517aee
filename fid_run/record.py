"""What a run keeps beside its images: the record run.json and the locks.

Rank 0 writes the record. Each rank holds a lock of its own while it is at work; the kernel frees a lock when its holder
ends, however it ends. So a held lock means a living process: a job begins only when no process of another job is left,
and finishes only when all of its own are through.
"""

import glob
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, FileLock, Timeout

from adacorr.files import write_json
from fid_run.images import disk_errors
from fid_run.protocol import differences, run_id

SCHEMA = 3  # of run.json
WAIT = 120.0  # seconds for the lock of another job: a file server frees those of a dead host after 90 or so
VISIBLE = 90.0  # seconds: a network file system may show a new file of another host only after a minute
WAYS_OUT = "give sample_ddp.py another --sample-dir, or --overwrite to start it anew"


class RunMismatch(ValueError):
    """The folder holds another run or job, or what cannot be told to be this one."""


class RunFolder:
    """The folder of one run. Whoever calls tidy, clear, begin or end must hold the lock."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.images, self.run_json = self.path / "images", self.path / "run.json"
        self.profile = self.path / "profile.safetensors"  # what AdaCorrection knows of the model
        self.npz = self.path.with_name(f"{self.path.name}.npz")  # names hold dots, where with_suffix would cut
        self.record: dict[str, Any] = {}  # run.json, since `begin`

    # ------------------------------------------------------------------------------------------------ the locks

    @contextmanager
    def lock(self, note: Callable[[str], None]) -> Iterator[None]:
        """Keep other jobs out of the folder, which is made if need be.

        Waits up to WAIT seconds for all processes of another job to end, also for those that outlived its rank 0;
        RunMismatch if they do not.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with self._acquire(self._lock_file(0), note):
            for path in sorted({*self.path.glob("lock-*")} - {self._lock_file(0)}):
                self._acquire(path, note).lock.release()
            yield

    def join(self, rank: int) -> AcquireReturnProxy:
        """This rank's lock, held until it is released. OSError if run.json does not show the session in time."""
        deadline = time.monotonic() + VISIBLE
        while not self.is_current():
            if time.monotonic() > deadline:
                raise OSError(
                    f"process {rank} does not see this job in {self.run_json}: give a --sample-dir "
                    "on a file system that all nodes share"
                )
            time.sleep(0.2)
        return FileLock(self._lock_file(rank)).acquire()

    def await_ranks(self, world: int) -> None:
        """Return once no other rank of the session is at work."""
        for rank in range(1, world):
            FileLock(self._lock_file(rank)).acquire(poll_interval=0.5).lock.release()

    def _lock_file(self, rank: int) -> Path:
        return self.path / f"lock-{rank:03d}"

    def _acquire(self, path: Path, note: Callable[[str], None]) -> AcquireReturnProxy:
        lock = FileLock(path)
        try:
            return lock.acquire(timeout=0)
        except Timeout:
            session = (self.read() or {"sessions": [{"host": "another job", "pid": "unknown"}]})["sessions"][-1]
            held = "{0} is in use by {host}, pid {pid} ({1} is locked)".format(self.path, path.name, **session)
            note(f"{held}: waiting for up to {WAIT:.0f} s")
        try:
            return lock.acquire(timeout=WAIT, poll_interval=0.2)
        except Timeout:
            way_out = "wait for that job, end all of its processes, or give another --sample-dir"
            raise RunMismatch(f"{held}: {way_out}") from None

    # ----------------------------------------------------------------------------------------------- the record

    def read(self) -> dict[str, Any] | None:
        """The record of the run that is here, None where there is none. RunMismatch for one that is damaged."""
        try:
            record = json.loads(self.run_json.read_bytes())
            if record["schema"] != SCHEMA:
                raise ValueError(f"it has schema {record['schema']}, this version knows {SCHEMA}")
            if record["run_id"] != run_id(record["protocol"]):
                raise ValueError("its protocol was changed")
            return record
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise RunMismatch(f"{self.run_json} is damaged or of another version ({error}); {WAYS_OUT}") from None

    def check(self, protocol: dict[str, Any]) -> dict[str, Any] | None:
        """The record, None where there is none. RunMismatch with every field that differs from the protocol.

        A folder with files but without a record is refused, too: they may be another run's. Call `tidy` before.
        """
        record = self.read()
        if record is not None:
            if lines := differences(record["protocol"], protocol):
                raise RunMismatch(f"{self.path} holds another run: {'; '.join(lines)}; {WAYS_OUT}")
            return record
        for path in (*self.path.rglob("*"), self.npz):
            if path.is_file() and not path.name.startswith("lock-"):
                raise RunMismatch(f"{self.path} has no run.json but {path}, which may be another run's; {WAYS_OUT}")
        return None

    def is_current(self) -> bool:
        """Whether run.json is there and its last session is the one that `begin` opened."""
        try:
            last = json.loads(self.run_json.read_bytes())["sessions"][-1]
            return last["token"] == self.record["sessions"][-1]["token"]
        except (OSError, ValueError, KeyError, IndexError):
            return False

    def packed(self, run: str) -> int:
        """How many images of the run the .npz holds by the record and by its size; 0 if there is none that fits."""
        record = self.read()
        if record is None or record["run_id"] != run or record["npz"] is None or not self.npz.is_file():
            return 0
        return record["npz"]["count"] if record["npz"]["bytes"] == self.npz.stat().st_size else 0

    def tidy(self) -> None:
        """Delete the unfinished files that killed processes left."""
        for path in (*self.path.rglob(".*.tmp"), *self.path.parent.glob(f".{glob.escape(self.npz.name)}.*.tmp")):
            path.unlink()

    def clear(self) -> None:
        """Delete the run's images, .npz, profile and record; other files stay."""
        images = [path for path in self.images.glob("*.png") if re.fullmatch(r"\d{6,}\.png", path.name)]
        # The record goes last: killed in between, the folder still says whose it is.
        for path in (*images, self.npz, self.profile, self.run_json):
            path.unlink(missing_ok=True)

    def begin(self, protocol: dict[str, Any], session: dict[str, Any]) -> None:
        """Open a session in run.json. `ended` stays null if the process is killed."""
        new = {"schema": SCHEMA, "run_id": run_id(protocol), "protocol": protocol, "sessions": []}
        self.record = self.read() or new
        opened = {"token": os.urandom(8).hex(), "started": now(), "ended": None}
        opened |= {"host": socket.gethostname(), "pid": os.getpid()}
        self.record["sessions"].append(opened | session)
        self.record |= {"npz": None, "statistics": None}
        self._write()

    def end(self, outcome: str, npz: dict[str, Any] | None = None, statistics: dict[str, Any] | None = None) -> None:
        """Close the session: "complete", with what is known of all images and of their .npz, or why it ended."""
        self.record["sessions"][-1] |= {"ended": now(), "outcome": outcome}
        self.record |= {"npz": npz, "statistics": statistics}
        self._write()

    def _write(self) -> None:
        with disk_errors(self.run_json, len(json.dumps(self.record))):
            write_json(self.run_json, self.record)


def now() -> str:
    """The time for people, UTC; no duration is ever taken from it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
