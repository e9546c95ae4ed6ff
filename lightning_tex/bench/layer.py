"""One MoE layer alone: time, memory, launches and waits of its forward and backward, beside other projects' layers."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_tex.bench.counting import kept_bytes, launches, synchronisations
from lightning_tex.bench.layer_contestants import OURS, Ours, peers
from lightning_tex.bench.layer_shapes import Routing, Shape, choices, tokens_that_choose
from lightning_tex.bench.memory import peak_bytes
from lightning_tex.bench.moments import LargeProduct, Moment, peak, synchronise


@dataclass(frozen=True)
class Plan:
    """What is measured, and how.

    Args:
        shapes: the layers.
        routings: how tokens choose experts.
        dtypes: of parameters and tokens.
        recomputations: whether the forward runs again in the backward.
        tokens: T.
        device: where.
        exponent: of Zipf's law.
        capacity_factor: of our layer.
        turns: of which medians are taken; in each all layers run one after another.
        repeat: passes of a layer in a turn that are timed, after one that is not.
        new_gradients: every backward makes gradients anew; else it adds to those that are there, as a strategy's does.
        only: peers that are measured beside ours; ``None``: all that can be had.
        seconds: after which no further combination is begun; ``None``: all are.
    """

    shapes: Sequence[Shape]
    routings: Sequence[Routing]
    dtypes: Sequence[torch.dtype]
    recomputations: Sequence[bool]
    tokens: int
    device: torch.device
    exponent: float = 1.0
    capacity_factor: float | None = None
    turns: int = 5
    repeat: int = 3
    new_gradients: bool = False
    only: list[str] | None = None
    seconds: float | None = None


class Clocked(NamedTuple):
    """Seconds of one forward and one backward."""

    forward: float
    backward: float

    @property
    def both(self) -> float:
        return self.forward + self.backward


def cases(plan: Plan) -> Iterator[dict[str, Any]]:
    """Measure one combination of shape, dtype, routing and recomputation after the other."""
    until = None if plan.seconds is None else time.monotonic() + plan.seconds
    for combination in product(plan.shapes, plan.dtypes, plan.routings, plan.recomputations):
        if until is not None and time.monotonic() > until:
            return
        yield Case(*combination, plan).report()
        gc.collect()
        if plan.device.type == "cuda":
            torch.cuda.empty_cache()


class Pass:
    """A layer with its tokens: one forward, one backward.

    Args:
        layer: [T, D] -> [T, D].
        x: its input, a leaf.
        grad: of its output.
        recomputed: run its forward again in the backward.
        new_gradients: see :class:`Plan`.
    """

    def __init__(self, layer: nn.Module, x: Tensor, grad: Tensor, recomputed: bool, new_gradients: bool) -> None:
        self.layer, self.x, self.grad = layer, x, grad
        self.recomputed, self.new_gradients = recomputed, new_gradients
        if not new_gradients:
            for parameter in layer.parameters():
                parameter.grad = torch.zeros_like(parameter)

    def prepare(self) -> None:
        """What a step before it would have done."""
        self.x.grad = None
        if self.new_gradients:
            for parameter in self.layer.parameters():
                parameter.grad = None

    def forward(self) -> Tensor:
        """Its output."""
        if self.recomputed:
            return checkpoint(self.layer, self.x, use_reentrant=False)
        return self.layer(self.x)

    def backward(self, y: Tensor) -> None:
        """Gradients of all parameters and of the input."""
        y.backward(self.grad)

    def both(self) -> None:
        self.backward(self.forward())


class Case:
    """One shape, dtype, routing and way of recomputation, for all contestants.

    Args:
        shape, dtype, routing, recomputed: the combination.
        plan: the rest.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, routing: Routing, recomputed: bool, plan: Plan) -> None:
        self.shape, self.dtype, self.routing, self.recomputed, self.plan = shape, dtype, routing, recomputed, plan
        device = plan.device
        torch.manual_seed(0)
        ours = Ours(shape, device, dtype, plan.capacity_factor)
        wanted = choices(shape, plan.tokens, routing, plan.exponent)
        self.x = tokens_that_choose(wanted, ours.moe.router.weight.data).to(dtype).requires_grad_()
        grad = torch.randn_like(self.x)
        self.load = torch.bincount(wanted.flatten(), minlength=shape.experts)
        self.skipped: dict[str, str] = {}
        layers: dict[str, nn.Module] = {OURS: ours}
        for name, layer in peers(ours, shape, plan.only):
            if isinstance(layer, str):
                self.skipped[name] = layer
            else:
                layers[name] = layer
        self.passes = {n: Pass(m, self.x, grad, recomputed, plan.new_gradients) for n, m in layers.items()}

    def report(self) -> dict[str, Any]:
        """Measure everything."""
        rows: dict[str, dict[str, Any]] = {}
        reference: Tensor | None = None
        for name in list(self.passes):
            try:
                output, rows[name] = self._counted(self.passes[name])
            except Exception as error:
                if name == OURS:
                    raise
                self.skipped[name] = str(error).strip().partition("\n")[0] or type(error).__name__
                del self.passes[name]
                continue
            reference = output if reference is None else reference
            rows[name]["difference"] = float((output - reference).norm() / reference.norm())
        large = LargeProduct(self.plan.device, self.dtype)
        times = self._timed(large)
        of = peak(self.plan.device, "32-true" if self.dtype is torch.float32 else "bf16-mixed", large)
        for name, clocked in times.items():
            rows[name] |= self._rates(clocked, times[OURS], of["flops_per_second"])
        return {
            "shape": self.shape.name,
            "dim": self.shape.dim,
            "hidden": self.shape.hidden,
            "experts": self.shape.experts,
            "top_k": self.shape.top_k,
            "tokens": self.plan.tokens,
            "dtype": str(self.dtype).removeprefix("torch."),
            "routing": self.routing,
            "recomputed": self.recomputed,
            "largest_load": float(self.load.max() / self.load.float().mean()),
            "forward_flops": self.shape.forward_flops(self.plan.tokens),
            "product_flops_per_second": large.flops,
            "peak": of,
            "layers": rows,
            "skipped": self.skipped,
        }

    def _counted(self, one: Pass) -> tuple[Tensor, dict[str, Any]]:
        """Warm a layer up and count; its output, and the counts."""
        device = self.plan.device
        for _ in range(2):
            one.prepare()
            one.both()
        one.prepare()
        y, forward_launches = launches(one.forward, device)
        _, backward_launches = launches(partial(one.backward, y), device)
        output = y.detach().float()
        one.prepare()
        y, forward_waits = synchronisations(one.forward, device)
        _, backward_waits = synchronisations(partial(one.backward, y), device)
        one.prepare()
        y, kept = kept_bytes(one.forward, device)
        kept -= y.nbytes
        one.backward(y)
        del y
        one.prepare()
        return output, {
            "peak_bytes": peak_bytes(one.both, device),
            "kept_bytes": kept,
            "launches": [forward_launches, backward_launches],
            "synchronisations": None if forward_waits is None else [forward_waits, backward_waits],
        }

    def _timed(self, large: LargeProduct) -> dict[str, list[Clocked]]:
        """Passes of all layers in turns, with a large product beside them."""
        times: dict[str, list[Clocked]] = {name: [] for name in self.passes}
        names = list(times)
        for turn in range(self.plan.turns):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                times[name] += self._turn(self.passes[name])
            large.time()
        return times

    def _turn(self, one: Pass) -> list[Clocked]:
        """As one micro-batch follows another: nothing waits for the device but what the layer itself waits for."""
        device = self.plan.device
        synchronise(device)
        marks = []
        for _ in range(1 + self.plan.repeat):
            one.prepare()
            begin = Moment(device)
            y = one.forward()
            middle = Moment(device)
            one.backward(y)
            end = Moment(device)
            del y
            marks.append((begin, middle, end))
        synchronise(device)
        return [Clocked(middle - begin, end - middle) for begin, middle, end in marks[1:]]

    def _rates(self, clocked: Sequence[Clocked], ours: Sequence[Clocked], peak: float) -> dict[str, Any]:
        forward = statistics.median(time.forward for time in clocked)
        both = statistics.median(time.both for time in clocked)
        flops = self.shape.forward_flops(self.plan.tokens)
        return {
            "forward_ms": 1e3 * forward,
            "both_ms": 1e3 * both,
            "both_ms_all": [1e3 * time.both for time in clocked],
            "tokens_per_second": [self.plan.tokens / forward, self.plan.tokens / both],
            "flops_per_second": [flops / forward, 3 * flops / both],
            "share_of_peak": [flops / forward / peak, 3 * flops / both / peak],
            "to_ours": [
                forward / statistics.median(time.forward for time in ours),
                both / statistics.median(time.both for time in ours),
            ],
        }


def conditions(plan: Plan) -> dict[str, Any]:
    """What all cases of a report have in common."""
    cuda = plan.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(plan.device) if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "turns": plan.turns,
        "repeat": plan.repeat,
        "gradients": "new" if plan.new_gradients else "added to",
        "capacity_factor": plan.capacity_factor,
    }
