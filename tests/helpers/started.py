"""Fixtures for tests of the command line; a folder's conftest imports them for all tests there."""

import sys
from pathlib import Path

import pytest

from helpers import tiny_recipe


@pytest.fixture(autouse=True, scope="module")
def as_started_by_a_user():
    """No words of pytest's own command line, no notes about calls that Lightning makes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lightning-tex"])
        patch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
        yield


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """A small recipe, over a folder of text."""
    return tiny_recipe.write_recipe(tmp_path_factory.mktemp("recipe"))
