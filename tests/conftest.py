"""Settings of every test."""

import gc
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


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is imported stays: no collection of garbage needs to walk it again."""
    gc.collect()
    gc.freeze()
