"""Gradients that leave while the backward still runs arrive as those that leave after it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from helpers.backwards import announced_backward
from helpers.behaviour_modules import batches, new_trainer, on_data_axis
from helpers.cases import case, in_full
from helpers.ranks import on_ranks, together
from helpers.trainers import gathered
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_tex import TexMoEStrategy
from lightning_tex.layers import VocabParallelCrossEntropy
from lightning_tex.models import Decoder, DecoderConfig
from lightning_tex.optim import flat_sizes

LAYOUTS = {
    "data": {"tensor_parallel_size": 1, "expert_parallel_size": 2},
    "ted": {"tensor_parallel_size": 2, "expert_parallel_size": 1},
    "sequence": {"tensor_parallel_size": 2, "expert_parallel_size": 2, "sequence_parallel": True},
}


class Watched(L.LightningModule):
    """A decoder with parameters of every kind; notes how many buffers are under way when the first layer is reached."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.decoder = Decoder(DecoderConfig(61, 16, 3, 4, hidden_dim=24, num_experts=4, tie_embeddings=False))
        self.unused, self.sometimes = nn.Linear(4, 4), nn.Linear(16, 16)
        self.loss = VocabParallelCrossEntropy()
        self.under_way: list[int] = []

    def on_fit_start(self) -> None:
        def note(_: Tensor) -> None:
            self.under_way.append(sum(buffer.reducing for buffer in self.flat_buffers()))

        self.decoder.embedding.weight.register_post_accumulate_grad_hook(note)

    def flat_buffers(self) -> Any:
        return [shard.gradients for shard in self.trainer.strategy.optimizers[0].shards]

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        x = self.decoder.embedding(batch[0][:, :4])
        for block in self.decoder.blocks:
            x = block(x)
        if self.global_rank < 2 and index % 2:  # a branch that some ranks take and others do not
            x = x + self.sometimes(x)
        return self.loss(self.decoder.head(self.decoder.norm(x)), batch[1][:, :4])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class LooksAtGradients(Watched):
    """Changes gradients before they are combined."""

    def on_after_backward(self) -> None:
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(1 + self.global_rank)


def fit(layout: dict[str, Any], overlap: bool, make: Any = Watched, **flags: Any) -> Any:
    flat_sizes.SMALLEST_BUCKET = 64
    module = make()
    trainer = new_trainer(layout, **{"gradient_clip_val": 0.1, **flags})
    assert isinstance(trainer.strategy, TexMoEStrategy)
    trainer.strategy.communication = replace(trainer.strategy.communication, overlap=overlap)
    trainer.fit(module, on_data_axis(trainer, batches(4)))
    return gathered(module, trainer), module.under_way


@pytest.mark.parametrize("name", in_full(LAYOUTS, ("data", "sequence")))
def test_training_is_bit_equal(name: str) -> None:
    runs = {
        (n, overlap): (fit_with, LAYOUTS[name], overlap, Watched, {"accumulate_grad_batches": n})
        for n, overlap in itertools.product((1, 2), (False, True))
    }
    by_run = together(4, runs)
    for n in (1, 2):
        for early, late in zip(by_run[n, True], by_run[n, False], strict=True):
            with case(accumulate_grad_batches=n):
                (parameters, under_way), (expected, none_under_way) = early, late
                assert all(torch.equal(parameters[key], value) for key, value in expected.items())
                assert none_under_way == [0] * 4
                last = under_way[n - 1 :: n]
                assert last[0] >= 1, "the first backward overlaps, too, in the order of the model"
                assert min(last[1:]) >= 3, "nothing left before the backward had come to the first layer"
                assert n == 1 or under_way[0::2] == [0, 0], "something left before the last micro-batch"


def fit_with(layout: dict[str, Any], overlap: bool, make: Any, flags: dict[str, Any]) -> Any:
    return fit(layout, overlap, make, **flags)


def test_a_hook_after_the_backward_sees_the_ranks_own_gradients() -> None:
    late, early = (on_ranks(4, fit_with, LAYOUTS["data"], overlap, LooksAtGradients, {}) for overlap in (False, True))
    for (parameters, under_way), (expected, _) in zip(early, late, strict=True):
        assert under_way == [0] * 4
        assert all(torch.equal(parameters[key], value) for key, value in expected.items())


class Reentrant(Watched):
    """One layer in two reentrant checkpoints: its gradient is computed in two parts."""

    def __init__(self) -> None:
        super().__init__()
        del self.unused
        for part in ("blocks", "norm", "head"):
            delattr(self.decoder, part)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        x = self.decoder.embedding(batch[0])
        for _ in range(2):
            x = x + checkpoint(self.sometimes, x, use_reentrant=True)
        return F.mse_loss(x, torch.ones_like(x))


def only_message(make: Any) -> str:
    try:
        fit({}, True, make)
    except RuntimeError as error:
        return str(error)
    return "nothing is refused"


def test_a_gradient_in_several_parts_is_refused_by_name() -> None:
    for said in on_ranks(2, only_message, Reentrant):
        assert "sometimes." in said and "use_reentrant=False" in said


def third_gradient(layout: dict[str, Any], second_fails: bool) -> list[Tensor]:
    """The combined gradients of a third backward, after a second one that failed when some gradients had left."""
    flat_sizes.SMALLEST_BUCKET = 64
    module = Watched()
    trainer = new_trainer(layout, max_steps=0)
    trainer.fit(module, on_data_axis(trainer, batches(1)))
    optimizer, batch = trainer.strategy.optimizers[0], batches(1)[0]
    backwards = []

    def fail(_: Tensor) -> None:
        backwards.append(sum(buffer.reducing for buffer in module.flat_buffers()))
        if second_fails and len(backwards) == 2:
            raise InterruptedError

    module.decoder.embedding.weight.register_post_accumulate_grad_hook(fail)
    for step in range(3):
        optimizer.zero_grad()
        try:
            announced_backward(optimizer, module.training_step(batch, 0), last=True, undisturbed=True)
            optimizer.reduce_gradients(whole=True)
        except InterruptedError:
            assert step == 1
    assert backwards[0] >= 1 and backwards[1] == backwards[2] >= 3
    return [parameter.grad.clone() for parameter in module.parameters()]


def test_a_step_after_one_that_was_given_up() -> None:
    plain, after = (on_ranks(2, third_gradient, LAYOUTS["data"], fails) for fails in (False, True))
    for again, expected in zip(after, plain, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
