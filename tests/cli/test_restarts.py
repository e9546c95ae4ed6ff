"""A command that begins again after a failure: how often, with which words, and when not."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from helpers.forked import forked
from helpers.stopwatch import Stopwatch

from lightning_tex.cli import restarts
from lightning_tex.cli.main import main

# Ends with the next of the exit codes it is given.
COMMAND = """
import pathlib, sys
begun = pathlib.Path(sys.argv[1])
attempt = len(begun.read_text()) if begun.exists() else 0
begun.write_text("x" * (attempt + 1))
raise SystemExit(int(sys.argv[2 + attempt]))
"""


@pytest.mark.parametrize(
    ("codes", "allowed", "ends", "attempts"),
    [
        ([1, 1, 0], 5, 0, 3),
        ([1, 9, 1], 2, 1, 3),
        ([2, 0], 5, 2, 1),  # wrong options stay wrong
        ([143, 0], 5, 143, 1),  # asked to stop
        ([129, 0], 5, 129, 1),
        ([130, 0], 5, 1, 1),
    ],
)
def test_attempts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codes: list[int], allowed: int, ends: int, attempts: int
) -> None:
    monkeypatch.setattr(restarts, "_PAUSE", 0.0)
    begun = tmp_path / "begun"
    handlers = {number: signal.getsignal(number) for number in restarts._SIGNALS}
    try:
        command = [sys.executable, "-c", COMMAND, str(begun), *map(str, codes)]
        assert restarts._Attempts(command, allowed).run() == ends
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert len(begun.read_text()) == attempts


def attempts_that_wait() -> None:
    waits = "import time; print('waits', flush=True); time.sleep(600)"
    raise SystemExit(restarts._Attempts([sys.executable, "-c", waits], 5).run())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_attempt_and_all_of_it(number: int) -> None:
    with forked(attempts_that_wait) as (process, output):
        assert output.readline() == "waits\n"
        assert process.pid is not None
        watch = Stopwatch()
        os.kill(process.pid, number)
        process.join(timeout=300)
        assert process.exitcode == 128 + number, "before the attempt would have ended by itself"
        assert output.read() == "", "all of it has closed its output"
        assert watch.elapsed().is_within(10)


def test_the_first_attempt_goes_on_from_what_is_there() -> None:
    assert restarts._from_newest(["fit", "--config", "r.yaml"])[-2:] == ["--ckpt_path", "auto"]
    assert restarts._from_newest(["fit", "--ckpt_path=last"]) == ["fit", "--ckpt_path=last"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--restarts", "many"], "--restarts many; legal: a whole number"),
        (["--restarts"], "legal: a whole number"),
        (["--restarts=2", "--ckpt_path", "runs/a.ckpt"], "--restarts with --ckpt_path runs/a.ckpt"),
    ],
)
def test_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["fit", *words])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_under_a_launcher(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(os.environ, "TORCHELASTIC_RUN_ID", "run")
    with pytest.raises(SystemExit):
        main(["fit", "--restarts", "2"])
    assert "torchrun --max-restarts" in capsys.readouterr().err
