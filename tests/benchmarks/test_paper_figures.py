"""``benchmarks/paper_figures.py``: the paper's figures with what the differences come from, and a plot."""

from __future__ import annotations

from pathlib import Path

import paper
import paper_figures
import pytest


def test_figures_reasons_and_plot(capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper, "_largest", lambda: paper._largest_of((128,), (16,)))
    paper_figures.main(["--plot", str(tmp_path / "paper.png")])
    printed = capsys.readouterr().out
    for word in ("38.9", "4.29*", "v1's 21 %", "26 % of time saved", "20 -> 27 %", "biases"):
        assert word in printed, word
    assert (tmp_path / "paper.png").stat().st_size > 10_000
