"""Tests here run the command line."""

from helpers.started import as_started_by_a_user  # noqa: F401
