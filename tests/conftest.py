"""Settings of every test."""

import gc
import os
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, settings
from lightning.fabric.utilities import registry

# Tests fork ranks, which must not inherit a started thread pool.
torch.set_num_threads(1)

# Other jobs share the machine: a slow example is no failure.
settings.register_profile("shared machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared machine")

# Every Trainer asks which installed packages have callbacks for it: a tenth of the time of setting up a small fit.
registry.entry_points = cache(registry.entry_points)
registry.entry_points(group="lightning.pytorch.callbacks_factory")


MOST_WORKERS = 8  # each takes 5 s to begin


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """The default suite runs on all processors, a file at a time on each. What is asked for by name, and what takes a
    GPU or a limit of time to itself, runs in this process, which begins at once."""
    asked_for = config.args_source is pytest.Config.ArgsSource.ARGS or config.option.keyword
    own_choice = config.option.markexpr not in config.getini("addopts")
    if asked_for or own_choice or torch.cuda.is_available():
        return 0
    return min(len(os.sched_getaffinity(0)), MOST_WORKERS)


def keep_to_own_processors(worker: str, workers: int) -> None:
    """Let workers not take each other's processors, so that what a test waits for is its own."""
    own = sorted(os.sched_getaffinity(0))[int(worker.removeprefix("gw")) :: workers]
    if own:
        os.sched_setaffinity(0, own)


if "PYTEST_XDIST_WORKER" in os.environ:
    keep_to_own_processors(os.environ["PYTEST_XDIST_WORKER"], int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is imported stays: no collection of garbage needs to walk it again."""
    gc.collect()
    gc.freeze()
