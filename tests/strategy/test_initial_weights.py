"""Where weights come from: drawn part by part from the meta device, or those of rank 0."""

from __future__ import annotations

import os
from typing import Any

import lightning as L
import pytest
import torch
from helpers.behaviour_modules import FOLDED, LAYOUTS, TED, PublicNames, batches, new_trainer, on_data_axis
from helpers.ranks import on_ranks
from helpers.trainers import gathered
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_tex.models import Decoder, DecoderConfig
from lightning_tex.parallel import initialization


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that an operation made off the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


class Lazy(L.LightningModule):
    """Built on the meta device in configure_model."""

    def __init__(self) -> None:
        super().__init__()
        self.model: Decoder | None = None
        self.initial: dict[str, Tensor] = {}

    def configure_model(self) -> None:
        if self.model is None:
            with torch.device("meta"):
                self.model = Decoder(DecoderConfig(61, 16, 2, 4, hidden_dim=64, num_experts=8))

    def on_fit_start(self) -> None:
        self.initial = gathered(self, self.trainer)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.model(batch[0])[..., :15].square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit_lazily(layout: Any) -> dict[str, Any]:
    L.seed_everything(11, verbose=False)
    module = Lazy()
    trainer = new_trainer(layout)
    largest, materialise = Largest(), initialization.materialise

    def watched(*args: Any) -> None:
        with largest:
            materialise(*args)

    initialization.materialise = watched
    configure = module.configure_model

    def watched_configure() -> None:
        with largest:
            configure()

    module.configure_model = watched_configure
    trainer.fit(module, on_data_axis(trainer, batches(2)))
    part = max(p.numel() for p in module.parameters())
    expert = trainer.strategy.topology.expert.size
    return {"initial": module.initial, "largest": largest.numel, "part": part, "expert": expert}


def test_model_built_on_meta_is_drawn_part_by_part_and_equally_on_every_layout() -> None:
    (reference,) = on_ranks(1, fit_lazily, {})
    whole = max(value.numel() for value in reference["initial"].values())
    layouts = [TED, FOLDED, {"tensor_parallel_size": 4}, {"expert_parallel_size": 4}]
    for layout in layouts:
        for found in on_ranks(4, fit_lazily, layout):
            assert found["part"] * 4 == whole
            assert found["largest"] <= found["part"], "more than this rank's part of a parameter existed"
            for name, value in reference["initial"].items():
                assert torch.equal(found["initial"][name], value), name


def test_automatic_expert_size_waits_for_a_model_built_in_configure_model() -> None:
    for layout, expected in ({}, 4), ({"tensor_parallel_size": 2}, 2), ({**FOLDED, "expert_parallel_size": "auto"}, 4):
        assert [found["expert"] for found in on_ranks(4, fit_lazily, layout)] == [expected] * 4


class OwnWeights(PublicNames):
    """Initialises itself, differently on every rank."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(100 + int(os.environ["RANK"]))
        self.normalised = nn.BatchNorm1d(16)
        for tensor in (*self.parameters(), self.normalised.running_mean):
            nn.init.normal_(tensor, std=0.2)
        self.before = {name: p.detach().clone() for name, p in self.named_parameters()}
        self.buffer_before = self.normalised.running_mean.clone()

    def on_fit_start(self) -> None:
        self.after, self.buffer_after = gathered(self, self.trainer), self.normalised.running_mean.clone()


def fit_own_weights(layout: Any) -> dict[str, Any]:
    module = OwnWeights()
    trainer = new_trainer(layout)
    trainer.fit(module, on_data_axis(trainer, batches(1)))
    return {
        "before": module.before | {"buffer": module.buffer_before},
        "after": module.after | {"buffer": module.buffer_after},
    }


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_existing_weights_survive_and_are_those_of_rank_0_everywhere(layout: dict[str, int]) -> None:
    found = on_ranks(4, fit_own_weights, layout)
    assert not torch.equal(found[0]["before"]["plain.weight"], found[1]["before"]["plain.weight"])
    for each in found:
        for name, value in found[0]["before"].items():
            assert torch.equal(each["after"][name].double(), value.double()), name
