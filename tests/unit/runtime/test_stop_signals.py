"""Stop signals of a start: any number of them is one request, and none leaves a word on standard error."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

# A process of its own: signals belong to the main thread, and Python writes its complaint to the process's own stderr.
PROGRAM = """
import signal, sys, time
from megatron_qwenvl.runtime.stop_signals import StopRequest, exit_on_stop_signals

def ask(*numbers):
    for number in numbers:
        signal.raise_signal(number)
        time.sleep(0.05)  # the thread that waits for signals runs

{body}
"""


def run(body: str) -> subprocess.CompletedProcess[str]:
    """Run `body` in a process that imports nothing heavy."""
    program = PROGRAM.format(body=textwrap.dedent(body))
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("early", ["", "ask(signal.SIGUSR1)"])
def test_more_signals_during_the_start_change_nothing(early: str) -> None:
    """Also where the first one comes before the start's limit is in place."""
    ended = run(f"""
        stop = StopRequest.listen()
        {early}
        stop.limit_start(60, lambda name: sys.exit("left"))
        ask(signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGINT)
        assert (stop.name, stop.received_before_start) == ("SIGUSR1", True)
        stop.started()
        ask(signal.SIGTERM, signal.SIGUSR1)
        assert (stop.name, stop.received_before_start) == ("SIGUSR1", False)
    """)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_start_that_does_not_end_is_left_whatever_else_comes() -> None:
    ended = run("""
        import os
        stop = StopRequest.listen()
        stop.limit_start(0.5, lambda name: os._exit(75 if name == "SIGUSR1" else 1))
        ask(*[signal.SIGUSR1, signal.SIGTERM] * 4)
        time.sleep(60)
    """)
    assert (ended.returncode, ended.stderr) == (75, "")


def test_signals_to_a_tool_at_the_same_moment_are_one() -> None:
    """As from a terminal or a cluster's daemon, and passed on by a parent."""
    ended = run("""
        exit_on_stop_signals("tool", 60)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.raise_signal(number)
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, [])
        finally:
            time.sleep(0.05)  # it cleans up
            # Python complains, but not always, of a signal that is on its way when it begins to be ignored.
            assert signal.SIG_IGN not in map(signal.getsignal, (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT))
    """)
    assert ended.stderr.startswith("tool: interrupted by SIG") and len(ended.stderr.splitlines()) == 1


def test_more_signals_to_a_tool_change_nothing() -> None:
    ended = run("""
        exit_on_stop_signals("tool", 60)
        try:
            ask(signal.SIGTERM)
        finally:
            ask(signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    """)
    assert (ended.returncode, ended.stderr) == (75, "tool: interrupted by SIGTERM\n")
