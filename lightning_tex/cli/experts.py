"""``lightning-tex experts``: which tokens and documents go to which experts; or a model with more or fewer of them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning import LightningDataModule
from rich.text import Text

from lightning_tex.callbacks.heat_maps import can_draw
from lightning_tex.cli import grow
from lightning_tex.cli.options import Command, Count
from lightning_tex.cli.tables import console, table, tell_line
from lightning_tex.data import TokenDataModule
from lightning_tex.inspection import Origins, UsageCounter, UsageReport
from lightning_tex.inspection.pictures import draw, printable
from lightning_tex.language_model import LanguageModel
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.pretrained.folder import CONFIG
from lightning_tex.recipe import BARE_TRAINER, Recipe, quiet

_DOCUMENTS = Count(40)
# Of a table on a terminal.
_EXPERTS, _TOKENS = 16, 8
# In place of the recipe's layout, unless the command line has another one.
_ONE_RANK = {
    "tensor_parallel_size": 1,
    "expert_parallel_size": 1,
    "expert_tensor_parallel_size": None,
    "sequence_parallel": False,
}


@dataclass(frozen=True)
class InspectOptions:
    """What is passed through which model.

    Args:
        checkpoint: of the recipe's model, directory or plain file, of any layout; or a folder of a published model.
        config: the recipe, whose data it is.
        part: of the data.
        max_batches: so many batches at most; left out: all.
        documents: that are told apart at most.
        output: a folder for pictures and numbers; left out: experts beside the checkpoint.
    """

    checkpoint: Path
    config: str = ""
    part: Literal["validation", "train"] = "validation"
    max_batches: Count | None = None
    documents: Count = _DOCUMENTS
    output: Path | None = None


def inspect(options: InspectOptions, more: list[str]) -> dict[str, Any] | None:
    """Pass data through a checkpoint once, and draw which tokens, sources and documents go to which experts. In one
    process, or on the layout that --trainer.devices and further options of the recipe name. With --split, --add,
    --remove or --remove_dead: `lightning-tex experts --split --help`.
    """
    if not options.config:
        raise UserValueError("--config is needed, the recipe whose data is passed through the checkpoint")
    recipe = Recipe(options.config, more)
    own_layout = any(word.startswith("--trainer.devices") for word in more)
    alone = {} if own_layout else {"devices": 1, "num_nodes": 1}
    limit = {"limit_val_batches": options.max_batches or 1.0, "num_sanity_val_steps": 0}
    published = (options.checkpoint / CONFIG).is_file()
    with quiet():
        made = recipe.instantiate({} if own_layout else _ONE_RANK, {**BARE_TRAINER, **alone, **limit})
        model: Any = LanguageModel.from_pretrained(options.checkpoint) if published else made.model
        data: Any = made.datamodule
        if data is None:
            raise UserValueError(f"recipe {options.config} leaves the data to its model; legal: a recipe with data")
        data.prepare_data()
        data.setup("fit")
        origins = Origins(data, options.part, options.documents)
        counter = UsageCounter(origins, getattr(getattr(model, "config", None), "vocab_size", 0))
        made.trainer.callbacks.append(counter)  # type: ignore[attr-defined]
        passed = data if options.part == "validation" else _Training(data)
        checkpoint = None if published else str(options.checkpoint)
        for said in ("Be aware that when using `ckpt_path`", "It is recommended to use `self.log"):
            warnings.filterwarnings("ignore", message=said)
        made.trainer.validate(model, datamodule=passed, ckpt_path=checkpoint, verbose=False)
    if not made.trainer.is_global_zero:
        return None
    decode = data.decode if isinstance(data, TokenDataModule) else None
    report = UsageReport(counter, str(options.checkpoint), decode)
    return _show(report, options.output or options.checkpoint.parent / "experts")


def _show(report: UsageReport, folder: Path) -> dict[str, Any]:
    plain = report.plain()
    folder.mkdir(parents=True, exist_ok=True)
    report.write(folder, plain)
    files = draw(plain, folder) if can_draw() else []
    console().print(_layers(plain))
    if any(expert["typical"] for expert in plain["layers"][-1]["experts"]):
        console().print(_experts(plain["layers"][-1]))
    names = ["expert_usage.json", "expert_tokens.csv", *(file.name for file in files)]
    tell_line(f"{plain['tokens']:,} tokens; in {folder}: {', '.join(names)}")
    if not files:
        tell_line("no pictures, as there is no matplotlib: pip install 'lightning-tex[plot]'")
    layers = [{name: layer[name] for name in ("layer", *_MEASURES)} for layer in plain["layers"]]
    return {"tokens": plain["tokens"], "layers": layers, "folder": str(folder), "pictures": list(map(str, files))}


_MEASURES = ("load_max", "load_min", "load_cv", "dead", "told_by_token", "told_by_source", "told_by_document")


def _layers(plain: dict[str, Any]) -> Any:
    headings = ("layer", "experts", "k", "load max", "min", "cv", "dead", "token", "source", "document")
    rows = table(*headings, title="by layer; on the right what a token, source or document tells of its expert, 0 to 1")
    for layer in plain["layers"]:
        measures = map(_word, (layer[name] for name in _MEASURES))
        rows.add_row(layer["layer"], str(layer["num_experts"]), str(layer["top_k"]), *measures)
    return rows


def _word(measure: float | list[int] | None) -> str:
    if measure is None:
        return "-"
    return str(len(measure)) if isinstance(measure, list) else f"{measure:.2f}"


def _experts(layer: dict[str, Any]) -> Any:
    words = "typical tokens, and the share of each that goes there"
    rows = table("expert", "choices", words, left=[words], title=f"layer {layer['layer']}")
    for number, expert in list(enumerate(layer["experts"]))[:_EXPERTS]:
        tokens = [f"{printable(one['text'])} {one['share_of_token']:.0%}" for one in expert["typical"][:_TOKENS]]
        rows.add_row(str(number), f"{expert['share']:.1%}", Text("  ".join(tokens)))
    return rows


class _Training(LightningDataModule):
    """Validates on what a data module trains on, in its order.

    Args:
        data: set up.
    """

    def __init__(self, data: Any) -> None:
        super().__init__()
        self.data = data

    def val_dataloader(self) -> Any:
        self.data.trainer = self.trainer
        return self.data.train_dataloader()


COMMAND = Command("experts", inspect, (InspectOptions,), takes_recipe=True, takes_path=True)


def main(words: Sequence[str]) -> None:
    """Run it.

    Args:
        words: what follows ``experts`` on the command line.
    """
    given = {word.partition("=")[0].removeprefix("--").replace("-", "_") for word in words if word.startswith("--")}
    grows = given & set(grow.WAYS)
    (grow.COMMAND if grows else COMMAND)(words)
