"""Sequence parallelism trains as one process does, whatever the user's module does between embedding and head."""

from __future__ import annotations

from functools import cache
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from helpers.behaviour_modules import DictLogger, batches, loader, new_trainer, on_data_axis
from helpers.ranks import on_ranks, together
from helpers.trainers import gathered
from torch import Tensor, nn

from lightning_tex.callbacks import ExpertMonitor
from lightning_tex.layers import (
    ColumnParallelLinear,
    ParallelAttention,
    ParallelMLP,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
)
from lightning_tex.moe import MoE, auxiliary_loss

# Sequences of 8 tokens; batches of 8 samples.
DIM, VOCABULARY, LENGTH = 16, 61, 8
LAYOUTS = {
    "ted": (4, {"tensor_parallel_size": 2, "expert_parallel_size": 2}),
    "folded": (4, {"tensor_parallel_size": 2, "expert_parallel_size": 4, "expert_tensor_parallel_size": 1}),
    "tensor": (4, {"tensor_parallel_size": 4}),
    "data": (4, {"tensor_parallel_size": 2, "expert_parallel_size": 1}),
    "alone": (1, {}),
}


class Everything(L.LightningModule):
    """What a user may put between the ends, and before and after them."""

    def __init__(self, capacity_factor: float | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding, self.norm = VocabParallelEmbedding(VOCABULARY, DIM), nn.LayerNorm(DIM)
        self.shift = nn.Parameter(torch.randn(DIM))
        self.attention = ParallelAttention(DIM, 4, bias=True)
        # Each data rank has other tokens than one process: their overflow would be another, too.
        self.moe = MoE(DIM, 16, 4, 2, capacity_factor, load_balance_coefficient=0.1, z_loss_coefficient=0.01)
        self.mlp, self.up, self.down = ParallelMLP(DIM, 32), ColumnParallelLinear(DIM, 32), RowParallelLinear(32, DIM)
        self.plain, self.whole = nn.Linear(DIM, DIM), ColumnParallelLinear(DIM, DIM, gather_output=True)
        self.head = VocabParallelHead(DIM, VOCABULARY, gather_output=True)
        self.calibrate = nn.Linear(VOCABULARY, VOCABULARY)  # behind the head: its gradient is whole on every rank
        self.losses: list[Tensor] = []

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.shift
        x = x + self.attention(self.norm(x), attention_mask=ids != 0)
        x = x + self.moe(self.norm(x), token_mask=ids != 0)
        x = x + self.down(F.gelu(self.up(self.plain(x)))) + self.whole(x)
        x = x + self.mlp(x.flatten(0, 1)).view_as(x)
        return self.calibrate(self.head(x))

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]).flatten(0, 1), batch[1].flatten()) + auxiliary_loss(self)
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.5)


