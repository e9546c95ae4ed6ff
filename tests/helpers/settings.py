"""Settings of every process that runs tests, as a plugin of pytest."""

import gc
from collections.abc import Iterator
from functools import cache

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, settings
from lightning.fabric.utilities import registry

from helpers.first_fit import fit_once

# Tests fork ranks, which must not inherit a started thread pool.
torch.set_num_threads(1)

# Other jobs share the machine: a slow example is no failure.
settings.register_profile("shared machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared machine")

# Every Trainer asks which installed packages have callbacks for it: a tenth of the time of setting up a small fit.
registry.entry_points = cache(registry.entry_points)
registry.entry_points(group="lightning.pytorch.callbacks_factory")


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
