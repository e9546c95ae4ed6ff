"""Tests on a GPU: they skip themselves elsewhere.

``LIGHTNING_TEX_TEST_COMPILE=1`` runs them with compiled leaves, which costs a minute of compiling.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from helpers.on_a_gpu import IS_GPU, leave_the_world

from lightning_tex.parallel.compiled import compile_leaves
from lightning_tex.parallel.device import pretend_device


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if IS_GPU and not torch.cuda.is_available():
        for item in items:
            if item.path.is_relative_to(Path(__file__).parent):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    compile_leaves(bool(os.environ.get("LIGHTNING_TEX_TEST_COMPILE")))
    with nullcontext() if IS_GPU else pretend_device("cuda"):
        yield
    compile_leaves("auto")
    if IS_GPU and torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("default")
    leave_the_world()