def sequences(count: int) -> list[list[Tensor]]:
    ids = torch.randint(0, VOCABULARY, (count, 8, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    return [[batch[:, :-1], batch[:, 1:]] for batch in ids]


def fit(layout: dict[str, Any] | None, flags: dict[str, Any], make: Any = Everything, *arguments: Any) -> Any:
    module, logger = make(*arguments), DictLogger()
    trainer = new_trainer(layout, logger=logger, log_every_n_steps=1, callbacks=[ExpertMonitor()], **flags)
    trainer.fit(module, on_data_axis(trainer, sequences(4)))
    losses = trainer.strategy.reduce(torch.stack(module.losses), reduce_op="mean")
    return losses, gathered(module, trainer), dict(logger.logged)


def close(got: Tensor, expected: Tensor) -> bool:
    return float((got - expected).norm()) <= 1e-10 * float(expected.norm())


CLIPPED = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3}


@cache
def one_process(clipped: bool) -> Any:
    return on_ranks(1, fit, None, CLIPPED if clipped else {})[0]


@pytest.mark.parametrize(
    ("name", "clipped"),
    [
        *(pytest.param(name, False, marks=pytest.mark.full if name == "data" else ()) for name in LAYOUTS),
        ("ted", True),
    ],
)
def test_equals_one_process(name: str, clipped: bool) -> None:
    world, layout = LAYOUTS[name]
    reference, flags = one_process(clipped), CLIPPED if clipped else {}
    for losses, parameters, logged in on_ranks(world, fit, {**layout, "sequence_parallel": True}, flags):
        assert close(losses, reference[0])
        for key, value in reference[1].items():
            # A key's bias has no influence on attention: its gradient is rounding.
            assert key == "attention.key.bias" or close(parameters[key], value), key
        if logged:  # on rank 0: loads count every token once
            assert logged["expert_load/moe"] == pytest.approx(reference[2]["expert_load/moe"], rel=1e-6)


@pytest.mark.parametrize("name", ["ted", "folded"])
def test_the_same_choices_overflow_as_without_it(name: str) -> None:
    world, layout = LAYOUTS[name]
    layouts = {"plain": layout, "split": {**layout, "sequence_parallel": True}}
    plain, split = together(world, {key: (fit, one, {}, Everything, 0.6) for key, one in layouts.items()}).values()
    assert plain[0][2]["expert_overflow/moe"] == split[0][2]["expert_overflow/moe"] > 0
    for (losses, parameters, _), (expected, values, _) in zip(split, plain, strict=True):
        assert close(losses, expected)
        assert all(close(parameters[key], value) or "key.bias" in key for key, value in values.items())


def blocks(sizes: dict[str, Any], *arguments: Any) -> Any:
    return fit(sizes, {}, Stacked, *arguments)


class Stacked(Everything):
    """Twice the same in recomputed blocks, with dropout."""

    def __init__(self, capacity_factor: float | None = None) -> None:
        super().__init__(capacity_factor)
        self.blocks = nn.ModuleList(MoE(DIM, 16, 4, 2, capacity_factor) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = F.dropout(x + block(self.norm(x)), 0.1, self.training)
        return self.head(self.norm(x))


@pytest.mark.parametrize(
    ("capacity_factor", "modes"),
    [
        pytest.param(None, ["full", "communication_aware"], id="dropless", marks=pytest.mark.full),
        pytest.param(0.6, ["full"], id="capacity, all of it", marks=pytest.mark.full),
        pytest.param(0.6, ["communication_aware"], id="capacity"),
    ],
)
def test_replayed_communication_is_bit_equal(capacity_factor: float | None, modes: list[str]) -> None:
    layout = {**LAYOUTS["ted"][1], "sequence_parallel": True}
    runs = {mode: (blocks, {**layout, "activation_checkpointing": mode}, capacity_factor) for mode in (None, *modes)}
    found = together(4, runs)
    for mode in modes:
        for again, expected in zip(found[mode], found[None], strict=True):
            assert torch.equal(again[0], expected[0])
            assert all(torch.equal(again[1][key], value) for key, value in expected[1].items())


# --- what is refused


class OneEnd(Everything):
    def __init__(self, end: str) -> None:
        super().__init__()
        delattr(self, end)


class PastTheHead(Everything):
    """Adds to the loss what it computes from a rank's own part of the tokens."""

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        hidden = self.plain(self.embedding(batch[0]))
        return self.head(hidden).square().mean() + hidden.square().mean()


class Odd(Everything):
    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return self(batch[0][:, :7]).sum()


class WrongMask(Everything):
    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return self.moe(self.embedding(batch[0]), token_mask=batch[0][:, :3] != 0).sum()


def refused(make: Any, *arguments: Any) -> str:
    try:
        fit({"tensor_parallel_size": 2, "sequence_parallel": True}, {}, make, *arguments)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "nothing is refused"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        ((OneEnd, "embedding"), ("sequence_parallel=True", "no VocabParallelEmbedding", "sequence_parallel=False")),
        ((OneEnd, "head"), ("sequence_parallel=True", "no VocabParallelHead", "sequence_parallel=False")),
        ((Odd,), ("sequence_parallel=True", "tensor_parallel_size=2", "length of 7", "multiples of 2")),
        ((PastTheHead,), ("plain.bias, plain.weight", "sequence_parallel=True", "VocabParallelHead")),
        ((WrongMask,), ("token mask of length 3", "sequence_parallel=True", "8 (whole sequences) or 4")),
    ],
    ids=["embedding", "head", "length", "loss", "mask"],
)
def test_refused_by_name(make: tuple[Any, ...], words: tuple[str, ...]) -> None:
    for said in on_ranks(2, refused, *make):
        assert all(word in said for word in words), said


def generated(layout: dict[str, Any] | None) -> Tensor:
    from lightning_tex import LanguageModel
    from lightning_tex.models import DecoderConfig

    module = LanguageModel(DecoderConfig(VOCABULARY, DIM, 2, 4, max_sequence_length=15, num_experts=4))
    trainer = new_trainer(layout, max_steps=1)
    rows = [{"input_ids": ids, "labels": labels} for ids, labels in batches(1)]
    rows = [{key: value[:, :4] for key, value in row.items()} for row in rows]
    L.seed_everything(3)
    trainer.fit(module, loader(rows))
    return module.generate(torch.arange(3)[None], 12, temperature=0.0)


def test_generation_takes_prompts_of_any_length() -> None:
    layout = {"tensor_parallel_size": 2}
    runs = {"plain": (generated, layout), "split": (generated, {**layout, "sequence_parallel": True})}
    plain, split = (written for written, _ in together(2, runs).values())
    assert plain.shape == split.shape == (1, 15)
    assert torch.equal(plain, split)
