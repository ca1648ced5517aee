"""sample_ddp.py in several real processes, with and without torchrun: equal bytes, kills, signals, restarts."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toy import save_tiny

import sample_ddp

ROOT = Path(__file__).resolve().parents[1]
COUNT, LONG = 11, 120  # LONG: seconds after which a process that should have ended has failed
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
CHILD = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import sample_ddp
from ddp import image_store, ranks, worker
from datetime import timedelta
rank = int(os.environ.get("RANK", 0))
"""
SLOW = """
batch, done = worker.Sampling.batch, []
def slow(self, indices):
    time.sleep(LAST if len(done) == 2 else 0.5)
    done.append(1)
    return batch(self, indices)
worker.Sampling.batch = slow
"""


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Of a run on a tiny model, but for the place."""
    path = save_tiny(tmp_path_factory.mktemp("model") / "tiny.safetensors")
    common = ["--num-fid-samples", COUNT, "--num-sampling-steps", 8, "--adacorr", "--device", "cpu"]
    return [str(a) for a in (*common, "--ckpt", path, "--per-proc-batch-size", 2, "--sample-dir")]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """The folder that one undisturbed process makes, on other batches."""
    place = tmp_path_factory.mktemp("whole")
    assert sample_ddp.main([*flags, str(place), "--per-proc-batch-size", "5"]) == 0
    return folder_in(place)


def folder_in(place):
    (found,) = (path for path in place.iterdir() if path.is_dir())
    return found


def same(folder, whole):
    """Whether two run folders hold the same bytes as images and as .npz, and nothing unfinished."""
    images = [{p.name: p.read_bytes() for p in (path / "images").iterdir()} for path in (folder, whole)]
    packed = [path.with_name(f"{path.name}.npz").read_bytes() for path in (folder, whole)]
    assert not [path for path in folder.parent.rglob("*.tmp")]
    assert len(images[1]) == COUNT
    return images[0] == images[1] and packed[0] == packed[1]


def script(tmp_path, code=""):
    path = tmp_path / "child.py"
    path.write_text(f"{CHILD}{code}\nsys.exit(sample_ddp.main(sys.argv[1:]))\n")
    return str(path)


def start(*command, **variables):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in variables.items()}}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([str(part) for part in command], env=environment, **pipes)


def start_ranks(world, *command):
    """Processes as torchrun would start them, but nobody ends the others when one fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [start(sys.executable, *command, RANK=rank, LOCAL_RANK=rank, **shared) for rank in range(world)]


def end(process):
    """(exit code, stdout, stderr)"""
    out, err = process.communicate(timeout=LONG)
    return process.returncode, out, err


def wait_for_images(place, count, process):
    deadline = time.monotonic() + LONG
    while len(list(place.glob("*/images/*.png"))) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def states(folder):
    return [json.loads(path.read_text())["state"] for path in sorted((folder / "ranks").iterdir())]


def sessions(folder):
    return [session["state"] for session in json.loads((folder / "run.json").read_text())["sessions"]]


def go_on(flags, place):
    """The same run, ended by one process, in this one."""
    assert sample_ddp.main([*flags, str(place)]) == 0


def test_torchrun_gives_the_same_bytes_and_nobody_waits_in_a_collective(flags, whole, tmp_path):
    # Rank 0 packs for longer than a collective may take: the others have left by then.
    slow_pack = """
sample_ddp.PATIENCE = timedelta(seconds=5)
pack = sample_ddp.pack
def slow(*job):
    time.sleep(8)
    return pack(*job)
sample_ddp.pack = slow
"""
    code, out, err = end(start(*TORCHRUN, 2, script(tmp_path, slow_pack), *flags, tmp_path / "out"))
    assert code == 0, err
    folder = folder_in(tmp_path / "out")
    assert same(folder, whole)
    assert out.count("packed") == 1
    totals = json.loads((folder / "run.json").read_text())["statistics"]
    assert {rank: part["images"] for rank, part in totals["ranks"].items()} == {"0": 6, "1": 5}
    assert totals["images"] == COUNT


def test_three_processes_give_the_same_bytes(flags, whole, tmp_path):
    ended = [end(process) for process in start_ranks(3, script(tmp_path), *flags, tmp_path / "out")]
    assert [code for code, _, _ in ended] == [0, 0, 0], ended
    assert ended[1][1] == ended[2][1] == ""  # one voice
    assert same(folder_in(tmp_path / "out"), whole)


