"""Runs of a Trainer on forked ranks: one, or several on the same processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from helpers.cases import case
from helpers.trainers import silence
from lightning_tex.testing.ranks import run_ranks


def on_ranks(world: int, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """``function(*args)`` by rank, as ``run_ranks`` gives it, without Lightning's advice in the output."""
    return run_ranks(world, _quietly, function, args, timeout=timeout)


def together(world: int, runs: Mapping[Any, tuple[Any, ...]], timeout: float = 120) -> dict[Any, list[Any]]:
    """Some (function, arguments), one after the other on the same processes: by key, then by rank."""
    by_rank = on_ranks(world, _one_by_one, runs, timeout=timeout)
    return {key: [results[key] for results in by_rank] for key in runs}


def _quietly(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    silence()
    return function(*args)


def _one_by_one(runs: Mapping[Any, tuple[Any, ...]]) -> dict[Any, Any]:
    launched, results = dict(os.environ), {}
    for key, (function, *args) in runs.items():
        os.environ.update(launched)  # a Trainer ends with what told it that its processes exist
        with case(key):
            results[key] = function(*args)
    return results
