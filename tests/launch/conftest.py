"""Settings of every test of the command line."""

from pathlib import Path

import pytest
import tiny_recipe
from started import as_started_by_a_user  # noqa: F401


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return tiny_recipe.write_recipe(tmp_path_factory.mktemp("recipe"))
