"""Starts this node's other ranks, where nobody else does, and puts a frame around what every rank runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from lightning import Trainer
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.fabric.utilities.imports import _IS_INTERACTIVE
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_tex.resilience.children import LAUNCHER, Children, watch_parent
from lightning_tex.resilience.monitor import current_monitor

Frame = Callable[[Trainer], AbstractContextManager[None]]


class RankLauncher(_SubprocessScriptLauncher):
    """Runs what the Trainer was asked for (``fit``, ``validate``, ..) on every rank of this node, inside a frame.

    Lightning enters it first of all, and every error of a run passes it on its way out, before any hook or callback
    hears of it: what is to hold for whole runs belongs into the frame.

    Args:
        cluster_environment: who starts the processes, and where.
        num_processes: ranks on this node.
        num_nodes: nodes.
        frame: the context that every rank runs in.
    """

    def __init__(
        self, cluster_environment: ClusterEnvironment, num_processes: int, num_nodes: int, frame: Frame
    ) -> None:
        super().__init__(cluster_environment, num_processes, num_nodes)
        self._frame = frame
        self._children: Children | None = None
        watch_parent(cluster_environment.global_rank(), _connected)

    @property
    def starts_processes(self) -> bool:
        """Whether the node's other ranks are started here, and not by torchrun, SLURM or the like."""
        several = self.num_processes * self.num_nodes > 1
        return several and not self.cluster_environment.creates_processes_externally

    @property
    def is_interactive_compatible(self) -> bool:
        """Whether a notebook can run it: it has no script that other ranks could run."""
        return not self.starts_processes

    def require_script(self, strategy: str) -> None:
        """Raise ``MisconfigurationException`` where the other ranks have no script to run."""
        if self.starts_processes and _IS_INTERACTIVE:
            raise MisconfigurationException(
                f"{strategy} starts its {self.num_processes * self.num_nodes} processes by running the script again, "
                "and a notebook has none; legal here: devices=1; or run a script, lightning-tex or torchrun"
            )

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        """Start the other ranks if nobody else does, and run the function here."""
        assert trainer is not None

        def framed() -> Any:
            with self._frame(trainer):
                return function(*args, **kwargs)

        if self.starts_processes:
            self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
            self._start_processes()
            _set_num_threads_if_needed(num_processes=self.num_processes)
        return framed()

    def child_ending(self, pid: int) -> str:
        """How a rank that was started here has ended, by its process's number; empty where that is not known."""
        return "" if self._children is None else self._children.ending(pid)

    def _start_processes(self) -> None:
        os.environ[LAUNCHER] = str(os.getpid())
        try:
            self._call_children_scripts()
        finally:
            del os.environ[LAUNCHER]
        # In place of Lightning's observer, which looks every five seconds and kills without a word.
        self._children = Children(self.procs, self.cluster_environment.global_rank(), _connected)
        self._children.start()


def _connected() -> bool:
    return current_monitor() is not None
