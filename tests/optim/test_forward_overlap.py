"""Parameters that are gathered while the next forward runs are those that are gathered before it."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from helpers.behaviour_modules import batches, new_trainer, on_data_axis
from helpers.cases import case
from helpers.ranks import together
from helpers.trainers import gathered
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.func import functional_call

from lightning_tex.layers import VocabParallelCrossEntropy
from lightning_tex.models import Decoder, DecoderConfig
from lightning_tex.optim import MuonAdamW, flat_sizes
from lightning_tex.optim.forward_overlap import ForwardOverlap

DATA = {"expert_parallel_size": 2}
TED = {"tensor_parallel_size": 2, "expert_parallel_size": 2}


# --- one process: what waits


class _UnderWay:
    """A gather of a parameter's values: 1 when it has been waited for."""

    def __init__(self, buffer: Any) -> None:
        self.buffer, self.waits = buffer, 0

    def wait(self) -> None:
        self.waits += 1
        for entry in self.buffer.entries:
            entry.parameter.values.fill_(1)


def awaited(*layers: nn.Module) -> tuple[ForwardOverlap, list[_UnderWay]]:
    """Layers whose parameters are under way, a buffer for each."""
    overlap, started = ForwardOverlap(), []
    overlap.attend(nn.Sequential(*layers))
    for layer in layers:
        buffer = _Buffer(layer)
        started.append(buffer.started)
        overlap.start(buffer)  # type: ignore[arg-type]
    overlap.step_is_over()
    return overlap, started


class _Buffer:
    def __init__(self, layer: nn.Module) -> None:
        self.owners = SimpleNamespace(size=2)
        self.entries = [SimpleNamespace(parameter=parameter) for parameter in layer.parameters()]
        for entry in self.entries:
            entry.parameter.values = entry.parameter.data.zero_()
        self.started = _UnderWay(self)

    def gather(self) -> _UnderWay:
        return self.started


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight.square()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


X = torch.ones(2, 2)
READS: dict[str, Callable[[nn.Linear], Any]] = {
    "forward": lambda layer: layer(X),
    "forward by name": lambda layer: layer.forward(X),
    "function": lambda layer: nn.functional.linear(X, layer.weight),
    "operator": lambda layer: layer.weight + 1,
    "list": lambda layer: torch.stack([X, layer.weight]),
    "foreach": lambda layer: torch._foreach_add([layer.weight], 1),
    "data": lambda layer: layer.weight.data,
    "state dict": lambda layer: layer.state_dict()["weight"],
    "copy": lambda layer: copy.deepcopy(layer).weight,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)).weight,
    "written": lambda layer: layer.weight.data.add_(0),
    "numbers": lambda layer: layer.weight.tolist(),
    "address": lambda layer: layer.weight.data_ptr(),
    "storage": lambda layer: layer.weight.untyped_storage(),
    "iteration": lambda layer: list(layer.weight),
    "printed": lambda layer: repr(layer.weight),
    "autograd function": lambda layer: Square.apply(layer.weight),
    "functional call": lambda layer: functional_call(layer, dict(layer.named_parameters()), X),
    "vector": lambda layer: nn.utils.parameters_to_vector(layer.parameters()),
    "sent by torch.distributed": lambda layer: layer.weight.is_complex(),
}


def test_whoever_reads_a_parameter_waits_for_it() -> None:
    for name, read in READS.items():
        with case(name):
            read_layer, other = nn.Linear(2, 2, bias=False), nn.Linear(2, 2)
            overlap, (started, not_read) = awaited(read_layer, other)
            for _ in range(2):
                result = read(read_layer)
            assert (started.waits, not_read.waits) == (1, 0)
            if isinstance(result, Tensor):
                assert result.detach().min() >= 1
            assert type(read_layer.weight) is nn.Parameter
            overlap.release()
            assert not_read.waits == 1 and type(other.weight) is nn.Parameter
            assert vars(other.weight).keys() == {"values"} and not other._forward_pre_hooks


