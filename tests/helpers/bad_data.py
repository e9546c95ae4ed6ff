"""A small data module of a folder, and what it says when it refuses what lies there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_tex.data import TextDataModule
from lightning_tex.errors import UserError

TEXT = "the token of a data rank "


def data_of(corpus: Path, **options: Any) -> TextDataModule:
    settings = {"vocab_size": 300, "sequence_length": 16, "global_batch_size": 2}
    return TextDataModule(str(corpus), cache_dir=str(corpus.parent / "cache"), **{**settings, **options})


def read(data: TextDataModule) -> None:
    data.prepare_data()
    for batches in (data.train_dataloader(), data.val_dataloader()):
        for _ in batches:
            pass


def refused(data: Callable[[], TextDataModule]) -> str:
    with pytest.raises(UserError) as caught:
        read(data())
    return str(caught.value)


def overwrite(file: Path, at: int, content: bytes) -> None:
    """Through the file's name: what others have mapped changes too."""
    with file.open("r+b") as opened:
        opened.seek(at)
        opened.write(content)
