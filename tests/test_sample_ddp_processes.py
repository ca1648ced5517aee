"""sample_ddp.py in several real processes, with and without torchrun: equal bytes, kills, signals, restarts."""

import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toy import save_tiny

import pipeline
import profiles
import sample_ddp
from adacorr.profile import save_profile
from fid_run import images, record, worker

ROOT = Path(__file__).resolve().parents[1]
FORK = multiprocessing.get_context("fork")
COUNT, LONG = 11, 300  # LONG: seconds after which a process that should have ended has failed
CHILD = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import sample_ddp
sample_ddp.end_with_launcher()
rank = int(os.environ.get("RANK", 0))
from datetime import timedelta
import ranks
from fid_run import images, job, record, worker
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
    pipe, known = pipeline.load(pipeline.ModelOptions(ckpt=str(path))), path.with_name("known.safetensors")
    save_profile(known, profiles.measure(pipe, 2))
    common = ["--num-fid-samples", COUNT, "--num-sampling-steps", 8, "--adacorr", "--device", "cpu"]
    common += ["--calibrate", known]
    return [str(a) for a in (*common, "--ckpt", path, "--per-proc-batch-size", 2, "--sample-dir")]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """The folder that one undisturbed process makes."""
    place = tmp_path_factory.mktemp("whole")
    assert sample_ddp.main([*flags, str(place), "--per-proc-batch-size", "5"]) == 0
    return folder_in(place)


def folder_in(place):
    (found,) = (path for path in place.iterdir() if path.is_dir())
    return found


def same(folder, whole):
    """Whether two run folders hold the same bytes as images and as .npz, and nothing unfinished."""
    images = [{p.name: p.read_bytes() for p in (path / "images").glob("*.png")} for path in (folder, whole)]
    packed = [path.with_name(f"{path.name}.npz").read_bytes() for path in (folder, whole)]
    assert not [path for path in folder.parent.rglob("*.tmp")]
    assert len(images[1]) == COUNT
    return images[0] == images[1] and packed[0] == packed[1]


def script(tmp_path, code):
    path = tmp_path / "child.py"
    path.write_text(f"{CHILD}{code}\nsys.exit(sample_ddp.main(sys.argv[1:]))\n")
    return str(path)


STARTED = []


@pytest.fixture(autouse=True)
def nothing_is_left():
    """A test that fails leaves no process behind."""
    yield
    while STARTED:
        STARTED.pop().kill()


def torchrun(*words):
    """Two processes that torchrun starts."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    STARTED.append(subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes))
    return STARTED[-1]


class Forked(FORK.Process):
    """sample_ddp.py in a copy of this process, which has imported everything; `code` is run in it beforehand."""

    def __init__(self, folder, code, argv, **variables):
        super().__init__(daemon=True)
        self.code, self.argv, self.variables = code, [str(word) for word in argv], variables
        self.outputs = [folder / f"{len(STARTED)}.{name}" for name in ("out", "err")]
        STARTED.append(self)
        self.start()

    def run(self):
        os.environ |= {name: str(value) for name, value in self.variables.items()}
        sys.stdout, sys.stderr = (path.open("w") for path in self.outputs)
        sample_ddp.end_with_launcher()
        names = {"os": os, "signal": signal, "time": time, "images": images, "record": record, "worker": worker}
        exec(self.code, names | {"rank": self.variables.get("RANK", 0)})
        sys.exit(sample_ddp.main(self.argv))

    def poll(self):
        return self.exitcode

    def communicate(self, timeout=LONG):
        self.join(timeout)
        assert not self.is_alive()
        self.returncode = self.exitcode
        return [path.read_text() for path in self.outputs]

    def send_signal(self, number):
        os.kill(self.pid, number)


def start_ranks(world, folder, code, *argv):
    """Processes as torchrun would start them, but nobody ends the others when one fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [Forked(folder, code, argv, RANK=rank, LOCAL_RANK=rank, **shared) for rank in range(world)]


def end(process):
    """(exit code, stdout, stderr)"""
    out, err = process.communicate(timeout=LONG)
    return process.returncode, out, err


