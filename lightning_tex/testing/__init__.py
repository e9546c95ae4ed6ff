"""Proof that a module trains alike on every layout, for your tests: ranks as forked processes, and the comparison."""

from lightning_tex.testing.alike import TOLERANCES, Difference, Verdict, assert_trains_alike, compare_layouts
from lightning_tex.testing.layouts import legal_layouts
from lightning_tex.testing.ranks import run_ranks

__all__ = [
    "TOLERANCES",
    "Difference",
    "Verdict",
    "assert_trains_alike",
    "compare_layouts",
    "legal_layouts",
    "run_ranks",
]
