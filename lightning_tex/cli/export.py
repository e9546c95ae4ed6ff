"""``lightning-tex export``: the model of a checkpoint as a folder that transformers loads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning_tex.cli.options import Command
from lightning_tex.cli.tables import tell_line
from lightning_tex.models.exporting import SHARD_SIZE, export


@dataclass(frozen=True)
class ExportOptions:
    """Which model, and as what.

    Args:
        checkpoint: a checkpoint of a LanguageModel, directory or plain file, of any layout.
        folder: is made.
        dtype: of the weights; left out: as the published model has it that it began from, or as they are.
        max_shard_size: of one file.
        tokenizer: a folder or file whose tokenizer goes along; left out: that of the published model.
    """

    checkpoint: str
    folder: Path
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    max_shard_size: str = SHARD_SIZE
    tokenizer: Path | None = None


def export_checkpoint(options: ExportOptions) -> dict[str, Any]:
    """Write the model of a checkpoint as a folder that transformers loads; one process, whatever the layout was."""
    written = export(
        options.checkpoint, options.folder, options.dtype, options.max_shard_size, options.tokenizer
    )  # fmt: skip
    tell_line(
        f"{options.folder}: {written['family']}, {written['parameters']:,} parameters in {written['dtype']}, from "
        f"{options.checkpoint}"
    )
    return {"folder": str(options.folder), **written}


COMMAND = Command("export", export_checkpoint, (ExportOptions,), takes_path=True)


def main(words: Sequence[str]) -> None:
    """Run it.

    Args:
        words: what follows ``export`` on the command line.
    """
    COMMAND(words)
