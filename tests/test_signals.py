"""Signals of runtime.py: the first signal, signals that are put off, and the second Ctrl-C."""

import multiprocessing
import os
import signal
import time

import pytest
from toy import Clock

import runtime
from runtime import SIGNALS, Interrupted, Signals

FORK = multiprocessing.get_context("fork")
LONG = 30  # seconds after which a test that waits has failed
CODES = [(signal.SIGTERM, 75, "SIGTERM"), (signal.SIGUSR1, 75, "SIGUSR1"), (signal.SIGINT, 130, "Ctrl-C")]


@pytest.mark.parametrize(("number", "code", "name"), CODES)
def test_the_first_signal_raises(number, code, name):
    after = []
    with Signals() as signals:
        with pytest.raises(Interrupted, match=f"stopped by {name}") as stop:
            after.append(signal.raise_signal(number))
        assert (stop.value.code, signals.number, after) == (code, number, [])
        with pytest.raises(Interrupted, match=name):  # and whoever asks later is told the same
            signals.check()


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize(("number", "code", "name"), CODES)
def test_put_off_a_signal_is_raised_at_the_end_or_where_the_job_asks(number, code, name, asks):
    done = []

    def job():
        with Signals() as signals, signals.deferred():
            signals.check()  # nothing happens without a signal
            signal.raise_signal(number)
            assert signals.number == number
            if asks:
                signals.check()
            done.append("the rest")

    with pytest.raises(Interrupted, match=name) as stop:
        job()
    assert (stop.value.code, done) == (code, [] if asks else ["the rest"])


def test_signals_are_raised_at_once_again_after_they_were_put_off():
    """Also where an error ended it, which comes before a signal."""
    with Signals() as signals:
        with pytest.raises(KeyError), signals.deferred():
            raise KeyError
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGUSR1)

    def broken():
        with Signals() as signals, signals.deferred():
            signal.raise_signal(signal.SIGTERM)
            raise KeyError

    with pytest.raises(KeyError):
        broken()


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    with Signals():
        assert all(signal.getsignal(number) != own for number, own in zip(SIGNALS, before, strict=True))
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("first", SIGNALS)
def test_after_the_first_signal_only_a_ctrl_c_counts_that_comes_later(monkeypatch, first):
    """Others do not break off the clean-up, and two Ctrl-C within a second are one keystroke."""
    clock, exits = Clock(), []
    monkeypatch.setattr(runtime, "time", clock)
    monkeypatch.setattr(runtime.os, "_exit", exits.append)
    with Signals() as signals:
        with pytest.raises(Interrupted):
            signal.raise_signal(first)
        for later in (0.0, 0.4, 0.5):  # 0.9 s after the first
            clock.now += later
            for number in SIGNALS:
                signal.raise_signal(number)
        clock.now += 0.2
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.raise_signal(number)
        assert (signals.number, exits) == (first, [])
        signal.raise_signal(signal.SIGINT)
        assert exits == [130]


def test_the_second_ctrl_c_ends_the_process_at_once():
    """A real process, which would clean up for ever."""

    def stubborn(pipe):
        runtime.ONE_KEYSTROKE = 0.0
        try:
            with Signals() as signals, signals.deferred():
                pipe.send("ready")
                while signals.number is None:
                    time.sleep(0.005)
                pipe.send("noted")
                time.sleep(LONG)
        finally:
            pipe.send("orderly end")

    mine, other = FORK.Pipe()
    process = FORK.Process(target=stubborn, args=(other,), daemon=True)
    process.start()
    other.close()
    for word in ("ready", "noted"):
        assert mine.poll(LONG)
        assert mine.recv() == word
        os.kill(process.pid, signal.SIGINT)
    process.join(LONG)
    assert process.exitcode == 130
    with pytest.raises(EOFError):  # nothing was cleaned up
        mine.recv()
