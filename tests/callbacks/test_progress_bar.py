"""One line at any width; gone before the closing summary is printed."""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import lightning as L
import pytest
from helpers.checkpoint_runs import Data, Model
from helpers.ranks import on_ranks
from helpers.tiny_recipe import ON_ONE, write_recipe
from helpers.trainers import quiet
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from rich.progress import Progress

from lightning_tex.callbacks import OneLineProgressBar, RunSummary
from lightning_tex.recipe import DEFAULTS, TexCLI

LOGGED = {"tokens_per_second": 8551.409, "train_loss": 5.374, "val_loss": 5.16, "grad_norm": 0.1}


def drawn(columns: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """The bar of an epoch's last step."""
    monkeypatch.setenv("COLUMNS", str(columns))
    trainer, bar = quiet(), OneLineProgressBar()
    trainer.progress_bar_metrics.update(LOGGED)
    values = bar.get_metrics(trainer, Model())
    progress = Progress(*bar.configure_columns(trainer))
    task = progress.add_task("Epoch 12/99", total=2000, completed=2000, visible=True)
    columns_of_bar = [column(progress.tasks[task]) for column in progress.columns if column is not progress.columns[1]]
    width = sum(len(str(text)) + 1 for text in columns_of_bar) + (progress.columns[1].bar_width or 40)
    assert width + len(" ".join(f"{name}: {value:.3f}" for name, value in values.items())) < columns
    return " ".join(values)


def test_a_narrow_terminal_shows_losses_first_and_a_wide_one_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    assert drawn(80, monkeypatch) == "train_loss val_loss"
    assert drawn(200, monkeypatch) == " ".join(LOGGED)


def bar_of(*options: str) -> str | None:
    words = ["fit", "--config", *options, *ON_ONE]
    cli = TexCLI(**{**DEFAULTS, "run": False}, args=words[1:])
    bar = cli.trainer.progress_bar_callback
    return None if bar is None else type(bar).__name__


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ((), None),
        (("--trainer.enable_progress_bar=true",), "OneLineProgressBar"),
        (("--trainer.enable_progress_bar=true", "--trainer.callbacks+=TQDMProgressBar"), TQDMProgressBar.__name__),
    ],
    ids=["none", "ours", "the user's"],
)
def test_the_command_line_has_it_where_the_user_says_nothing(tmp_path: Any, options: Any, name: str | None) -> None:
    assert on_ranks(1, bar_of, str(write_recipe(tmp_path)), *options) == [name]


class Watched(ProgressBar):
    """Notes what is printed when it is ended."""

    def __init__(self, printed: StringIO) -> None:
        super().__init__()
        self.printed, self.before = printed, []

    def disable(self) -> None:
        """Nothing."""

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.before.append(self.printed.getvalue())


def summed_up() -> list[str]:
    with redirect_stdout(StringIO()) as printed:
        bar = Watched(printed)
        trainer = quiet(max_steps=1, callbacks=[RunSummary(), bar], enable_progress_bar=True, limit_val_batches=0)
        trainer.fit(Model(), Data())
    assert "Training finished" in printed.getvalue()
    return bar.before


def test_it_is_gone_before_the_summary() -> None:
    ((first, *_),) = on_ranks(1, summed_up)
    assert "Training finished" not in first
