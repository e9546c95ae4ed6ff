"""The model of ``checkpoint_runs`` in a raw loop of Fabric, over the same batches, with the same optimizer."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from helpers.checkpoint_runs import BATCH, VOCABULARY, Model
from lightning_tex.fabric import TexMoEStrategy
from lightning_tex.moe import auxiliary_loss
from lightning_tex.optim import MuonAdamW
from lightning_tex.parallel.sharding import parameter_shardings


class Net(nn.Module):
    """What the LightningModule trains, by the same names; [B, S], [B, S] -> []."""

    def __init__(self) -> None:
        super().__init__()
        module = Model()
        self.decoder, self.scale, self.loss = module.decoder, module.scale, module.loss
        self.register_buffer("seen", module.seen)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        self.seen += 1
        return self.loss(self.decoder(ids), targets) + 0.1 * (self.scale - 2).square()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """As the LightningModule has it."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=3e-3)


def muon(model: nn.Module) -> torch.optim.Optimizer:
    """Of whole matrices, and of everything else."""
    return MuonAdamW(model, lr=2e-3)


def loop(
    layout: dict[str, Any] | None,
    devices: int,
    steps: int,
    accumulate: int = 1,
    precision: str = "32-true",
    max_norm: float | None = None,
    load: str | None = None,
    save: str | None = None,
    build: Any = adamw,
) -> dict[str, Any]:
    """Weights after some steps over the batches from where a checkpoint has ended.

    Args:
        layout: arguments of the strategy; ``None`` for Fabric's own on one process.
    """
    torch.manual_seed(5)
    strategy = "auto" if layout is None else TexMoEStrategy(**layout)
    fabric = Fabric(accelerator="cpu", devices=devices, strategy=strategy, precision=precision)
    fabric.launch()
    net = Net()
    model, optimizer = fabric.setup(net, build(net))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.2 * step))
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "step": 0}
    rest = {} if load is None else fabric.load(load, state)
    norms, first = [], state["step"]
    for step in range(first, first + steps):
        optimizer.zero_grad()
        for part in range(accumulate):
            batch = own_batch(fabric.strategy, step * accumulate + part)
            waits = fabric.no_backward_sync(model, enabled=part < accumulate - 1)
            with waits if layout is not None else nullcontext():
                loss = model(*batch) + auxiliary_loss(net)
                fabric.backward(loss / accumulate)
        if max_norm is not None:
            norms.append(float(fabric.clip_gradients(model, optimizer, max_norm=max_norm)))
        optimizer.step()
        scheduler.step()
    state["step"] = first + steps
    if save is not None:
        fabric.save(save, state)
    return {"weights": whole(net, fabric.strategy), "norms": norms, "rest": sorted(rest), "seen": int(net.seen)}


def own_batch(strategy: Any, index: int) -> list[Tensor]:
    """This data rank's part of a batch, of those that ``checkpoint_runs.Data`` has."""
    ids = torch.randint(0, VOCABULARY, (64, 7), generator=torch.Generator().manual_seed(0))
    spread = {"num_replicas": 1, "rank": 0}
    if isinstance(strategy, TexMoEStrategy):
        spread = strategy.distributed_sampler_kwargs
    own = BATCH // spread["num_replicas"]
    rows = ids[index * BATCH + spread["rank"] * own :][:own]
    return [rows[:, :-1], rows[:, 1:]]


def whole(net: nn.Module, strategy: Any) -> dict[str, Tensor]:
    """All parameters."""
    named = dict(net.named_parameters())
    if not isinstance(strategy, TexMoEStrategy):
        return {name: p.detach().clone() for name, p in named.items()}
    shardings = parameter_shardings(net, strategy.topology)
    return {name: one.gather(named[name].detach()).clone() for name, one in shardings.items()}
