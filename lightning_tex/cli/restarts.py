"""``lightning-tex fit --restarts N``: begin the command again after a failure, from the newest complete checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from lightning_tex.parallel.errors import UserValueError
from lightning_tex.resilience.signals import STOP_SIGNALS, SUPERVISED

OPTION = "--restarts"

# Between two attempts: time for a node's ports, files and devices to be free again.
_PAUSE = 1.0  # s

_SIGNALS = (*STOP_SIGNALS, signal.SIGUSR1)

# What a fit exits with when trying again would not help: done, wrong options, asked to stop.
_FINAL = {0, 2, *(128 + number for number in _SIGNALS)}

# Variables by which launchers tell a process its rank.
_LAUNCHED = ("LOCAL_RANK", "TORCHELASTIC_RUN_ID", "SLURM_PROCID")


def asks_for_restarts(words: Sequence[str]) -> bool:
    """Whether a command line has the option."""
    return any(word == OPTION or word.startswith(f"{OPTION}=") for word in words)


def fit_with_restarts(words: Sequence[str]) -> int:
    """Run a command until it ends by itself, N times more at the most; the last exit code.

    Every attempt starts all of this node's ranks anew. On several nodes each runs the same command: when a rank fails,
    the ranks of all nodes end, and all nodes begin again.

    Args:
        words: of the command line, with ``--restarts N``.

    Raises:
        ValueError: N is no number, the processes are started by another launcher, or a checkpoint is named.
    """
    restarts, words = _taken_out(words)
    launcher = next((name for name in _LAUNCHED if name in os.environ), None)
    if launcher is not None:
        raise UserValueError(
            f"{OPTION} {restarts}: these processes are started by a launcher ({launcher} is set), which has to start "
            "them again: TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --max-restarts N .., with --ckpt_path auto"
        )
    return _Attempts([*_command(), *_from_newest(words)], restarts).run()


def _taken_out(words: Sequence[str]) -> tuple[int, list[str]]:
    others, value = [], ""
    remaining = iter(words)
    for word in remaining:
        name, equals, given = word.partition("=")
        if name == OPTION:
            value = given if equals else next(remaining, "")
        else:
            others.append(word)
    if not value.isdigit():
        raise UserValueError(f"{OPTION} {value or '(nothing)'}; legal: a whole number, 0 or more")
    return int(value), others


def _from_newest(words: list[str]) -> list[str]:
    """The words with ``--ckpt_path auto``, so that the first attempt, too, goes on with what is there."""
    remaining = iter(words)
    for word in remaining:
        name, equals, given = word.partition("=")
        if name == "--ckpt_path":
            path = given if equals else next(remaining, "")
            if path not in ("auto", "last"):
                raise UserValueError(
                    f"{OPTION} with --ckpt_path {path}: a later attempt goes on from the newest complete checkpoint of "
                    "the run; legal: --ckpt_path auto (the default here) or last"
                )
            return words
    return [*words, "--ckpt_path", "auto"]


def _command() -> list[str]:
    return [sys.executable, "-m", "lightning_tex"]


class _Attempts:
    """One command, again and again; signals go to the attempt that runs, and end all of it."""

    def __init__(self, command: list[str], restarts: int) -> None:
        self._command, self._restarts = command, restarts
        self._attempt: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def run(self) -> int:
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN or number != signal.SIGHUP:  # as under nohup
                signal.signal(number, self._pass_on)
        for done in range(self._restarts + 1):
            # Its own group, or a Ctrl-C of the terminal would come twice.
            environment = {**os.environ, SUPERVISED: "1"}
            self._attempt = subprocess.Popen(self._command, env=environment, start_new_session=True)
            code = self._wait()
            if code in _FINAL or self._stopped or done == self._restarts:
                return 1 if code == 128 + signal.SIGINT else code
            print(
                f"lightning_tex: the run ended with exit code {code}; restart {done + 1} of {self._restarts}, from the "
                "newest complete checkpoint",
                file=sys.stderr,
                flush=True,
            )
            time.sleep(_PAUSE)
        raise AssertionError("the last attempt returns")

    def _wait(self) -> int:
        assert self._attempt is not None
        code = self._attempt.wait()
        return code if code >= 0 else 128 - code

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._stopped = True
        if self._attempt is not None:
            self._attempt.send_signal(number)
