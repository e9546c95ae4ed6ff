"""The closing summary names a way back only where there is one, and the one that is taken."""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
from helpers.checkpoint_runs import BATCH, Data, Model, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import Precision

import lightning_tex as tex
from lightning_tex.callbacks import RunSummary
from lightning_tex.models import DecoderConfig
from lightning_tex.testing.ranks import run_ranks


def _resume(folder: str, words: list[str], strategy: str, saving: dict[str, Any] | None, **limits: int) -> str | None:
    """What is printed after *resume*."""
    sys.argv = words
    callbacks: list[L.Callback] = [RunSummary()]
    if saving is not None:
        callbacks.append(ModelCheckpoint(folder, "{step}", **saving))
    chosen = tex.TexMoEStrategy() if strategy == "tex_moe" else strategy
    os.environ["COLUMNS"] = "1000"
    with redirect_stdout(StringIO()) as printed:
        trainer(chosen, 1, callbacks=callbacks, **limits).fit(Model(), Data())
    rows = [line.strip() for line in printed.getvalue().splitlines()]
    assert "Training finished" in rows
    return next((row.removeprefix("resume").strip() for row in rows if row.startswith("resume")), None)


CLI = ["/usr/bin/lightning-tex", "fit", "--config", "r.yaml", "--ckpt_path", "old.ckpt", "--ckpt_path=older.ckpt"]


def _cases(folder: str) -> dict[str, str | None]:
    return {
        "last": _resume(f"{folder}/last", CLI, "tex_moe", {"save_last": True}),
        "no last": _resume(f"{folder}/no last", CLI, "tex_moe", {}),
        "steps": _resume(f"{folder}/steps", ["train.py"], "tex_moe", {"every_n_train_steps": 2}, max_steps=2),
        "nothing": _resume(f"{folder}/nothing", CLI, "tex_moe", None),
        "weights": _resume(f"{folder}/weights", CLI, "tex_moe", {"save_weights_only": True}),
        "another's": _resume(f"{folder}/last", CLI, "tex_moe", {"save_top_k": 0}),
        "auto": _resume(f"{folder}/auto", CLI, "auto", {}),
        "auto nothing": _resume(f"{folder}/auto nothing", CLI, "auto", None),
    }


@pytest.fixture(scope="module")
def resumes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str | None]]:
    folder = tmp_path_factory.mktemp("summary")
    return folder, run_ranks(1, _quietly, str(folder))[0]


def _quietly(folder: str) -> dict[str, str | None]:
    warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
    return _cases(folder)


@pytest.mark.parametrize("case", ["last", "no last", "auto"])
def test_the_command_names_what_exists_and_is_newest(resumes: tuple[Path, dict[str, str | None]], case: str) -> None:
    folder, told = resumes
    words = shlex.split(told[case] or "")
    name = "last.ckpt" if case == "last" else f"step={Data().samples // BATCH}.ckpt"
    assert words[:4] == ["lightning-tex", "fit", "--config", "r.yaml"]
    assert words[4:] == ["--ckpt_path", str(folder / case / name), "--trainer.max_epochs", "2"]
    assert (folder / case / name).exists()


def test_a_script_is_told_the_call_and_the_limit_that_is_reached(resumes: tuple[Path, dict[str, str | None]]) -> None:
    folder, told = resumes
    path = folder / "steps" / "step=2.ckpt"
    assert told["steps"] == f"trainer.fit(model, data, ckpt_path={str(path)!r}), after Trainer(max_steps=4)"


@pytest.mark.parametrize("case", ["nothing", "weights", "another's", "auto nothing"])
def test_nothing_is_said_where_this_run_saved_no_whole_state(
    resumes: tuple[Path, dict[str, str | None]], case: str
) -> None:
    assert resumes[1][case] is None


@pytest.mark.parametrize(("router", "sample"), [("softmax", "10 tokens"), ("forced_balance", "none: decoder.blocks.0")])
def test_a_sample_has_as_many_tokens_as_positions_or_says_why_there_is_none(router: str, sample: str) -> None:
    sizes = {"max_sequence_length": 10, "num_experts": 2, "moe_every": 1, "hidden_dim": 8, "router": router}
    module = tex.LanguageModel(DecoderConfig(61, 8, 1, 2, **sizes))
    module.configure_model()
    data = SimpleNamespace(encode=lambda text: [1, 2, 3], decode=lambda ids: f"{len(ids)} tokens")
    of_trainer: Any = SimpleNamespace(datamodule=data, precision_plugin=Precision())
    assert RunSummary()._sample(of_trainer, module).startswith(sample)
