"""What tests of stopped runs compare with."""

from typing import Any

import pytest
from helpers.signalled_runs import resumed_fit

from lightning_tex.testing.ranks import run_ranks


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The run on four ranks that nothing stops."""
    return run_ranks(4, resumed_fit, str(tmp_path_factory.mktemp("undisturbed")))


@pytest.fixture(scope="session")
def undisturbed_on_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The same on two ranks."""
    return run_ranks(2, resumed_fit, str(tmp_path_factory.mktemp("undisturbed")))
