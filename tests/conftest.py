"""Settings of every test."""

import gc
import os
import signal
from collections.abc import Iterator
from functools import cache

import pytest
import torch
import torch.distributed as dist
from helpers.first_fit import fit_once
from hypothesis import HealthCheck, settings
from lightning.fabric.utilities import registry

# A run under nohup ignores hang-ups, and so would processes that tests hang up on.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

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
    """Of the default suite three to two processors, each with a file at a time: some tests wait more than they compute.

    None for what is asked for by name, which begins at once in this process, and for grids, faults and GPUs.
    """
    asked_for = config.args_source is pytest.Config.ArgsSource.ARGS or config.option.keyword
    own_choice = config.option.markexpr not in config.getini("addopts")
    if asked_for or own_choice or torch.cuda.is_available():
        return 0
    processors = len(os.sched_getaffinity(0))
    return min(processors + processors // 2, MOST_WORKERS)


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is imported stays: no collection of garbage needs to walk it again."""
    if session.items and not session.config.option.collectonly:
        fit_once()
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_process_group_is_left() -> Iterator[None]:
    """Ranks that are forked from here later would share its store's connection, and take its size for theirs."""
    yield
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        pytest.fail("a process group is left in the process of the tests; legal: helpers.ranks.on_ranks(1, ..)")


@pytest.fixture(autouse=True, scope="module")
def _what_was_imported_for_it_stays_too() -> None:
    """Likewise, what was imported since, before each module of tests; what errors have kept alive is let go of."""
    gc.collect()
    gc.freeze()
