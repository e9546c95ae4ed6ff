"""Recomputation and the byte meter through the Trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.behaviour_modules import DictLogger, SmallDecoder, batches, new_trainer, on_data_axis
from helpers.ranks import together
from helpers.trainers import gathered
from torch import Tensor

from lightning_tex.callbacks import CommunicationMonitor
from lightning_tex.models import Block

TED = {"tensor_parallel_size": 2, "expert_parallel_size": 2}
FOLDED = {"tensor_parallel_size": 2, "expert_parallel_size": 4, "expert_tensor_parallel_size": 1}


class Validated(SmallDecoder):
    def __init__(self) -> None:
        super().__init__(num_experts=8, dropout=0.1)

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.log("val_loss", self.cross_entropy(self.decoder(batch[0]), batch[1]), sync_dist=True)


def fit(layout: dict[str, Any], mode: str | None, policy: Any = None) -> tuple[dict[str, Tensor], dict[str, float]]:
    module, logger = Validated(), DictLogger()
    options = {"activation_checkpointing": mode, "activation_checkpointing_policy": policy}
    trainer = new_trainer(
        {**layout, **options},
        logger=logger,
        log_every_n_steps=1,
        callbacks=[CommunicationMonitor()],
        accumulate_grad_batches=2,
        val_check_interval=2,
        limit_val_batches=2,
    )
    data = on_data_axis(trainer, batches(4))
    trainer.fit(module, data, data)
    return gathered(module, trainer), dict(logger.logged)


@pytest.mark.parametrize("layout", [TED, pytest.param(FOLDED, marks=pytest.mark.full)], ids=["ted", "folded"])
def test_training_with_recomputation_is_bit_equal_and_its_bytes_are_logged(layout: dict[str, Any]) -> None:
    ways = [(None, None), ("full", None), ("communication_aware", None), ("communication_aware", {Block})]
    none, *others = together(4, {i: (fit, layout, *way) for i, way in enumerate(ways)}).values()
    for (mode, _), found in zip(ways[1:], others, strict=True):
        for (plain, _), (again, logged) in zip(none, found, strict=True):
            assert all(torch.equal(again[name], value) for name, value in plain.items())
            if logged:  # on rank 0
                sent = {name: value for name, value in logged.items() if name.startswith("sent_bytes/")}
                assert sent["sent_bytes/all_to_all/expert/forward"] > 0
                assert sent["sent_bytes/reduce_scatter/data/optimizer"] > 0
                assert any(name.endswith("/recompute") for name in sent) == (mode == "full")
                assert (logged["stash_bytes"] > 0) == (mode == "communication_aware")
