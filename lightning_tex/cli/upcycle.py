"""``lightning-tex upcycle``: a dense published model made into one of experts, which are copies of its MLPs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_tex.cli.options import Command
from lightning_tex.cli.tables import tell_line
from lightning_tex.models.exporting import SHARD_SIZE
from lightning_tex.models.upcycling import upcycle


@dataclass(frozen=True)
class UpcycleOptions:
    """Which model, and how.

    Args:
        dense: a folder, or a repository of the Hugging Face hub, of a dense model.
        folder: is made.
        num_experts: copies of each MLP.
        top_k: copies that a token uses.
        granularity: each copy is cut into so many experts, of which a token uses as many times more.
        shared_experts: the MLP is cut into so many parts more, which are in no copy, but one expert that every token
            uses.
        noise: standard deviation of what is added to each routed expert's weights, relative to theirs.
        seed: of noise and routers.
        revision: of a repository.
        max_shard_size: of one file.
    """

    dense: str
    folder: Path
    num_experts: int = 8
    top_k: int = 2
    granularity: int = 1
    shared_experts: int = 0
    noise: float = 0.0
    seed: int = 0
    revision: str | None = None
    max_shard_size: str = SHARD_SIZE


def make_experts(options: UpcycleOptions) -> dict[str, Any]:
    """Write a folder of a model whose experts are copies of a dense published model's MLPs."""
    o = options
    made = upcycle(
        o.dense, o.folder, o.num_experts, o.top_k, o.granularity, o.noise, o.seed, o.revision, o.max_shard_size,
        o.shared_experts,
    )  # fmt: skip
    tell_line(
        f"{o.folder}: {made['family']}, {made['parameters']:,} parameters, {made['num_experts']} experts in every "
        f"block, {made['top_k']} for each token{' and a shared one' if o.shared_experts else ''}, from {o.dense}"
    )
    return {"folder": str(o.folder), **made}


COMMAND = Command("upcycle", make_experts, (UpcycleOptions,), takes_path=True)


def main(words: Sequence[str]) -> None:
    """Run it.

    Args:
        words: what follows ``upcycle`` on the command line.
    """
    COMMAND(words)
