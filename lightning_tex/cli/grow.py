"""``lightning-tex experts CHECKPOINT OUTPUT --split|--add|--remove|--remove_dead``: more or fewer experts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_tex.cli.options import Command
from lightning_tex.cli.tables import tell_line
from lightning_tex.models.exporting import SHARD_SIZE
from lightning_tex.models.growing import grow
from lightning_tex.models.growth import Add, Growth, Split
from lightning_tex.models.removal import Remove, dead_experts
from lightning_tex.parallel.errors import UserValueError

# Options that say what becomes of the experts.
WAYS = ("split", "add", "remove", "remove_dead")
# Further options, by the one that they belong to.
_PARTS_OF = {"granular": "split", "top_k": "split", "usage": "add"}


@dataclass(frozen=True)
class GrowOptions:
    """Which model, and what becomes of its experts.

    Args:
        checkpoint: a checkpoint of a LanguageModel, directory or plain file, of any layout; or a folder of a published
            model.
        output: is made: a checkpoint directory of weights, or a folder.
        split: every expert becomes so many copies.
        granular: with split, so many parts of its hidden units instead.
        top_k: with split, experts that a token uses; left out: so many times as many, with which logits stay equal.
        add: so many experts more, copies of others.
        remove: experts that go, by number, in every block; or as block:expert, as many of every block.
        remove_dead: expert_usage.json of `lightning-tex experts`: experts that nobody chose there go.
        usage: such a file, with add: the most used experts are copied.
        noise: standard deviation of what is added to copies, relative to their weights. Copies that are alike stay so.
        seed: of the noise.
        max_shard_size: of one file of a folder.
    """

    checkpoint: Path
    output: Path
    split: int | None = None
    granular: bool = False
    top_k: int | None = None
    add: int | None = None
    remove: list[str] = field(default_factory=list)
    remove_dead: Path | None = None
    usage: Path | None = None
    noise: float = 0.0
    seed: int = 0
    max_shard_size: str = SHARD_SIZE


def grow_experts(options: GrowOptions) -> dict[str, Any]:
    """Write a model with more or fewer experts, whose logits stay equal where they can."""
    o = options
    made = grow(o.checkpoint, o.output, _growth(o), o.seed, o.max_shard_size)
    c = made.config
    changed = {"num_experts": c.num_experts, "top_k": c.top_k}
    if o.granular:
        changed["expert_hidden_dim"] = c.expert_hidden
    tell_line(
        f"{o.output}: {made.parameters:,} parameters, {c.num_experts} experts, {c.top_k} for each token, from "
        f"{o.checkpoint}"
    )
    tell_line(f"  {' '.join(f'--model.init_args.config.{name} {value}' for name, value in changed.items())}")
    if made.differences:
        tell_line(f"  logits are only near those before: {'; '.join(made.differences)}")
    else:
        tell_line("  logits stay equal" + (" where none of these was chosen" if o.remove or o.remove_dead else ""))
    if o.split and not o.granular and not o.noise:
        tell_line("  copies that are alike get like gradients and stay so; --noise 0.01 tells them apart")
    return {
        "output": str(o.output),
        "num_experts": c.num_experts,
        "top_k": c.top_k,
        "parameters": made.parameters,
        "differences": list(made.differences),
    }


def _growth(options: GrowOptions) -> Growth:
    given = [name for name in WAYS if getattr(options, name) not in (None, [])]
    if len(given) != 1:
        raise UserValueError(f"{' and '.join(f'--{name}' for name in given) or 'nothing'} to do; legal: one of "
                             f"{', '.join(f'--{name}' for name in WAYS)}")  # fmt: skip
    for name, way in _PARTS_OF.items():
        if getattr(options, name) and way not in given:
            raise UserValueError(f"--{name} with --{given[0]}; legal: with --{way}, or not at all")
    if options.split is not None:
        return Split(options.split, options.granular, options.top_k, options.noise)
    if options.add is not None:
        return Add(options.add, None if options.usage is None else _by_load(options.usage), options.noise)
    if options.remove_dead is not None:
        return Remove(dead_experts(_choices(options.remove_dead)))
    return Remove(_named(options.remove))


def _choices(path: Path) -> dict[int, list[float]]:
    """Choices of each expert, by block."""
    try:
        return {int(layer["layer"]): layer["choices"] for layer in json.loads(path.read_text())["layers"]}
    except (ValueError, KeyError, TypeError) as error:
        raise UserValueError(
            f"{path} is no expert_usage.json ({error}); legal: that of `lightning-tex experts`"
        ) from error


def _by_load(path: Path) -> Mapping[int, Sequence[int]]:
    return {block: sorted(range(len(n)), key=n.__getitem__, reverse=True) for block, n in _choices(path).items()}


def _named(words: Sequence[str]) -> Mapping[int, Sequence[int]] | Sequence[int]:
    pairs = [word.split(":") for word in words]
    if not all(part.isdigit() for pair in pairs for part in pair) or {len(pair) for pair in pairs} not in ({1}, {2}):
        raise UserValueError(f"--remove {' '.join(words)}; legal: numbers of experts, or all as block:expert")
    if len(pairs[0]) == 1:
        return [int(number) for (number,) in pairs]
    by_block: dict[int, list[int]] = {}
    for block, number in pairs:
        by_block.setdefault(int(block), []).append(int(number))
    return by_block


COMMAND = Command("experts", grow_experts, (GrowOptions,), takes_path=True)
