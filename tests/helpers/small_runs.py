"""A small recipe, run for real under the profiler and as a trace."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from lightning import Callback, LightningModule
from torch import Tensor
from torch._C._profiler import _ExtraFields_Allocation
from torch.profiler import ProfilerActivity, profile, record_function

from lightning_tex import LanguageModel
from lightning_tex.bench.memory import live_bytes, settled_bytes
from lightning_tex.layers import ParallelAttention, VocabParallelCrossEntropy, VocabParallelEmbedding, VocabParallelHead
from lightning_tex.models import DecoderConfig
from lightning_tex.moe import MoE, SoftmaxRouter
from lightning_tex.parallel import transport
from lightning_tex.parallel.byte_meter import Sent
from lightning_tex.planner_trace import Trace, trace
from lightning_tex.planner_trace.batches import MadeUpBlocks
from lightning_tex.planner_trace.states import state_bytes
from lightning_tex.planner_trace.trace import _DRY
from lightning_tex.recipe import Recipe, quiet

VOCABULARY, LENGTH, BATCH = 300, 32, 8


class EvenRouter(SoftmaxRouter):
    """Routes choice i of a rank's tokens to expert i % E, as a trace takes routers to do."""

    def score(self, logits: Tensor) -> Tensor:
        tokens, experts = logits.shape
        first = torch.arange(tokens, device=logits.device)[:, None] * self.top_k
        place = (torch.arange(experts, device=logits.device) - first) % experts
        return (logits.softmax(-1) * 1e-3 + (experts - place) * (place < self.top_k)).softmax(-1)


class EvenlyRouted(LanguageModel):
    """A language model with such routers."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)

    def configure_model(self) -> None:
        new = self.decoder is None
        super().configure_model()
        if new:
            for _, moe in self.decoder.moe_layers():
                moe.router.__class__ = EvenRouter


class OwnModule(LightningModule):
    """Built where it is constructed, with plain layers among the TEX ones."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config, width = config, config.dim
        self.embedding, self.head = VocabParallelEmbedding(VOCABULARY, width), VocabParallelHead(width, VOCABULARY)
        self.attention, self.norm = ParallelAttention(width, config.num_heads), torch.nn.LayerNorm(width)
        self.moe = MoE(width, config.hidden_dim, config.num_experts, config.top_k, config.capacity_factor)
        self.moe.router.__class__ = EvenRouter
        self.gate, self.scale = torch.nn.Linear(width, 1), torch.nn.Parameter(torch.ones(1))
        self.loss = VocabParallelCrossEntropy()

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        x = self.embedding(batch["input_ids"])
        x = self.norm(x + self.attention(x))
        x = x + self.scale * self.gate(x).sigmoid() * self.moe(x)
        return self.loss(self.head(x), batch["labels"])


def write_recipe(folder: Path, model: str = "EvenlyRouted", **sizes: Any) -> Path:
    config = {
        "dim": 64,
        "num_layers": 4,
        "num_heads": 4,
        "num_kv_heads": 4,
        "hidden_dim": 96,
        "max_sequence_length": LENGTH,
        "num_experts": 4,
        "top_k": 2,
        **sizes,
    }
    recipe = {
        "seed_everything": 1,
        "trainer": {"accelerator": "cpu", "devices": 1, "gradient_clip_val": 1.0},
        "model": {"class_path": f"helpers.small_runs.{model}", "init_args": {"config": config}},
        "data": {
            "class_path": "lightning_tex.TextDataModule",
            "init_args": {"vocab_size": VOCABULARY, "sequence_length": LENGTH, "global_batch_size": BATCH},
        },
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1.0e-3}},
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


class Second(Callback):
    """Counts the second optimizer step."""

    def __init__(self) -> None:
        self.sent: dict[Sent, float] = {}
        self.states: dict[str, int] = {}
        self.live = 0
        self._inherited = live_bytes(torch.device("cpu"))  # from the process that this one was forked from
        self._step: Any = None

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 1 and self._step is None:
            meter = trainer.strategy.topology.world.meter
            meter.start()
            self._step = record_function("second step")
            self._step.__enter__()

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if trainer.global_step == 2:
            self._step.__exit__(None, None, None)
            meter = trainer.strategy.topology.world.meter
            meter.stop()
            self.sent = meter.sent_bytes()
            self.states = state_bytes(module, trainer.strategy.topology, trainer.strategy.optimizers[0])
            self.live = settled_bytes(torch.device("cpu")) - self._inherited


class Settled:
    """torch.distributed's functions, or a started collective: done when gloo's threads have let go of the tensors.

    A profiler's counter sees what the profiled thread frees. Without this, it would miss what another one frees last.
    """

    def __init__(self, inside: Any, tensors: tuple[Tensor, ...] = (), counts: tuple[int, ...] = ()) -> None:
        self.inside, self.tensors, self.counts = inside, tensors, counts

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tensors = tuple(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
        started = Settled(None, tensors, tuple(t._use_count() for t in tensors))
        started.inside = self.inside(*args, **kwargs)
        if started.inside is not None:
            return started
        return started.settle()

    def wait(self) -> None:
        self.inside.wait()
        self.inside = None
        self.settle()

    def settle(self) -> None:
        until = time.monotonic() + 0.02  # views made meanwhile count as well, and stay
        while any(t._use_count() > count for t, count in zip(self.tensors, self.counts, strict=True)):
            time.sleep(1e-4)
            if time.monotonic() > until:
                break
        self.tensors = ()


def settle_collectives() -> None:
    """Replace torch.distributed's functions in this process."""
    for name in ("all_reduce", "broadcast", "all_to_all_single"):
        setattr(dist, name, Settled(getattr(dist, name)))
    transport._all_gather = Settled(transport._all_gather)


def walk(events: list[Any]) -> Iterator[Any]:
    waiting = list(events)
    while waiting:
        event = waiting.pop()
        waiting += event.children
        yield event


def really(path: Path, world: int, strategy: dict[str, Any], trainer: dict[str, Any]) -> dict[str, Any]:
    """The second step of a real run on this rank: bytes sent, bytes of state, and the allocation counter's peak."""
    warnings.simplefilter("ignore")
    settle_collectives()
    second = Second()
    # oneDNN's products of 16 bits take memory of their own meanwhile, which is no part of what is computed.
    own_memory = torch.backends.mkldnn.flags(enabled=False)
    with own_memory, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen, quiet():
        fit = Recipe(str(path)).instantiate(strategy, {**_DRY, **trainer, "devices": world})
        fit.trainer.callbacks.append(second)
        fit.trainer.fit(fit.model, MadeUpBlocks.like(fit.datamodule))
    events = seen.profiler.kineto_results.experimental_event_tree()
    within = next(e for e in walk(events) if e.name == "second step")
    allocations = [e for e in walk(events) if isinstance(e.extra_fields, _ExtraFields_Allocation)]
    first = min(allocations, key=lambda e: e.start_time_ns).extra_fields
    peak = max(
        e.extra_fields.total_allocated
        for e in allocations
        if within.start_time_ns <= e.start_time_ns <= within.end_time_ns
    )
    peak -= first.total_allocated - first.alloc_size  # what the counter stood at before
    return {"sent": second.sent, "states": second.states, "peak": peak, "live": second.live}


def traced(path: Path, world: int, rank: int, strategy: dict[str, Any], trainer: dict[str, Any]) -> Trace:
    warnings.simplefilter("ignore")
    return trace(Recipe(str(path)), world, rank, strategy, trainer)