def until(condition, process=None):
    deadline = time.monotonic() + LONG
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def images_in(place):
    return list(place.glob("*/images/*.png"))


def ranks_of(process):
    """The processes that a launcher started, once they are there."""
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    until(lambda: len(listed.read_text().split()) == 2, process)
    return [int(pid) for pid in listed.read_text().split()]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def outcomes(folder):
    return [session.get("outcome") for session in json.loads((folder / "run.json").read_text())["sessions"]]


def go_on(flags, place):
    """The same run, ended by one process, in this one."""
    assert sample_ddp.main([*flags, str(place)]) == 0


def test_torchrun_gives_the_same_bytes_and_nobody_waits_in_a_collective(flags, whole, tmp_path):
    # Rank 0 packs for longer than a collective may take: the others have left by then.
    slow_pack = """
ranks.PATIENCE = timedelta(seconds=5)
pack = job.pack
def slow(*job):
    time.sleep(8)
    return pack(*job)
job.pack = slow
"""
    code, out, err = end(torchrun(script(tmp_path, slow_pack), *flags, tmp_path / "out"))
    assert code == 0, err
    folder = folder_in(tmp_path / "out")
    assert same(folder, whole)
    assert out.count("finished") == 1
    record = json.loads((folder / "run.json").read_text())
    assert record["statistics"]["images"] == COUNT
    assert record["sessions"][0]["images"] == 6  # of rank 0: the other made the rest


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
    first, second = [end(process) for process in start_ranks(2, tmp_path, die, *flags, place)]
    assert (first[0], second[0]) == (1, -signal.SIGKILL)
    assert len(list(place.glob("*/images/.*.tmp"))) == 1
    assert 2 <= len(images_in(place)) < COUNT
    go_on(flags, place)
    assert same(folder_in(place), whole)
    assert outcomes(folder_in(place))[-1] == "complete"


def test_sigterm_to_torchrun_and_fewer_processes_after_it(flags, whole, tmp_path):
    place = tmp_path / "out"
    process = torchrun(script(tmp_path, f"LAST = 0.5{SLOW}"), *flags, place)
    until(lambda: len(images_in(place)) >= 2, process)
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] != 0
    folder = folder_in(place)
    assert outcomes(folder) == ["stopped by SIGTERM"]
    assert 2 <= len(images_in(place)) < COUNT
    assert not list(place.rglob("*.tmp"))
    go_on(flags, place)
    assert same(folder, whole)
    assert outcomes(folder) == ["stopped by SIGTERM", "complete"]


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
    code, _, err = end(torchrun("--max-restarts", 1, script(tmp_path, fail_once), *flags, place))
    assert code == 0, err
    assert "a GPU fell off the bus" in err
    assert len(outcomes(folder_in(place))) == 2
    assert outcomes(folder_in(place))[-1] == "complete"
    assert same(folder_in(place), whole)


def test_one_process_to_begin_with_and_three_to_end(flags, whole, tmp_path):
    """Also a second Ctrl-C: it ends the process at once, with whole files only."""
    place = tmp_path / "out"
    process = Forked(tmp_path, f"LAST = {2 * LONG}{SLOW}", [*flags, place])  # longer than `until` waits
    until(lambda: len(images_in(place)) >= 2, process)
    process.send_signal(signal.SIGINT)

    def again():  # a busy machine may see the first late, and what follows it within a second counts as one with it
        time.sleep(1.2)
        process.send_signal(signal.SIGINT)
        return not process.is_alive()

    until(again)
    code, _, _ = end(process)
    assert code == 130
    assert all(path.read_bytes().endswith(b"IEND\xaeB`\x82") for path in images_in(place))
    ended = [end(process) for process in start_ranks(3, tmp_path, "", *flags, place)]
    assert [code for code, _, _ in ended] == [0, 0, 0], ended
    assert ended[1][1] == ended[2][1] == ""  # one voice
    assert same(folder_in(place), whole)
    mistaken = [end(process) for process in start_ranks(2, tmp_path, "", *flags, place, "--threads", 2)]
    assert [code for code, _, _ in mistaken] == [2, 2]  # without a launcher, too, one of rank 0 ends the others
    assert "".join(err for _, _, err in mistaken).count("\n") == 1, mistaken


