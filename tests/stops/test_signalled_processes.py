"""Signals from outside, to processes as users start them: exit codes, a complete checkpoint, no process left."""

from __future__ import annotations

import os
import pty
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import checkpoint_runs, stopped_runs
from helpers.signalled_runs import EPOCHS, LAYOUTS, VALIDATES, Slow, saves
from helpers.stopped_runs import fit
from helpers.stops import Ending, print_to_descriptors, run_command, run_to_its_end, to_the_end
from helpers.trainers import silence
from lightning.pytorch.callbacks import TQDMProgressBar

from lightning_tex.saving import latest

TERM, INT, USR1, HUP = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP
CODES = {TERM: 143, INT: 1, USR1: 138, HUP: 129}
GOES_ON: dict[str, Any] = {"deed": "goes on", "rank": 0, "step": 1}


def sends(ranks: list[int], number: int, times: int = 1) -> Callable[[dict[int, int]], None]:
    def send(processes: dict[int, int]) -> None:
        for _ in range(times):
            for rank in ranks:
                os.kill(processes[rank], number)
            time.sleep(0.1)

    return send


def stopped(
    folder: Path,
    ranks: list[int],
    number: int,
    times: int = 1,
    launcher: str = "own",
    incident: dict[str, Any] = GOES_ON,
) -> Ending:
    def run() -> None:
        fit(incident, callbacks=(Slow(0.2),))

    return run_to_its_end(4, run, folder=folder, launcher=launcher, within=20, meanwhile=sends(ranks, number, times))


def assert_stopped(ending: Ending, folder: Path, number: int) -> None:
    assert not ending.left, ending.text
    assert ending.codes == dict.fromkeys(range(4), CODES[number]), ending
    newest = latest(folder / "checkpoints")
    assert newest is not None and newest.name.startswith("stopped-step="), ending.text
    assert "is done" not in ending.text
    assert "Traceback" not in ending.text
    assert ending.text.count("lightning_tex: saved") == 1, ending.text


def test_the_rank_that_started_the_others(tmp_path: Path) -> None:
    assert_stopped(stopped(tmp_path, [0], TERM), tmp_path, TERM)


@pytest.mark.faults
@pytest.mark.parametrize("launcher", ["own", "external"])
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("ranks", [[0], [3], [0, 1, 2, 3]], ids=str)
@pytest.mark.parametrize("number", [TERM, INT, USR1, HUP], ids=str)
def test_some_ranks(tmp_path: Path, number: int, ranks: list[int], times: int, launcher: str) -> None:
    assert_stopped(stopped(tmp_path, ranks, number, times, launcher=launcher), tmp_path, number)


@pytest.mark.parametrize(
    "number", [TERM, *(pytest.param(n, marks=pytest.mark.faults) for n in (INT, USR1, HUP))], ids=str
)
def test_the_whole_process_group_with_workers_of_loaders(tmp_path: Path, number: int) -> None:
    """As schedulers do, and a terminal's Ctrl-C."""

    def to_all(processes: dict[int, int]) -> None:
        os.killpg(os.getpgid(processes[0]), number)

    def run() -> None:
        fit(GOES_ON, callbacks=(Slow(0.2),), workers=1)

    ending = run_to_its_end(4, run, folder=tmp_path, within=20, meanwhile=to_all)
    assert_stopped(ending, tmp_path, number)
    assert ending.text.count("all ranks stop after this step") == 4, ending.text


def shown_fit(folder: Path, *bars: Any) -> None:
    print_to_descriptors()
    silence()
    torch.set_num_threads(1)
    callbacks = [saves(str(folder)), Slow(0.2), *bars]
    checkpoint_runs.fit(LAYOUTS[1], 1, EPOCHS, callbacks=callbacks, enable_progress_bar=True, **VALIDATES)


def in_a_terminal() -> tuple[int, int]:
    """As :func:`pty.fork`."""
    return pty.fork()


def before_a_pipe() -> tuple[int, int]:
    """The same, but what is printed goes through a pipe, as to ``tee``."""
    reading, writing = os.pipe()
    if process := os.fork():
        os.close(writing)
        return process, reading
    os.close(reading)
    os.dup2(writing, 1)
    os.dup2(writing, 2)
    os.close(writing)
    return 0, -1


@pytest.mark.parametrize(
    ("fork", "bars"), [(in_a_terminal, []), (before_a_pipe, [TQDMProgressBar()])], ids=["terminal", "pipe"]
)
def test_a_terminal_that_hangs_up_while_a_progress_bar_is_drawn(
    tmp_path: Path, fork: Callable[[], tuple[int, int]], bars: list[Any]
) -> None:
    process, shown_at = fork()
    if process == 0:
        to_the_end(lambda: shown_fit(tmp_path, *bars))
    shown, read = b"", b"something"
    while read and b"2/6" not in shown:
        shown += (read := os.read(shown_at, 1000))
    if fork is before_a_pipe:
        os.kill(process, HUP)
    os.close(shown_at)
    _, status = os.waitpid(process, 0)
    newest = latest(tmp_path)
    assert newest is not None and newest.name.startswith("stopped-step="), shown
    assert os.waitstatus_to_exitcode(status) == CODES[HUP]


@pytest.mark.parametrize(("rank", "busy"), [pytest.param(0, 0, marks=pytest.mark.faults), (2, 2), (1, 2)], ids=str)
def test_a_third_signal_ends_at_once(tmp_path: Path, rank: int, busy: int) -> None:
    """Also a rank that waits for another one in a collective."""
    ending = stopped(tmp_path, [rank], TERM, times=3, incident={"deed": "busy", "rank": busy})
    assert not ending.left and 0 not in ending.codes.values(), ending
    assert ending.codes[rank] == CODES[TERM]
    assert ending.took_less_than(5), ending
    assert "for the third time: ends at once" in ending.text


@pytest.mark.faults
@pytest.mark.parametrize("number", [TERM, INT], ids=str)
def test_torchrun(tmp_path: Path, number: int) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    script = [stopped_runs.__file__, '{"deed": "goes on", "rank": 0, "step": 1}', "0.2"]

    def to_the_agent(_: dict[int, int]) -> None:
        (agent,) = (int(path.name.removeprefix("rank.")) for path in tmp_path.glob("rank.*"))
        os.kill(agent, number)

    ending = run_command([*launch, *script], folder=tmp_path, within=30, meanwhile=to_the_agent)
    assert not ending.left, ending.text
    assert ending.codes[0] != 0
    newest = latest(tmp_path / "checkpoints")
    assert newest is not None and newest.name.startswith("stopped-step="), ending.text
