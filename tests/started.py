"""A fixture for tests of the command line; a folder's conftest imports it for all tests there."""

import sys

import pytest


@pytest.fixture(autouse=True, scope="module")
def as_started_by_a_user():
    """No words of pytest's own command line, no notes about calls that Lightning makes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lightning-tex"])
        patch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
        yield
