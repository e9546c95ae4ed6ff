"""The MoE layer beside a plain sort-and-loop in public torch calls: one process, one thread, forward and backward.

    python benchmarks/moe_layer.py [--turns 7] [--cases "8 large" "64 small"] [--precisions fp32 bf16] [--transformers]

All run in turns on the same tokens and weights, and must give the same output and gradients. Times are of the
processor, medians over the turns; a ratio is another layer's time by this one's. The least that any of them could take
is what the nine products of each expert's rows take alone, each into a place that is there. ``--transformers`` adds
Qwen3's block of an installed transformers, with the grouped and the eager form of its experts. It routes in bf16 where
its tokens are, so that in bf16 some of its choices are others.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_tex.bench.layer_contestants import Ours, Transformers
from lightning_tex.bench.layer_shapes import Shape as NamedShape
from lightning_tex.moe import MoE

# T tokens, D model width, H hidden width, E experts, k choices per token, N = T k rows, n rows of one expert

OURS = "lightning_tex"
PRODUCTS = "products alone"


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


def contestants(shape: Shape, dtype: torch.dtype, transformers: bool) -> dict[str, nn.Module]:
    """The layer, the plain one and, if wanted, those of transformers, of equal weights."""
    torch.manual_seed(0)
    layer = MoE(
        shape.dim, shape.hidden, shape.experts, shape.top_k, None, "swiglu", norm_topk_prob=True,
        load_balance_coefficient=0,
    )  # fmt: skip
    layer.experts.to(dtype)
    found: dict[str, nn.Module] = {OURS: layer, "sort and loop": SortAndLoop(layer)}
    if transformers:
        named = NamedShape("", shape.dim, shape.hidden, shape.experts, shape.top_k, norm_topk_prob=True)
        ours = Ours(named, torch.device("cpu"), dtype)
        ours.moe.load_state_dict(layer.state_dict())
        for form in ("grouped_mm", "eager"):
            found[f"transformers {form}"] = block = Transformers(ours, named)
            block.block.experts.config._experts_implementation = form
    return found


class Products:
    """The products of a forward and a backward, of operands that are there, into places that are there."""

    def __init__(self, layer: SortAndLoop, x: Tensor) -> None:
        chosen = F.linear(x.float(), layer.router).topk(layer.top_k)[1]
        self.sizes = chosen.flatten().bincount(minlength=len(layer.up)).tolist()
        self.matrices = [p.detach() for p in (layer.gate, layer.up, layer.down)]
        self.gradients = [torch.empty_like(matrix) for matrix in self.matrices]
        hidden = layer.up.shape[1]
        # Rows and gradients of them, [n, D], and of hidden units, [n, H]
        self.rows, self.out = ([x.new_ones(n, x.shape[1]) for n in self.sizes] for _ in range(2))
        self.inner, self.made, self.also_made = ([x.new_ones(n, hidden) for n in self.sizes] for _ in range(3))

    def seconds(self) -> float:
        """Of the processor."""
        begun = time.process_time()
        for gate, up, down, row, inner, out, made, also in self._experts():
            torch.mm(row, gate.t(), out=made)
            torch.mm(row, up.t(), out=also)
            torch.mm(inner, down.t(), out=out)
        of_matrices = zip(*(matrix.unbind() for matrix in self.gradients), strict=True)
        for (gate, up, down, row, inner, out, made, _), (d_gate, d_up, d_down) in zip(
            self._experts(), of_matrices, strict=True
        ):
            torch.mm(row, down, out=made)
            torch.mm(row.t(), inner, out=d_down)
            torch.mm(inner.t(), row, out=d_gate)
            torch.mm(inner.t(), row, out=d_up)
            torch.mm(inner, up, out=out)
            out.addmm_(inner, gate)
        return time.process_time() - begun

    def _experts(self) -> Iterator[tuple[Tensor, ...]]:
        matrices = (matrix.unbind() for matrix in self.matrices)
        return zip(*matrices, self.rows, self.inner, self.out, self.made, self.also_made, strict=True)


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


def compare(shape: Shape, dtype: torch.dtype, turns: int, transformers: bool = False) -> dict[str, float]:
    """Median seconds of each contestant.

    Raises:
        AssertionError: they do not compute the same.
    """
    modules = contestants(shape, dtype, transformers)
    x, upstream = (torch.randn(shape.tokens, shape.dim).to(dtype) for _ in range(2))
    results = {name: turn(module, x, upstream)[1] for name, module in modules.items()}
    exact = dtype == torch.float32
    tolerance = 1e-4 if exact else 3e-2
    for name, result in results.items():
        for ours, theirs in zip(results[OURS], result, strict=True):
            alike = (ours - theirs).norm() <= tolerance * theirs.norm()
            assert alike or ("transformers" in name and not exact), f"{name} does not compute the same"
    plain = modules["sort and loop"]
    assert isinstance(plain, SortAndLoop)
    products = Products(plain, x)
    seconds: dict[str, list[float]] = {name: [] for name in (*modules, PRODUCTS)}
    for _ in range(turns):
        seconds[PRODUCTS].append(products.seconds())
        for name, module in modules.items():
            seconds[name].append(turn(module, x, upstream)[0])
    return {name: statistics.median(times) for name, times in seconds.items()}


def report(
    cases: list[str],
    precisions: list[str],
    turns: int,
    transformers: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """A line for each case and precision."""
    for case in cases:
        for precision in precisions:
            found = compare(SHAPES[case], PRECISIONS[precision], turns, transformers)
            ours = found.pop(OURS)
            others = (f"{name} {1e3 * time:.0f} ms ({time / ours:.2f})" for name, time in found.items())
            say(f"{case:9} {precision}: {OURS} {1e3 * ours:.0f} ms, {', '.join(others)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--cases", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--transformers", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    report(options.cases, options.precisions, options.turns, options.transformers)


if __name__ == "__main__":
    main()
