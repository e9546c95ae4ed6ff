"""How many processes run the tests; their settings are in ``helpers/settings.py``."""

import importlib
import os
import signal
from pathlib import Path

import pytest

# A run under nohup ignores hang-ups, and so would processes that tests hang up on.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

MOST_WORKERS = 8  # each takes 5 s to begin


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Of the default suite three to two processors, each with a file at a time: some tests wait more than they compute.

    None for what is asked for by name, which begins at once in this process, and for grids, faults and GPUs.
    """
    asked_for = config.args_source is pytest.Config.ArgsSource.ARGS or config.option.keyword
    own_choice = config.option.markexpr not in config.getini("addopts")
    if asked_for or own_choice or Path("/dev/nvidiactl").exists():  # torch would tell, and takes its time
        return 0
    processors = len(os.sched_getaffinity(0))
    return min(processors + processors // 2, MOST_WORKERS)


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """The process that only hands tests out to workers needs nothing of what they import."""
    if not config.pluginmanager.hasplugin("dsession"):
        config.pluginmanager.register(importlib.import_module("helpers.settings"))
