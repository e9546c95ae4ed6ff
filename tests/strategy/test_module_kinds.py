"""Modules of other kinds: without TEX layers, with frozen parts, copied after they were sharded."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from helpers.behaviour_modules import LAYOUTS, TED, PublicNames, batches, new_trainer, on_data_axis
from helpers.ranks import on_ranks
from torch import Tensor, nn

from lightning_tex.testing import assert_trains_alike


class PlainModules(L.LightningModule):
    """No TEX layer at all: ordinary modules, a buffer, and a frozen part."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embedding, self.norm = nn.Embedding(61, 16), nn.LayerNorm(16)
        self.hidden, self.out = nn.Linear(16, 16), nn.Linear(16, 61)
        self.embedding.requires_grad_(False)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x = self.norm(self.embedding(batch[0]))
        return F.cross_entropy(self.out(torch.tanh(self.hidden(x))).flatten(0, 1), batch[1].flatten())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


@pytest.mark.parametrize("layout", [{}, {"tensor_parallel_size": 2}, {"tensor_parallel_size": 4}], ids=str)
def test_model_without_tex_layers_is_replicated(layout: dict[str, int]) -> None:
    assert_trains_alike(PlainModules, batches(6), layouts=[{"devices": 4, **layout}], steps=6, optimizer=None)


def partly_frozen() -> PublicNames:
    module = PublicNames()
    for part in (module.embedding, module.moe.router, module.up):
        part.requires_grad_(False)
    return module


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_frozen_parameters_stay_and_the_others_train_equally(layout: dict[str, int]) -> None:
    assert_trains_alike(partly_frozen, batches(4), layouts=[{"devices": 4, **layout}], steps=4, optimizer=None)


def fit_and_look(layout: Any) -> dict[str, Any]:
    module = PublicNames()
    trainer = new_trainer(layout)
    trainer.fit(module, on_data_axis(trainer, batches(2)))
    mesh = module.device_mesh
    twin, part = copy.deepcopy(module), copy.deepcopy(module.moe)
    ids = batches(1, seed=4)[0][0]
    with torch.no_grad():
        same = torch.equal(twin.cpu().double()(ids), module(ids))
        x = torch.randn(3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        same_part = torch.equal(part(x), module.moe(x))
    with torch.no_grad():
        twin.plain.weight.add_(1)
    apart = not torch.equal(twin.plain.weight, module.plain.weight)
    names = mesh.mesh_dim_names, tuple(mesh.shape), mesh is trainer.strategy.device_mesh
    return {"same": same, "same_part": same_part, "apart": apart, "mesh": names}


def test_device_mesh_is_exposed_and_a_sharded_module_can_be_copied() -> None:
    for found in on_ranks(4, fit_and_look, TED):
        assert found["mesh"] == (("data", "tensor"), (2, 2), True)
        assert found["same"]
        assert found["same_part"]
        assert found["apart"]
