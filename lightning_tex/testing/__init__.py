"""Proof that a module trains alike on every layout, for your tests: ranks as forked processes, and the comparison."""

from lightning_tex.testing.alike import TOLERANCES, assert_trains_alike, compare_layouts
from lightning_tex.testing.differences import Difference
from lightning_tex.testing.layouts import Run, legal_layouts
from lightning_tex.testing.ranks import RanksFailed, run_ranks
from lightning_tex.testing.verdict import Verdict

__all__ = [
    "TOLERANCES",
    "Difference",
    "RanksFailed",
    "Run",
    "Verdict",
    "assert_trains_alike",
    "compare_layouts",
    "legal_layouts",
    "run_ranks",
]