class Foreign(nn.Linear):
    """Hands its weight to an operator outside torch, to which a parameter of another class would be no parameter."""

    def forward(self, x: Tensor) -> Tensor:
        assert type(self.weight) is nn.Parameter
        return x


def test_a_module_waits_before_its_forward() -> None:
    layer = Foreign(2, 2)
    _, (started,) = awaited(layer)
    for _ in range(2):
        layer(X)
    assert started.waits == 1


def test_what_reads_no_value_does_not_wait() -> None:
    layer = nn.Linear(2, 2, bias=False)
    hash_of = hash(layer.weight)
    _, (started,) = awaited(layer)
    weight = layer.weight
    layer.zero_grad()
    weight.grad = torch.ones(2, 2)
    weight.grad.zero_()
    weight.grad = None
    assert isinstance(weight, nn.Parameter) and hash(weight) == hash_of and {weight: 1}[weight]
    assert (weight.shape, weight.size(0), weight.numel(), weight.dtype) == ((2, 2), 2, 4, torch.float32)
    assert weight.requires_grad and weight.is_leaf and weight.device.type == "cpu" and weight._version >= 0
    assert not started.waits


def test_a_compiled_module_and_a_parameter_of_a_class_of_its_own_are_waited_for_at_once() -> None:
    compiled, own_class = nn.Linear(2, 2), nn.Linear(2, 2)
    compiled.compile(backend="eager")
    own_class.bias = OwnClass(torch.ones(2))
    for layer in (compiled, own_class):
        overlap, (started,) = awaited(layer)
        assert started.waits == 1 and not overlap.under_way
        assert type(layer.weight) is nn.Parameter


class OwnClass(nn.Parameter):
    pass


# --- ranks: the same numbers


