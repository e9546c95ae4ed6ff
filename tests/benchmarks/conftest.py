"""Tests here run the scripts of ``benchmarks/``."""

from helpers.started import as_started_by_a_user  # noqa: F401