def test_a_rank_that_fails_alone_leaves_the_rest_to_be_made(flags, whole, tmp_path):
    fail = """
def failing(self, indices):
    raise RuntimeError("a GPU fell off the bus")
if rank == 1:
    worker.Sampling.batch = failing
"""
    place = tmp_path / "out"
    (code, _, err), (other, _, other_err) = [end(process) for process in start_ranks(2, tmp_path, fail, *flags, place)]
    assert (code, other) == (1, 1)
    assert "a GPU fell off the bus" in other_err
    assert err.count("\n") == 1, err
    assert "5 of 11 images are missing" in err
    go_on(flags, place)
    assert same(folder_in(place), whole)


# --------------------------------------------------------------------------- launchers and ranks that are left


def test_a_rank_that_outlived_its_job_keeps_the_next_one_out_even_with_overwrite(flags, tmp_path):
    """It would write over the new images, and its end would be taken for that of the new rank."""
    place = tmp_path / "out"
    slow = f"LAST = 0.5{SLOW.replace('time.sleep(', 'time.sleep(rank * 1000 + ')}"
    first, second = start_ranks(2, tmp_path, slow, *flags, place)
    until(lambda: len(images_in(place)) >= 2, first)
    first.kill()
    end(first)
    folder = folder_in(place)
    before = {path.name: path.read_bytes() for path in images_in(place)}
    other = tmp_path, "record.WAIT = 2", [*flags, place, "--cfg-channels", 3, "--overwrite"]
    code, _, err = end(Forked(*other))
    assert code == 2
    assert re.search(r"is in use by .*lock-001 is locked", err)
    after = {path.name: path.read_bytes() for path in images_in(place)}
    assert before.items() <= after.items()  # the surviving rank may have written one more of its own
    second.kill()
    end(second)
    assert end(Forked(*other))[0] == 0
    assert outcomes(folder) == ["complete"]
    assert len(images_in(place)) == COUNT


@pytest.mark.parametrize("moment", ["in the rendezvous", "while images are made"])
def test_ranks_end_with_their_launcher(flags, whole, tmp_path, moment):
    """kill -9 of torchrun: neither those that wait in C++ for the others are left behind, nor those at work."""
    place = tmp_path / "out"
    wait = f"open({str(tmp_path)!r} + f'/ready{{rank}}', 'w').close()\nif rank == 0: time.sleep(1000)"
    wait = wait if moment == "in the rendezvous" else f"LAST = 1.0{SLOW}"
    process = torchrun(script(tmp_path, wait), *flags, place)
    ranks = ranks_of(process)
    if moment == "in the rendezvous":
        until(lambda: len(list(tmp_path.glob("ready*"))) == 2, process)
        time.sleep(1)
    else:
        until(lambda: len(images_in(place)) >= 2, process)
    process.kill()
    until(lambda: not any(map(alive, ranks)))
    process.communicate()
    go_on(flags, place)
    assert same(folder_in(place), whole)


def test_a_mistake_is_told_once_also_by_a_process_that_is_late(flags, tmp_path):
    """torchrun ends all processes with the first: none may end before rank 0 has said why."""
    mistake = [*flags, tmp_path, "--cfg-channels", "4"]
    code, _, err = end(torchrun(script(tmp_path, "if rank == 0: time.sleep(5)"), *mistake))
    assert code == 1
    assert err.count("invalid choice: '4'") == 1, err


@pytest.mark.parametrize("stdout", ["open('/dev/full', 'w')", "None"])
def test_closed_streams_and_a_full_log_do_not_end_the_job(flags, whole, tmp_path, stdout):
    streams = f"import sys; sys.stdout, sys.stderr = {stdout}, None"
    assert end(Forked(tmp_path, streams, [*flags, tmp_path / "out"]))[0] == 0
    assert same(folder_in(tmp_path / "out"), whole)
