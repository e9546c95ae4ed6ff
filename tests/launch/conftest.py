"""Settings of every test of the command line."""

import sys
from pathlib import Path

import pytest
import tiny_recipe


@pytest.fixture(autouse=True, scope="module")
def _as_started_by_a_user():
    """No words of pytest's own command line, no notes about calls that Lightning makes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lightning-tex"])
        patch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
        yield


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return tiny_recipe.write_recipe(tmp_path_factory.mktemp("recipe"))
