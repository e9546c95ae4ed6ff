"""``lightning-tex data``: show what a recipe's model sees: its tokens, which of them it learns, where documents end."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from rich.console import Console
from rich.rule import Rule
from rich.text import Text
from torch import Tensor

from lightning_tex.cli.options import Command, Count, run_one_of
from lightning_tex.data.token_ids import IGNORE_INDEX
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.recipe import Recipe, quiet

_WIDTH = 80  # where there is no terminal
_LEARNT, _SEEN = "bold green", "dim"
_ROWS = Count(2)

Piece = tuple[bool, list[int]]  # whether it is learnt, and tokens


@dataclass(frozen=True)
class ShowOptions:
    """What is shown.

    Args:
        config: the recipe.
        split: whose first batch.
        rows: of the batch at most.
        no_color: mark what is learnt by signs, as where the output is no terminal.
    """

    config: str
    split: Literal["train", "validation"] = "train"
    rows: Count = _ROWS
    no_color: bool = False


def show(options: ShowOptions, more: list[str]) -> dict[str, Any]:
    """Print rows of a recipe's first batch as the model sees them: what is learnt, what is only seen, and where
    documents end. Further options are the recipe's own, such as --data.path DIR.
    """
    data: Any = Recipe(options.config, more).datamodule()
    if data is None:
        raise UserValueError(f"recipe {options.config} leaves the data to its model; legal: a recipe with data")
    with quiet():
        data.prepare_data()
        data.setup("fit")
        loader = data.train_dataloader() if options.split == "train" else data.val_dataloader()
        batch = next(iter(loader), None)
    if not isinstance(batch, Mapping) or not {"input_ids", "labels"} <= batch.keys():
        raise UserValueError(
            f"the {options.split} batch of {type(data).__name__} is {type(batch).__name__}; legal: one with input_ids "
            "and labels"
        )
    plain = options.no_color or not sys.stdout.isatty()
    out = Console(width=_WIDTH if not sys.stdout.isatty() else None, no_color=plain, highlight=False, markup=False)
    decode = data.decode if hasattr(data, "decode") else _numbers
    rows, length = batch["input_ids"].shape
    out.print(f"{type(data).__name__}, the first {options.split} batch: {rows} rows of {length} positions")
    for line in data.prepared.describe() if hasattr(data, "prepared") else []:
        out.print(line)
    out.print(Text.assemble("learnt: ", _text(True, "so", plain), "; only seen: ", _text(False, "so", plain)))
    shown = [_show_row(out, batch, row, decode, plain) for row in range(min(options.rows, rows))]
    return {"rows": rows, "positions": length, "shown": shown}


def documents_of(batch: Mapping[str, Tensor], row: int) -> list[list[Piece]]:
    """The documents of a row, each as pieces that are learnt or only seen, in turns.

    A token is learnt where it is the label of the one before. The label of a document's last input is a token of its
    own, which stands in no input.
    """
    mask = batch.get("attention_mask")
    segments = batch.get("segments")
    places = range(batch["input_ids"].shape[1]) if mask is None else mask[row].nonzero().flatten().tolist()
    numbers = [0] * batch["input_ids"].shape[1] if segments is None else segments[row].tolist()
    ids, labels = batch["input_ids"][row].tolist(), batch["labels"][row].tolist()
    return [_pieces([ids[p] for p in ps], [labels[p] for p in ps]) for ps in _groups(places, numbers)]


def _groups(places: Sequence[int], numbers: Sequence[int]) -> Iterator[list[int]]:
    for _, group in groupby(places, lambda place: numbers[place]):
        yield list(group)


def _pieces(ids: list[int], labels: list[int]) -> list[Piece]:
    learnt = [False, *(label == token for label, token in zip(labels, ids[1:], strict=False))]
    tokens = list(zip(learnt, ids, strict=True))
    if labels[-1] != IGNORE_INDEX:
        tokens.append((True, labels[-1]))
    return [(key, [token for _, token in group]) for key, group in groupby(tokens, lambda pair: pair[0])]


def _show_row(out: Console, batch: Mapping[str, Tensor], row: int, decode: Any, plain: bool) -> dict[str, int]:
    documents = documents_of(batch, row)
    learnt = sum(len(tokens) for pieces in documents for is_learnt, tokens in pieces if is_learnt)
    mask = batch.get("attention_mask")
    padding = 0 if mask is None else int((mask[row] == 0).sum())
    sample = f" (sample {int(batch['sample'][row])})" if "sample" in batch else ""
    facts = {"documents": len(documents), "learnt": learnt, "padding": padding}
    out.print()
    out.print(f"row {row}{sample}: {facts['documents']} documents, {learnt} tokens learnt, {padding} of padding")
    for number, pieces in enumerate(documents):
        out.print(Rule(f"document {number}", align="left", characters="-" if plain else "─"))
        out.print(Text.assemble(*(_text(is_learnt, decode(tokens), plain) for is_learnt, tokens in pieces)))
    return facts


def _text(learnt: bool, text: str, plain: bool) -> Text:
    printable = "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
    if plain:
        return Text(f"«{printable}»" if learnt else printable)
    return Text(printable, _LEARNT if learnt else _SEEN)


def _numbers(tokens: Sequence[int]) -> str:
    return " ".join(map(str, tokens)) + " "


COMMANDS = [Command("data show", show, (ShowOptions,), takes_recipe=True)]


def main(words: Sequence[str]) -> None:
    """Run it.

    Args:
        words: what follows ``data`` on the command line.
    """
    run_one_of("data", COMMANDS, words)
