"""How many choices of a validation's first tokens change from one validation to the next."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.behaviour_modules import FOLDED, TED, DictLogger, SmallDecoder, batches, loader, new_trainer, on_data_axis
from helpers.ranks import together
from helpers.trainers import quiet
from torch import Tensor

from lightning_tex.callbacks import ExpertMonitor
from lightning_tex.callbacks.choice_changes import ChoiceChanges
from lightning_tex.moe import MoE

EXPERTS = 4


class Validated(SmallDecoder):
    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.decoder(batch[0])


class Turning(Validated):
    """In evaluation the first half of the tokens choose experts by how often training has stepped."""

    def __init__(self) -> None:
        super().__init__(load_balance_coefficient=0.0)
        router = next(layer for _, layer in self.decoder.moe_layers()).router
        router.choose = lambda scores, tokens: self.chosen(len(scores))

    def chosen(self, tokens: int) -> Tensor:
        turned = self.trainer.global_step * (torch.arange(tokens) < tokens // 2)
        return (torch.arange(2) + turned[:, None]) % EXPERTS


def fit(module: SmallDecoder, validated: Any, **flags: Any) -> list[float]:
    logger = DictLogger()
    options = {
        "logger": logger,
        "log_every_n_steps": 1,
        "val_check_interval": 1,
        "max_epochs": 1,
        "callbacks": [ExpertMonitor()],
        **flags,
    }
    quiet(**options).fit(module, loader(batches(3)), validated)
    return [float(value) for name, value in logger.logged if name == "expert_choice_change/1"]


def test_it_is_the_share_of_choices_on_experts_that_a_token_did_not_choose() -> None:
    # From {s, s + 1} to {s + 1, s + 2}: one of two choices of half of the tokens.
    assert fit(Turning(), loader(batches(2, seed=1)), num_sanity_val_steps=2) == [0.25, 0.25]


def test_another_batch_is_compared_with_nothing() -> None:
    given = iter(batches(3, seed=1))

    class Others(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            yield next(given)

    assert fit(Turning(), torch.utils.data.DataLoader(Others(), batch_size=None), num_sanity_val_steps=0) == []


def test_a_batch_is_compared_once_and_masked_tokens_choose_nothing() -> None:
    torch.manual_seed(0)
    layer, changes = MoE(6, 8, EXPERTS, top_k=2).eval(), ChoiceChanges()
    x, mask = torch.randn(1, 5, 6), torch.tensor([[True, True, False, True, True]])
    found = []
    for weight in (layer.router.weight.detach(), -layer.router.weight.detach()):
        layer.router.weight.data = weight
        changes.begin({"0": layer}, [x, mask])
        layer(x, mask)
        changes.end()
        found.append(changes.take("0"))
    assert found[0] is None and found[1] is not None and found[1].tolist() == [8, 8]  # the two worst are others
    assert changes.take("0") is None


def on_layout(layout: dict[str, Any] | None) -> dict[str, float]:
    logger = DictLogger()
    trainer = new_trainer(layout, logger=logger, log_every_n_steps=2, val_check_interval=2, callbacks=[ExpertMonitor()])
    even = [[part[:, :4] for part in batch] for batch in batches(6)]  # sequence parallelism halves sequences
    trainer.fit(Validated(num_layers=4), on_data_axis(trainer, even), on_data_axis(trainer, even[:2]))
    return {name: float(value) for name, value in logger.logged if name.startswith("expert_choice_change")}


@pytest.mark.full
def test_layouts_tell_the_same() -> None:
    reference = together(1, {0: (on_layout, {})})[0][0]
    assert {*reference} == {"expert_choice_change/1", "expert_choice_change/3", "expert_choice_change/mean"}
    assert 0 < reference["expert_choice_change/mean"] < 1
    layouts = {"ted": TED, "folded": FOLDED, "split": {**TED, "sequence_parallel": True}}
    for name, (found, *_) in together(4, {name: (on_layout, layout) for name, layout in layouts.items()}).items():
        assert found == pytest.approx(reference, rel=1e-6), name
