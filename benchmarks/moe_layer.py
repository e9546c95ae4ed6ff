"""The MoE layer beside a plain sort-and-loop in public torch calls: one process, one thread, forward and backward.

    python benchmarks/moe_layer.py [--turns 7] [--cases "8 large" "64 small"] [--precisions fp32 bf16]

All run in turns on the same tokens and weights, and must give the same output and gradients. Times are of the
processor, medians over the turns; the ratio is the plain one's time by the layer's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_tex.moe import MoE

# T tokens, D model width, H hidden width, E experts, k choices per token, N = T k rows, n rows of one expert


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer, and of its batch."""

    tokens: int
    dim: int
    hidden: int
    experts: int
    top_k: int


SHAPES = {
    "8 large": Shape(tokens=2048, dim=512, hidden=1792, experts=8, top_k=2),
    "64 small": Shape(tokens=4096, dim=256, hidden=96, experts=64, top_k=8),
    "128 small": Shape(tokens=4096, dim=256, hidden=96, experts=128, top_k=8),
}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class SortAndLoop(nn.Module):
    """What one writes: choices sorted by expert, a loop over the experts, a weighted sum. [T, D] -> [T, D]"""

    def __init__(self, layer: MoE) -> None:
        super().__init__()
        self.top_k = layer.top_k
        self.router = nn.Parameter(layer.router.weight.detach().clone())
        assert layer.experts.gate is not None
        self.gate, self.up, self.down = (
            nn.Parameter(p.detach().clone()) for p in (layer.experts.gate, layer.experts.up, layer.experts.down)
        )

    def forward(self, x: Tensor) -> Tensor:
        scores = F.linear(x.float(), self.router).softmax(-1)
        weights, chosen = scores.topk(self.top_k)  # [T, k]
        weights = weights / weights.sum(-1, keepdim=True)
        order = chosen.flatten().argsort(stable=True)
        sizes = chosen.flatten().bincount(minlength=len(self.up)).tolist()
        token = order // self.top_k
        outputs = []
        parts = x[token].split(sizes)
        for rows, gate, up, down in zip(parts, self.gate.unbind(), self.up.unbind(), self.down.unbind(), strict=True):
            outputs.append(F.linear(F.silu(F.linear(rows, gate)) * F.linear(rows, up), down))  # [n, D]
        weighted = torch.cat(outputs) * weights.flatten()[order, None].to(x.dtype)
        return torch.zeros_like(x).index_add(0, token, weighted)


def contestants(shape: Shape, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The layer and the plain one, of equal weights."""
    torch.manual_seed(0)
    layer = MoE(
        shape.dim, shape.hidden, shape.experts, shape.top_k, None, "swiglu", norm_topk_prob=True,
        load_balance_coefficient=0,
    )  # fmt: skip
    layer.experts.to(dtype)
    return {"lightning_tex": layer, "sort and loop": SortAndLoop(layer)}


def turn(module: nn.Module, x: Tensor, upstream: Tensor) -> tuple[float, list[Tensor]]:
    """Seconds of the processor for one forward and backward; output and gradients."""
    x = x.detach().requires_grad_()
    module.zero_grad()
    begun = time.process_time()
    y = module(x)
    y.backward(upstream)
    seconds = time.process_time() - begun
    assert x.grad is not None
    return seconds, [y.detach(), x.grad]


def compare(shape: Shape, dtype: torch.dtype, turns: int) -> dict[str, float]:
    """Median seconds of each contestant.

    Raises:
        AssertionError: they do not compute the same.
    """
    modules = contestants(shape, dtype)
    x, upstream = (torch.randn(shape.tokens, shape.dim).to(dtype) for _ in range(2))
    results = [turn(module, x, upstream)[1] for module in modules.values()]
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm(), "they do not compute the same"
    seconds: dict[str, list[float]] = {name: [] for name in modules}
    for _ in range(turns):
        for name, module in modules.items():
            seconds[name].append(turn(module, x, upstream)[0])
    return {name: statistics.median(times) for name, times in seconds.items()}


def report(cases: list[str], precisions: list[str], turns: int, say: Callable[[str], None] = print) -> None:
    """A line for each case and precision."""
    say(f"{'case':12} {'':6} {'lightning_tex':>14} {'sort and loop':>14} {'ratio':>6}")
    for case in cases:
        for precision in precisions:
            found = compare(SHAPES[case], PRECISIONS[precision], turns)
            ours, plain = found["lightning_tex"], found["sort and loop"]
            say(f"{case:12} {precision:6} {1e3 * ours:11.0f} ms {1e3 * plain:11.0f} ms {plain / ours:6.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--cases", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    report(options.cases, options.precisions, options.turns)


if __name__ == "__main__":
    main()
