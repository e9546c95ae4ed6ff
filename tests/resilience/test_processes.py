"""How a process ended, as others than its parent see it."""

from __future__ import annotations

import faulthandler
import os
import socket
import subprocess
import sys

import pytest

from lightning_tex.resilience.processes import ProcessId, _stat, end_process_at_the_latest

WAYS = {"sys.exit(3)": "ended with exit code 3", "os.kill(os.getpid(), 15)": "was killed by SIGTERM"}


@pytest.mark.parametrize("way", WAYS)
def test_an_ended_process_tells_how_until_its_parent_asks(way: str) -> None:
    child = subprocess.Popen([sys.executable, "-c", f"import os, sys; input(); {way}"], stdin=subprocess.PIPE)
    process = ProcessId(socket.gethostname(), child.pid, int(_stat(child.pid)[19]))
    assert process.ending(within=0.0) == ""
    assert child.stdin is not None
    child.stdin.write(b"\n")
    child.stdin.flush()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process.ending() == WAYS[way]
    child.communicate()
    assert process.ending() == ""
    assert process._replace(host="elsewhere").ending() == ""


def test_no_room_for_a_thread_does_not_keep_the_monitor_from_ending_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("unable to start watchdog thread")

    monkeypatch.setattr(faulthandler, "dump_traceback_later", refuse)
    end_process_at_the_latest(60)
