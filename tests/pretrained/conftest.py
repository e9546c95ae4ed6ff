"""A fit by the command line that is to be refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_tex.cli import main


@pytest.fixture
def fit_in(capsys, monkeypatch):
    """Tries a fit that is to be refused, in a folder that is to stay as it is; what is told."""
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of calls that Lightning makes
    monkeypatch.setattr("sys.argv", ["lightning-tex"])

    def tried(here: Path, *words: str) -> str:
        monkeypatch.chdir(here)
        before = sorted(here.rglob("*"))
        with pytest.raises(SystemExit, match="2"):
            main(["fit", "--config", str(Path(__file__).parents[2] / "recipes" / "finetune.yaml"), *words])
        *_, told = capsys.readouterr().err.strip().splitlines()
        assert told.startswith("error: ") and sorted(here.rglob("*")) == before
        return told

    return tried
