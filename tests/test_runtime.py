"""What every script shares: device, random streams, clock, progress, files, and the record of its environment."""

import io
import json
import sys

import pytest
import torch
from toy import Clock

import runtime
from adacorr import command
from adacorr.files import check_writable, write_json
from runtime import Progress, find_device, random_stream, seed_words


def test_a_device_is_one_that_holds_tensors():
    assert find_device("cpu") == torch.device("cpu")
    assert find_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("meta", "abacus"):
        with pytest.raises(ValueError, match=f"--device {name} cannot be used") as caught:
            find_device(name)
        assert "\n" not in str(caught.value)


def test_streams_of_seeds_and_counters_are_apart():
    seeds = 0, 1, 2**32, 2**40, 2**63 - 1
    drawn = [random_stream(seed, i, j).bytes(8) for seed in seeds for i in (0, 1) for j in (0, 1)]
    assert len(set(drawn)) == len(drawn)
    assert random_stream(2**32, 0).bytes(8) != random_stream(0, 1).bytes(8)  # as numpy's own splitting would have it
    words = [tuple(seed_words(*numbers).generate_state(4)) for numbers in ((2**32, 0), (0, 1), (0, 0))]
    assert len(set(words)) == 3


def test_timed(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(command, "time", clock)

    def job():
        clock.now += 2.5
        return "done"

    assert command.timed(job, torch.device("cpu")) == ("done", 2.5)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("shown", [True, False])
def test_progress_is_a_bar_on_a_terminal_unless_it_is_silent(monkeypatch, shown):
    monkeypatch.setattr(sys, "stderr", Terminal())
    lines = []
    with Progress(4, "step", "title", done=1, shown=shown, line=lines.append) as progress:
        for _ in range(3):
            progress.update(1, "a text")
    assert (progress.done, lines) == (4, [])
    written = sys.stderr.getvalue()
    assert all(text in written for text in ("title:  25%", "4/4", "a text")) if shown else written == ""


@pytest.mark.parametrize("stderr", [io.StringIO(), None], ids=["a file", "closed"])
def test_elsewhere_progress_is_a_line_now_and_then_and_at_the_end(monkeypatch, stderr):
    clock, lines = Clock(), []
    monkeypatch.setattr(runtime, "time", clock)
    monkeypatch.setattr(sys, "stderr", stderr)
    with Progress(200, "image", done=100, line=lines.append) as progress:
        for _ in range(10):
            clock.now += 10
            progress.update(10, lambda: "a text")
        assert progress.rate == 1.0
    assert lines == [
        "140 of 200 images, a text, 01:00 left",  # the first after more than 30 s
        "180 of 200 images, a text, 00:20 left",
        "200 of 200 images, a text, 00:00 left",
    ]
    assert stderr is None or stderr.getvalue() == ""


def test_json_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "folder" / "run.json"
    write_json(path, {"a": 1})
    for broken in ({"a": float("nan")}, {"a": object()}):
        with pytest.raises((ValueError, TypeError)):
            write_json(path, broken)
        assert json.loads(path.read_text()) == {"a": 1}
        assert list(path.parent.iterdir()) == [path]


def test_check_writable(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    check_writable("--out", file)
    check_writable("--out", tmp_path / "new" / "folder" / "x.png")
    for path in (tmp_path, file / "x.png", file / "new" / "x.png"):
        with pytest.raises(OSError, match=f"--out {path}"):
            check_writable("--out", path)
    assert sorted(tmp_path.iterdir()) == [file]  # looking leaves nothing behind


def test_environment_is_plain_json_also_without_git(monkeypatch):
    assert json.loads(json.dumps(runtime.environment()))["torch"] == torch.__version__
    monkeypatch.setenv("PATH", "")
    assert runtime.environment()["git"] is None
