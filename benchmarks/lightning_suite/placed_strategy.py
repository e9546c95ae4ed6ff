"""A pytest plugin: Lightning's tests run under another strategy than the single CPU device they would choose.

``LIGHTNING_SUITE_STRATEGY`` names it (a key of ``STRATEGIES``), ``LIGHTNING_SUITE_RESULTS`` is the file that every
test's outcome is written to as a line, as soon as it is known, ``LIGHTNING_SUITE_KNOWN`` one that names tests not to be
run. Strategies that a test names itself stay.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities import cloud_io
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector

from lightning_tex import TexMoEStrategy
from lightning_tex.saving import consolidated
from lightning_tex.saving.manifest import MANIFEST

STRATEGIES: dict[str, Callable[[], Strategy | str] | None] = {
    "auto": None,
    "ddp": DDPStrategy,
    "tex_moe": TexMoEStrategy,
    "tex_moe_plain": lambda: TexMoEStrategy(save_distributed_checkpoint=False),
    "tex_moe_consolidated": TexMoEStrategy,
}


def pytest_configure(config: pytest.Config) -> None:
    """Put the strategy in the place of the connector's choice."""
    config.addinivalue_line("markers", "flaky: of pytest-rerunfailures, which need not be installed")
    name = os.environ["LIGHTNING_SUITE_STRATEGY"]
    make = STRATEGIES[name]
    if make is None:
        return
    if name == "tex_moe_consolidated":
        _take_directories_for_files()
    choose = _AcceleratorConnector._choose_strategy

    def placed(connector: Any) -> Strategy | str:
        chosen = choose(connector)
        single = isinstance(chosen, SingleDeviceStrategy) and chosen.root_device.type == "cpu"
        return make() if single else chosen

    _AcceleratorConnector._choose_strategy = placed  # type: ignore[method-assign]


def _take_directories_for_files() -> None:
    """Let loads and ``os.path.isfile`` of tests do with directories what tests of these would call instead."""
    is_file = os.path.isfile

    def or_consolidated(load: Callable[..., Any]) -> Callable[..., Any]:
        def load_either(path: Any, *arguments: Any, **options: Any) -> Any:
            if isinstance(path, (str, os.PathLike)) and os.path.isdir(path):
                return consolidated(path, trusted=options.get("weights_only") is False)
            return load(path, *arguments, **options)

        return load_either

    def is_file_or_checkpoint(path: Any) -> bool:
        return is_file(path) or is_file(os.path.join(path, MANIFEST))

    torch.load = or_consolidated(torch.load)
    cloud_io._load = or_consolidated(cloud_io._load)
    os.path.isfile = is_file_or_checkpoint  # type: ignore[assignment]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    known = set(json.loads(Path(os.environ["LIGHTNING_SUITE_KNOWN"]).read_text()))
    items[:] = [item for item in items if item.nodeid not in known]


def pytest_runtest_logstart(nodeid: str) -> None:
    _write({"test": nodeid, "outcome": "running", "error": ""})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        _write({"test": report.nodeid, "outcome": "failed", "error": _first_line(report)})
    elif report.skipped:
        _write({"test": report.nodeid, "outcome": "skipped", "error": ""})
    elif report.when == "call":
        _write({"test": report.nodeid, "outcome": "passed", "error": ""})


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _write({"test": report.nodeid, "outcome": "failed", "error": str(report.longrepr).splitlines()[-1]})


def _first_line(report: pytest.TestReport) -> str:
    """The error's first line, without what differs between runs."""
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = (crash.message if crash is not None else str(report.longrepr)).splitlines()
    line = next((line for line in lines if line.strip()), "")
    return re.sub(r"0x[0-9a-f]+|/tmp/\S*", "..", line)[:300]


def _write(entry: dict[str, str]) -> None:
    with Path(os.environ["LIGHTNING_SUITE_RESULTS"]).open("a") as file:
        file.write(json.dumps(entry) + "\n")
