"""``lightning-tex prepare``: a recipe's data, read, tokenised and written once, before it is trained on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_tex.cli.options import Command, Count
from lightning_tex.cli.tables import tell_line
from lightning_tex.data import TokenDataModule
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.recipe import Recipe, quiet


@dataclass(frozen=True)
class PrepareOptions:
    """What is prepared, and by how many.

    Args:
        config: the recipe.
        num_proc: processes; left out: as the recipe says, or as many as there are processors.
    """

    config: str
    num_proc: Count | None = None


def prepare(options: PrepareOptions, more: list[str]) -> dict[str, Any]:
    """Read, tokenise and write a recipe's data, which fit does at first use as well. Killed, it goes on where it was;
    started several times at once, on this machine or on others that share the cache, all take part. Further options are
    the recipe's own, such as --data.path DIR.
    """
    data = data_of(options.config, more)
    if options.num_proc is not None:
        data.num_proc = options.num_proc
    began = time.monotonic()
    with quiet():
        data.prepare_data()
        data.setup("fit")
    seconds = time.monotonic() - began
    said = data.prepared.describe()
    for line in said or ["a stream, which is tokenised while it is read; its tokenizer is there"]:
        tell_line(line)
    tell_line(f"fingerprint {data.prepared.fingerprint}, {seconds:.1f} s")
    return {"parts": said, "fingerprint": data.prepared.fingerprint, "seconds": seconds}


def data_of(config: str, more: Sequence[str]) -> TokenDataModule:
    """A recipe's data module.

    Raises:
        UserValueError: it has none of ours.
    """
    data = Recipe(config, more).datamodule()
    if not isinstance(data, TokenDataModule):
        has = "leaves the data to its model" if data is None else f"has a {type(data).__name__}"
        raise UserValueError(
            f"recipe {config} {has}; legal: a TextDataModule, a FineTuningDataModule, or one of theirs"
        )
    return data


COMMAND = Command("prepare", prepare, (PrepareOptions,), takes_recipe=True)


def main(words: Sequence[str]) -> None:
    """Run it.

    Args:
        words: what follows ``prepare`` on the command line.
    """
    COMMAND(words)
