"""Padding: a sequence with it trains as the one without, in one process and on every layout."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from helpers.behaviour_modules import assert_equal_to_one_process, new_trainer, on_data_axis
from helpers.trainers import gathered
from torch import Tensor

from lightning_tex import LanguageModel, TexMoEStrategy
from lightning_tex.models import DecoderConfig
from lightning_tex.moe import auxiliary_loss
from lightning_tex.parallel.collectives import all_reduce

VOCABULARY, TOKENS, LENGTH, PADDING = 61, 6, 10, 0  # no token is the padding id
STARTS = {"left": (4, 4, 4, 4), "right": (0, 0, 0, 0), "both": (0, 4, 1, 3)}


def config(**changes: Any) -> DecoderConfig:
    sizes = {"dim": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "hidden_dim": 16, "num_experts": 4}
    losses = {"load_balance_coefficient": 0.1, "z_loss_coefficient": 0.01}
    return DecoderConfig(VOCABULARY, **{**sizes, "top_k": 2, **losses, **changes})


def sequences(count: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """Sequences of ``TOKENS`` tokens and those that follow them."""
    ids = torch.randint(1, VOCABULARY, (count, TOKENS + 1), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}


def padded(batch: dict[str, Tensor], real: Tensor) -> dict[str, Tensor]:
    """The same sequences at the real positions of rows that are longer: ``real`` [B, LENGTH] boolean."""
    longer = {name: torch.full(real.shape, PADDING) for name in batch}
    for name, rows in batch.items():
        longer[name][real] = rows.flatten()
    return {**longer, "attention_mask": real.long()}


def shifted(starts: tuple[int, ...]) -> Tensor:
    positions = torch.arange(LENGTH) - torch.tensor(starts)[:, None]
    return (positions >= 0) & (positions < TOKENS)


def with_holes() -> Tensor:
    real = torch.ones(4, LENGTH, dtype=torch.bool)
    for row in range(4):
        real[row, torch.randperm(LENGTH, generator=torch.Generator().manual_seed(row))[TOKENS:]] = False
    return real


def learnt(batch: dict[str, Tensor], dtype: torch.dtype, **changes: Any) -> dict[str, Tensor]:
    """Loss sum, tokens, auxiliary loss, load and all gradients of one step in this process."""
    torch.manual_seed(1)
    module = LanguageModel(config(**changes))
    module.configure_model()
    module.to(dtype)
    total, count = module._loss_sum(batch)
    auxiliary = auxiliary_loss(module)
    (total / count + auxiliary).backward()
    load = torch.cat([layer.load.take() for _, layer in module.decoder.moe_layers()])
    gradients = {name: p.grad for name, p in module.named_parameters()}
    return {"loss": total.detach(), "count": count, "auxiliary": auxiliary.detach(), "load": load, **gradients}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        error = (got[name].double() - value.double()).norm() / value.double().norm().clamp(min=1e-12)
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("place", [*STARTS, "holes"])
def test_padding_changes_nothing(place: str, dtype: torch.dtype, tolerance: float) -> None:
    batch, real = sequences(), with_holes() if place == "holes" else shifted(STARTS[place])
    expected = learnt(batch, dtype)
    assert expected["count"] == 4 * TOKENS
    assert expected["load"].sum() == 4 * TOKENS * 2
    assert_same(learnt(padded(batch, real), dtype), expected, tolerance)


def test_padding_takes_no_capacity() -> None:
    """With room for every choice of the real tokens and no more."""
    tight = {"num_experts": 2, "top_k": 2}  # every token goes to both experts
    batch = padded(sequences(), shifted(STARTS["left"]))
    result = learnt(batch, torch.float64, **tight, capacity_factor=TOKENS / LENGTH)
    assert_same(result, learnt(batch, torch.float64, **tight), 1e-10)


def test_labels_that_are_the_padding_which_follows_count_for_nothing() -> None:
    """Inputs and labels cut out of rows that were padded before."""
    batch = padded(sequences(), shifted(STARTS["right"]))
    rows = torch.cat([batch["input_ids"], torch.full((4, 1), PADDING)], 1)
    naive = {**batch, "labels": rows[:, 1:]}
    careful = {**batch, "labels": rows[:, 1:].masked_fill(rows[:, 1:] == PADDING, -100)}
    result = learnt(naive, torch.float64)
    assert result["count"] == 4 * (TOKENS - 1)
    assert_same(result, learnt(careful, torch.float64), 1e-12)


def test_a_mask_of_ones_and_none_are_alike() -> None:
    batch = sequences()
    ones = {**batch, "attention_mask": torch.ones_like(batch["input_ids"], dtype=torch.bool)}
    assert_same(learnt(ones, torch.float64), learnt(batch, torch.float64), 1e-12)


def test_predictions_of_a_padded_prompt() -> None:
    torch.manual_seed(1)
    module = LanguageModel(config()).eval()
    module.configure_model()
    batch, real = sequences(), shifted(STARTS["both"])
    predicted = module.predict_step(padded(batch, real), 0)
    assert torch.equal(predicted[real].view(4, -1), module.predict_step(batch, 0))


@pytest.mark.parametrize(
    "mask",
    [torch.ones(4, 1, 6, 6, dtype=torch.bool), torch.ones(4, 7, dtype=torch.bool), torch.zeros(4, 6)],
    ids=["pairs", "length", "added to scores"],
)
def test_other_masks_are_refused(mask: Tensor) -> None:
    with pytest.raises(ValueError, match=r"attention_mask is torch\..* for input_ids of shape \[4, 6\]; legal:"):
        learnt({**sequences(), "attention_mask": mask}, torch.float32)


# --- on layouts


class Padded(LanguageModel):
    """Takes its batch as a list, as the helpers slice it, and keeps its losses; SGD."""

    def __init__(self) -> None:
        super().__init__(config())
        self.losses: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        named = dict(zip(("input_ids", "labels", "attention_mask"), batch, strict=True))
        loss = super().training_step(named, batch_idx)
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def configure_callbacks(self) -> list[L.Callback]:
        return []


def fit(layout: dict[str, Any] | None) -> dict[str, Tensor]:
    """Three steps in which ranks have differing numbers of tokens, and one row is nothing but padding."""
    L.seed_everything(3, verbose=False)
    module, trainer = Padded(), new_trainer(layout)
    steps = [padded(sequences(8, seed), shifted((0, 4, 1, 3, 4, 4, 2, 2))) for seed in range(3)]
    for step in steps:
        step["attention_mask"][5] = 0
    trainer.fit(module, on_data_axis(trainer, [list(step.values()) for step in steps]))
    losses = trainer.strategy.reduce(torch.stack(module.losses), reduce_op="mean")
    return {"losses": losses, "load": whole_load(module, trainer), **gathered(module, trainer)}


def whole_load(module: Padded, trainer: L.Trainer) -> Tensor:
    """Over all ranks that hold different tokens."""
    load = torch.cat([layer.load.take() for _, layer in module.decoder.moe_layers()]).double()
    if not isinstance(trainer.strategy, TexMoEStrategy):
        return load
    load = all_reduce(load, module.decoder.embedding.activation_layout.shard_axis)
    return trainer.strategy.reduce(load, reduce_op="sum")


TED = {"tensor_parallel_size": 2, "expert_parallel_size": 2}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sequence_parallel": True, "activation_checkpointing": "communication_aware"},
        pytest.param({"sequence_parallel": True}, marks=pytest.mark.full),
        pytest.param({"activation_checkpointing": "full"}, marks=pytest.mark.full),
        pytest.param({"activation_checkpointing": "communication_aware"}, marks=pytest.mark.full),
        pytest.param({"sequence_parallel": True, "activation_checkpointing": "full"}, marks=pytest.mark.full),
        pytest.param({"expert_tensor_parallel_size": 1, "expert_parallel_size": 4}, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_layouts_equal_one_process(options: dict[str, Any]) -> None:
    assert_equal_to_one_process(fit, layout={**TED, **options})