class Trained(L.LightningModule):
    """A tied decoder, and parameters that no forward of a module reads; notes what is under way at the first block."""

    def __init__(self, habits: bool = False, optimizer: str = "adamw") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.decoder = Decoder(DecoderConfig(61, 16, 3, 4, hidden_dim=24, num_experts=4, top_k=2))
        self.scale, self.unused, self.frozen = nn.Parameter(torch.ones(16)), nn.Linear(4, 4), nn.Linear(16, 16)
        self.frozen.requires_grad_(False)
        self.loss = VocabParallelCrossEntropy()
        self.habits, self.optimizer = habits, optimizer
        self.noted: list[Any] = []
        self.last_is_under_way: list[bool] = []
        self.begun = 0
        self.decoder.blocks[0].register_forward_pre_hook(self.note)

    def note(self, *_: Any) -> None:
        if len(self.last_is_under_way) < self.begun:  # the first time in a step, not when it is recomputed
            (optimizer,) = self.trainer.strategy.optimizers
            gathered_ones = [shard.buffer for shard in optimizer.shards if shard.buffer.owners.size > 1]
            self.last_is_under_way.append(gathered_ones[-1:] == optimizer.buffers.gathering.under_way[-1:] != [])

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        self.begun += 1
        penalty = sum(p.square().mean() for p in self.parameters()) if self.habits else 0.0
        hidden = self.decoder.hidden(batch[0][:, :4])
        loss = self.loss(self.decoder.head(hidden + self.frozen(hidden) * self.scale), batch[1][:, :4])
        self.noted.append(loss.detach())
        return loss + penalty

    def on_before_zero_grad(self, optimizer: Any) -> None:
        if self.habits:
            self.noted += [p.detach().clone() for p in self.parameters()]

    def test_step(self, batch: list[Tensor], index: int) -> None:
        self.noted.append(self.loss(self.decoder(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        return MuonAdamW(self, lr=0.01) if self.optimizer == "muon" else torch.optim.AdamW(trained, lr=0.01)


class Writes(Callback):
    """Reads and writes parameters between two steps."""

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        module.noted += [p.detach().clone() for p in module.parameters()]
        with torch.no_grad():
            module.decoder.norm.weight.mul_(0.9)
        module.unused.weight.data = module.unused.weight.data * 0.5
        module.noted.append(module.state_dict()["decoder.norm.weight"].clone())


def fits(layout: dict[str, Any], overlap: bool, module: dict[str, Any], flags: dict[str, Any], times: int = 1) -> Any:
    flat_sizes.SMALLEST_BUCKET = 64
    trained = Trained(**module)
    layout = {**layout, "check_replicas_every_n_steps": 0}  # which reads all parameters
    callbacks = [Writes()] if trained.habits else []
    trainer = new_trainer(layout, callbacks=callbacks, **{"gradient_clip_val": 0.1, **flags})
    trainer.strategy.adopt(replace(trainer.strategy.communication, overlap=overlap))
    for fit in range(times):
        trainer.fit_loop.max_epochs = fit + 1
        trainer.fit(trained, on_data_axis(trainer, batches(4)))
    if times > 1:
        trainer.test(trained, on_data_axis(trainer, batches(1)), verbose=False)
    assert not trainer.strategy.optimizers[0].buffers.gathering.under_way
    return [*gathered(trained, trainer).values(), *trained.noted], trained.last_is_under_way


SEQUENCE = {**TED, "sequence_parallel": True, "zero_stage": 2, "activation_checkpointing": "communication_aware"}
# Layout, what is trained, flags of the Trainer, fits.
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], int]] = {
    "data": (DATA, {}, {}, 1),
    "habits": (DATA, {"habits": True}, {}, 1),
    "sequence": (SEQUENCE, {}, {"accumulate_grad_batches": 2}, 1),
}
MORE_RUNS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], int]] = {
    "two fits and a test": (TED, {}, {}, 2),
    "muon": (DATA, {"optimizer": "muon"}, {}, 1),
    "zero 0": ({**DATA, "zero_stage": 0}, {}, {}, 1),
    "masters": (DATA, {"habits": True}, {"precision": "bf16-mixed"}, 2),
    "bf16": (DATA, {}, {"precision": "bf16-true", "gradient_clip_algorithm": "value"}, 1),
    **{
        f"tensor {tensor}, expert {expert}, zero {stage}, {recompute}, {count}": (
            {
                "tensor_parallel_size": tensor,
                "expert_parallel_size": expert,
                "zero_stage": stage,
                "activation_checkpointing": recompute,
            },
            {},
            {"accumulate_grad_batches": count},
            1,
        )
        for tensor, expert, stage, recompute, count in itertools.product(
            (1, 2, 4), (1, 2, 4), (1, 2), (None, "full"), (1, 2)
        )
        if tensor * expert <= 4
    },
}


def same_numbers(runs: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], int]]) -> None:
    asked = itertools.product(runs, (False, True))
    by_run = together(4, {(name, on): (fits, (r := runs[name])[0], on, *r[1:]) for name, on in asked})
    for name, (layout, module, flags, times) in runs.items():
        with case(name):
            for (early, under_way), (late, none) in zip(by_run[name, True], by_run[name, False], strict=True):
                assert len(early) == len(late) and all(map(torch.equal, early, late))
                assert not any(none)
                if module.get("habits") or layout.get("zero_stage") == 0 or layout.get("tensor_parallel_size") == 4:
                    assert not any(under_way)
                else:
                    every = flags.get("accumulate_grad_batches", 1)
                    assert under_way == [i > 0 and i % every == 0 for i in range(4)] * times


def test_training_is_bit_equal_and_the_forward_begins_before_the_last_parameters_are_there() -> None:
    same_numbers(RUNS)


@pytest.mark.full
def test_training_is_bit_equal_on_every_layout() -> None:
    same_numbers(MORE_RUNS)