def test_kill_9_of_a_rank_in_the_middle_of_a_file(flags, whole, tmp_path):
    die = """
replace, calls = os.replace, []
def dying(source, target):
    calls.append(str(target).endswith(".png"))
    if rank == 1 and sum(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = dying
"""
    place = tmp_path / "out"
    code, _, _ = end(start(*TORCHRUN, 2, script(tmp_path, die), *flags, place))
    assert code != 0
    assert len(list(place.glob("*/images/.*.tmp"))) == 1
    assert 2 <= len(list(place.glob("*/images/*.png"))) < COUNT
    go_on(flags, place)
    assert same(folder_in(place), whole)
    assert sessions(folder_in(place))[-1] == "complete"


def test_sigterm_to_torchrun_and_fewer_processes_after_it(flags, whole, tmp_path):
    place = tmp_path / "out"
    process = start(*TORCHRUN, 2, script(tmp_path, f"LAST = 0.5{SLOW}"), *flags, place)
    wait_for_images(place, 2, process)
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] != 0
    folder = folder_in(place)
    assert sessions(folder) == ["interrupted"]
    assert states(folder) == ["interrupted"] * 2
    assert not (folder / "lock").exists()
    made = len(list((folder / "images").iterdir()))
    assert 2 <= made < COUNT
    assert made % 2 == 0 or made == COUNT - 1  # whole batches
    go_on(flags, place)
    assert same(folder, whole)
    assert sessions(folder) == ["interrupted", "complete"]


def test_a_restart_by_torchrun_goes_on(flags, whole, tmp_path):
    fail_once = f"""
mark = {str(tmp_path / "failed")!r}
batch = worker.Sampling.batch
def failing(self, indices):
    if rank == 1 and not os.path.exists(mark):
        open(mark, "w").close()
        raise RuntimeError("a GPU fell off the bus")
    return batch(self, indices)
worker.Sampling.batch = failing
"""
    place = tmp_path / "out"
    code, _, err = end(start(*TORCHRUN, 2, "--max-restarts", 1, script(tmp_path, fail_once), *flags, place))
    assert code == 0, err
    assert "a GPU fell off the bus" in err
    assert len(sessions(folder_in(place))) == 2
    assert sessions(folder_in(place))[-1] == "complete"
    assert same(folder_in(place), whole)


def test_one_process_to_begin_with_and_three_to_end(flags, whole, tmp_path):
    """Also a second Ctrl-C: it ends the process at once, with whole files only."""
    place = tmp_path / "out"
    process = start(sys.executable, script(tmp_path, f"LAST = {LONG}{SLOW}"), *flags, place, "--grace", 1000)
    wait_for_images(place, 4, process)
    process.send_signal(signal.SIGINT)
    time.sleep(1.2)  # more than two that one keystroke may bring
    process.send_signal(signal.SIGINT)
    code, _, _ = end(process)
    folder = folder_in(place)
    assert code == 130
    assert all(path.read_bytes().endswith(b"IEND\xaeB`\x82") for path in (folder / "images").glob("*.png"))
    ended = [end(process) for process in start_ranks(3, script(tmp_path), *flags, place)]
    assert [code for code, _, _ in ended] == [0, 0, 0], ended
    assert same(folder, whole)


def test_a_rank_that_fails_alone_is_named_by_rank_0(flags, whole, tmp_path):
    fail = """
def failing(self, indices):
    raise RuntimeError("a GPU fell off the bus")
if rank == 1:
    worker.Sampling.batch = failing
"""
    place = tmp_path / "out"
    (code, _, err), (other, _, other_err) = [
        end(process) for process in start_ranks(2, script(tmp_path, fail), *flags, place)
    ]
    assert (code, other) == (1, 1)
    assert "a GPU fell off the bus" in other_err
    assert err.count("\n") == 1, err
    assert "rank 1" in err
    assert "failed: RuntimeError: a GPU fell off the bus" in err
    assert "5 of 11 images are missing" in err
    assert states(folder_in(place)) == ["done", "failed"]
    go_on(flags, place)
    assert same(folder_in(place), whole)


def test_a_mistake_is_told_once(flags, whole, tmp_path):
    place = str(whole.parent)
    ended = [end(process) for process in start_ranks(2, script(tmp_path), *flags, place, "--threads", 2)]
    assert [code for code, _, _ in ended] == [2, 2]
    assert "".join(err for _, _, err in ended).count("\n") == 1, ended
    assert "precision.threads: 1 in the folder, 2 asked" in ended[0][2]
