"""Logs, draws and watches how tokens are spread over experts."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_tex.callbacks.choice_changes import ChoiceChanges
from lightning_tex.callbacks.expert_history import ExpertHistory
from lightning_tex.callbacks.expert_pictures import load_figure
from lightning_tex.callbacks.heat_maps import can_draw, save
from lightning_tex.parallel.expert_load import ExpertLoad, LoadTotals
from lightning_tex.parallel.host_copy import HostCopy
from lightning_tex.parallel.sharding import TexModule, tex_modules

# E experts

_HARDLY = 0.1  # of the mean load: an expert below it is hardly used
_SECONDS_BETWEEN_PICTURES = 60.0
# Of measures of layers, what is logged of all layers together, and as what.
_TOTALS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "expert_load": ("worst", torch.amax),
    "expert_load_min": ("worst", torch.amin),
    "expert_rank_load": ("worst", torch.amax),
    "expert_load_cv": ("mean", torch.mean),
    "expert_load_shift": ("mean", torch.mean),
    "router_entropy": ("mean", torch.mean),
    "router_confidence": ("mean", torch.mean),
    "dead_experts": ("total", torch.sum),
    "auxiliary_loss": ("total", torch.sum),
}


class ExpertMonitor(Callback):
    """Log, draw and watch how each MoE layer's experts are used, over the data axis and since the last logged step.

    For each layer, ``{layer}`` being the block's number where the module's name has one, else the name:

    ===================================  ===============================================================================
    ``expert_load/{layer}``              the most loaded expert's share of the choices times E: 1 is even, E all on one
    ``expert_load_min/{layer}``          the same of the least loaded
    ``expert_load_cv/{layer}``           standard deviation of the loads by their mean
    ``expert_load_shift/{layer}``        by how much the loads differ from those of the last log, as a share of choices
    ``expert_choice_change/{layer}``     share of choices that a validation's first tokens make otherwise than in the
                                         validation before
    ``dead_experts/{layer}``             experts that were not chosen once
    ``expert_overflow/{layer}``          fraction of choices that overflowed their expert's capacity
    ``router_entropy/{layer}``           of the scores, by that of even ones: 1 is undecided, 0 sure
    ``router_confidence/{layer}``        the first choice's mean share of the scores
    ``expert_rank_load/{layer}``         the fullest rank of an expert axis, relative to the mean: others wait for it
    ``auxiliary_loss/{layer}``           the layer's routing losses, weighted, as they enter the loss
    ===================================  ===============================================================================

    Over all layers there are ``expert_load/worst``, ``expert_load_min/worst``, ``expert_rank_load/worst``,
    ``expert_load_cv/mean``, ``expert_load_shift/mean``, ``expert_choice_change/mean``, ``router_entropy/mean``,
    ``router_confidence/mean``, ``dead_experts/total``, ``expert_overflow/total`` and ``auxiliary_loss/total``. Entropy,
    confidence and losses are of the logged step's last micro-step. Only training counts, not recomputation. Ranks
    reduce once per logged step, and nothing waits for a device.

    Training does not see a token twice, so that ``expert_choice_change`` is of the first batch of validations, where
    that is the same one every time: of its choices those of experts that the same token did not choose before. It is
    logged from the second validation on, at the price of one reduction a validation and one a layer.

    At the end, and after a validation a minute or more since the last time, rank 0 writes ``expert_load.csv`` (choices
    by step, layer and expert, in at most 128 rows a layer) and, where matplotlib is installed, ``expert_load.png`` with
    a heat map, which TensorBoard and W&B get as well. What is drawn goes on through checkpoints.

    Args:
        folder: of these files; ``None``: the first logger's, and no files without a logger.
        warn_after: logged steps in a row after which a layer is warned of, at least half of whose experts get less than
            a tenth of their even share; ``None``: never.
    """

    def __init__(self, folder: str | Path | None = None, warn_after: int | None = 10) -> None:
        self.folder, self.warn_after = folder, warn_after
        self.history = ExpertHistory()
        self._changes = ChoiceChanges()
        self._under_way: deque[tuple[int, dict[str, int], HostCopy]] = deque()
        self._collapsed: Counter[str] = Counter()
        self._warned: set[str] = set()
        self._layers: dict[str, TexModule] | None = None
        self._names: dict[int, str] = {}
        self._shares: dict[str, Tensor] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._layers, self._shares = None, {}
        self._collapsed.clear()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Collective: the Trainer asks rank 0 for it.
        folder = trainer.log_dir if trainer.loggers and self.folder is None else self.folder
        self._folder = None if folder is None else Path(folder)
        self._drawn = time.monotonic()
        found = {name: layer for name, layer in tex_modules(pl_module) if _load(layer) is not None}
        self._layers, self._names = labelled(found), {id(layer): name for name, layer in found.items()}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        for layer in (self._layers or {}).values():
            _counted(layer).looks_at_scores = trainer._logger_connector.should_update_logs

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._take_what_arrived()
        if not trainer._logger_connector.should_update_logs or not self._layers:
            return
        loads = {label: _counted(layer).take_totals() for label, layer in self._layers.items()}
        used = {
            label: self._layers[label].activation_layout.total(load)
            for label, load in loads.items()
            if load is not None
        }
        if not used:
            return
        sizes = {label: len(load) for label, load in used.items()}
        total = trainer.strategy.reduce(torch.cat(list(used.values())), reduce_op="sum")
        each = dict(zip(used, map(LoadTotals.of, total.split(list(sizes.values()))), strict=True))
        self._log(pl_module, each)
        self._under_way.append((trainer.global_step, sizes, HostCopy(total)))

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._layers and batch_idx == dataloader_idx == 0:
            self._changes.begin(self._layers, batch)

    def on_validation_batch_end(self, *args: Any) -> None:
        self._changes.end()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._layers:
            return
        nothing = torch.zeros(2, dtype=torch.float64, device=pl_module.device)
        own = []
        for label, layer in self._layers.items():
            changed = self._changes.take(label)
            own.append(layer.activation_layout.total(nothing if changed is None else changed))
        totals = trainer.strategy.reduce(torch.stack(own), reduce_op="sum")
        shares = dict(zip(self._layers, totals[:, 0] / totals[:, 1], strict=True))
        seen = [label for label, choices in zip(self._layers, totals[:, 1].tolist(), strict=True) if choices]
        for label in seen:
            pl_module.log(f"expert_choice_change/{label}", shares[label], sync_dist=True)
        if len(seen) > 1:
            mean = torch.stack([shares[label] for label in seen]).mean()
            pl_module.log("expert_choice_change/mean", mean, sync_dist=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.training and time.monotonic() - self._drawn >= _SECONDS_BETWEEN_PICTURES:
            self._write(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer)

    def state_dict(self) -> dict[str, Any]:
        while self._under_way:
            self._take_oldest()
        return self.history.state_dict() if self.history.steps else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            self.history.load_state_dict(state_dict)

    def _log(self, pl_module: LightningModule, totals: dict[str, LoadTotals]) -> None:
        assert self._layers is not None
        of_layers: dict[str, dict[str, Tensor]] = {}
        for label, each in totals.items():
            shares = each.counts / each.counts.sum().clamp(min=1)
            values = {**_spread_of(shares), **_sureness(each)}
            values["expert_overflow"] = each.overflowed / each.counts.sum().clamp(min=1)
            values["auxiliary_loss"] = each.losses / each.forwards.clamp(min=1)
            if label in self._shares:
                values["expert_load_shift"] = (shares - self._shares[label]).abs().sum() / 2
            layer = self._layers[label]
            ranks, computing = layer.expert.size, shares[: getattr(layer, "num_experts", None)]
            if ranks > 1:
                by_rank = computing.view(ranks, -1).sum(-1)
                values["expert_rank_load"] = by_rank.max() / by_rank.mean().clamp(min=1e-9)
            self._shares[label] = shares
            of_layers[label] = values
        for label, values in of_layers.items():
            for name, value in values.items():
                pl_module.log(f"{name}/{label}", value)
        if len(totals) > 1:
            overflowed = torch.stack([each.overflowed for each in totals.values()]).sum()
            choices = torch.stack([each.counts.sum() for each in totals.values()]).sum()
            for name, (word, over_layers) in _TOTALS.items():
                of_each = [values[name] for values in of_layers.values() if name in values]
                if of_each:
                    pl_module.log(f"{name}/{word}", over_layers(torch.stack(of_each)))
            pl_module.log("expert_overflow/total", overflowed / choices.clamp(min=1))

    # --- late, on the host

    def _take_what_arrived(self) -> None:
        while self._under_way and self._under_way[0][2].arrived:
            self._watch(self._take_oldest())

    def _take_oldest(self) -> dict[str, Tensor]:
        step, sizes, copy = self._under_way.popleft()
        of_layers = torch.tensor(copy.numbers(), dtype=torch.float64).split(list(sizes.values()))
        choices = {label: LoadTotals.of(each).counts for label, each in zip(sizes, of_layers, strict=True)}
        self.history.add(step, choices)
        return choices

    def _watch(self, choices: dict[str, Tensor]) -> None:
        if self.warn_after is None or self._layers is None:
            return
        for label, of_experts in choices.items():
            loads = of_experts / of_experts.mean().clamp(min=1e-9)
            hardly = int((loads < _HARDLY).sum())
            self._collapsed[label] = self._collapsed[label] + 1 if 2 * hardly >= len(loads) else 0
            if self._collapsed[label] >= self.warn_after and label not in self._warned:
                self._warned.add(label)
                rank_zero_warn(self._advice(self._layers[label], hardly, loads))

    def _advice(self, layer: TexModule, hardly: int, loads: Tensor) -> str:
        balance = getattr(layer, "load_balance_coefficient", None)
        now = "" if balance is None else f" (load_balance_coefficient={balance:g})"
        name, many = self._names[id(layer)], f"{hardly} of its {len(loads)} experts"
        return (
            f"MoE layer {name} collapses: {many} got less than a tenth of their even share in "
            f"each of the last {self.warn_after} logged steps, the fullest {float(loads.max()):.1f} times its "
            f"own{now}. Raise load_balance_coefficient (0.01 is usual), set z_loss_coefficient=0.001, or lower the "
            "learning rate or warm it up longer; ExpertMonitor(warn_after=None) does not watch"
        )

    def _write(self, trainer: Trainer) -> None:
        while self._under_way:
            self._watch(self._take_oldest())
        self._drawn = time.monotonic()
        if self._folder is None or not self.history.steps or not trainer.is_global_zero:
            return
        try:
            self._write_files(trainer, self._folder)
        except OSError as error:  # no reason to lose what the run still has to save
            rank_zero_warn(f"ExpertMonitor could not write to {self._folder}: {error}")

    def _write_files(self, trainer: Trainer, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.history.write(folder / "expert_load.csv")
        if can_draw():
            figure, picture = load_figure(self.history), folder / "expert_load.png"
            save(figure, picture)
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_figure("expert_load", figure, trainer.global_step)
                elif isinstance(logger, WandbLogger):
                    logger.log_image("expert_load", [str(picture)], step=trainer.global_step)


def _spread_of(shares: Tensor) -> dict[str, Tensor]:
    """Measures of the experts' shares of choices. [E]"""
    loads = shares * len(shares)
    return {
        "expert_load": loads.max(),
        "expert_load_min": loads.min(),
        "expert_load_cv": loads.std(correction=0),
        "dead_experts": (shares == 0).sum().double(),
    }


def _sureness(totals: LoadTotals) -> dict[str, Tensor]:
    tokens = totals.tokens.clamp(min=1)
    most = math.log(max(len(totals.counts), 2))
    return {"router_entropy": totals.entropy / tokens / most, "router_confidence": totals.confidence / tokens}


def _load(layer: TexModule) -> ExpertLoad | None:
    """What a layer with experts counts."""
    load = getattr(layer, "load", None)
    return load if isinstance(load, ExpertLoad) else None


def _counted(layer: TexModule) -> ExpertLoad:
    load = _load(layer)
    assert load is not None
    return load


def labelled(layers: dict[str, TexModule]) -> dict[str, TexModule]:
    """Layers by the one number in their name where that tells them apart, else by the name."""
    numbers = {name: [part for part in name.split(".") if part.isdigit()] for name in layers}
    labels = {name: found[0] if len(found) == 1 else name for name, found in numbers.items()}
    seen = Counter(labels.values())
    return {labels[name] if seen[labels[name]] == 1 else name: layer for name, layer in layers.items()}
