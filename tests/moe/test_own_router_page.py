"""The code of docs/own-router.md, as it stands there, on layouts."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from helpers.behaviour_modules import TED, SmallDecoder, batches, new_trainer, on_data_axis
from helpers.ranks import together
from torch import Tensor

from lightning_tex.moe import MoE

PAGE = Path(__file__).parents[2] / "docs" / "own-router.md"


def page() -> ModuleType:
    """Its code, run as a module that can be imported."""
    module = ModuleType("own_router_page")
    sys.modules[module.__name__] = module
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(code, module.__dict__)
    return module


def test_its_second_choices_are_near() -> None:
    layer = page().layer
    assert isinstance(layer, MoE) and layer.router.near == 0.5
    layer(torch.randn(200, 16)).sum()
    route = layer.router(torch.randn(200, 16))
    left = route.indices[:, 1] < 4
    assert 0 < left.sum() < 200
    assert (route.weights[left, 1] >= 0.5 * route.weights[left, 0]).all() and not route.weights[~left, 1].any()


def trained(layout: dict[str, Any]) -> tuple[Tensor, float, Tensor]:
    page()
    module = SmallDecoder(router={"name": "own_router_page.Confident", "init_args": {"near": 0.7}})
    trainer = new_trainer(layout)
    trainer.fit(module, on_data_axis(trainer, batches(3)))
    router = next(module.decoder.moe_layers())[1].router
    counts = trainer.strategy.reduce(router.chosen.double(), reduce_op="mean") * trainer.strategy.topology.data.size
    return trainer.strategy.reduce(torch.stack(module.losses), reduce_op="mean"), float(router.temperature), counts


def test_it_trains_alike_on_a_layout() -> None:
    recomputed = {**TED, "activation_checkpointing": "full"}
    ((losses, temperature, counts),) = together(1, {0: (trained, {})})[0]
    of_rank = together(4, {0: (trained, recomputed)})[0][0]
    torch.testing.assert_close(of_rank[0], losses, rtol=1e-10, atol=0)
    assert temperature == of_rank[1] < 2 and torch.equal(of_rank[2], counts)
