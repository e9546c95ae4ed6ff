"""What the parts of a MoE layer take on a GPU by themselves, beside the least they could: where a layer's time goes.

Products of rows with their experts' matrices, and the passes over rows between them, of one of ``bench layer``'s shapes
in bf16; ceilings of the device (a large product, a copy) come first. Medians of repeated runs with CUDA events:

    python benchmarks/layer_parts.py --shapes qwen3-30b-a3b mixtral --tokens 16384
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any, NamedTuple

import torch

from lightning_tex.bench.layer_shapes import SHAPES, Shape
from lightning_tex.moe.activation import hidden, hidden_backward
from lightning_tex.moe.groups import Groups
from lightning_tex.moe.permute import group_by_expert, invert, pick, sum_picked
from lightning_tex.moe.products import GroupedProducts, LoopedProducts

BF16 = torch.bfloat16
GIBI = 1 << 30


class Part(NamedTuple):
    """One piece of work.

    Args:
        name: of it.
        run: does it once.
        flops: of its products, 0 if it has none.
        bytes: that it must read and write at least.
    """

    name: str
    run: Callable[[], Any]
    flops: int = 0
    bytes: int = 0


def ceilings(device: str) -> Iterator[Part]:
    """What the device can do."""
    side = 8192
    a, b = torch.randn(2, side, side, device=device, dtype=BF16)
    yield Part("a product of 8192 x 8192 x 8192", lambda: a @ b, 2 * side**3)
    x, y = torch.empty(2, GIBI, device=device, dtype=torch.uint8)
    yield Part("a copy of 1 GiB", lambda: y.copy_(x), bytes=2 * GIBI)


def parts(shape: Shape, tokens: int, device: str) -> Iterator[Part]:
    """The pieces of forward and backward of a layer whose tokens choose by chance."""
    experts, top_k, dim, width = shape.experts, shape.top_k, shape.dim, shape.hidden
    indices = torch.rand(tokens, experts, device=device).topk(top_k, -1).indices
    order = group_by_expert(indices.flatten(), experts)
    slot = invert(order.sorted).view(indices.shape)
    rows = tokens * top_k
    groups = Groups(rows, order.starts[1:].int())
    x = torch.randn(tokens, dim, device=device, dtype=BF16)
    arrived = pick(x, order.sorted // top_k, gaps=False)
    up, gate, grad = torch.randn(3, rows, width, device=device, dtype=BF16)
    inward = torch.randn(experts, width, dim, device=device, dtype=BF16)
    outward = torch.randn(experts, dim, width, device=device, dtype=BF16)
    weights = torch.rand(rows, device=device)
    flops, row, narrow = 2 * rows * dim * width, rows * dim * 2, rows * width * 2

    yield Part("choices sorted by expert", lambda: group_by_expert(indices.flatten(), experts))
    yield Part("rows picked", lambda: pick(x, order.sorted // top_k, gaps=False), bytes=row + tokens * dim * 2)
    yield Part("rows picked, some empty", lambda: pick(x, order.sorted // top_k), bytes=row + tokens * dim * 2)
    yield Part("sum over choices", lambda: sum_picked(arrived, slot, gaps=False), bytes=row + tokens * dim * 2)
    yield Part("swiglu and weights", lambda: hidden(up, gate, weights, "swiglu"), bytes=3 * narrow)
    yield Part("their backward", lambda: hidden_backward(grad, up, gate, weights, "swiglu"), bytes=6 * narrow)
    for products in (GroupedProducts(groups), LoopedProducts(groups)):
        kind = "grouped" if isinstance(products, GroupedProducts) else "looped"
        yield Part(f"{kind}: rows, first", lambda p=products: p.forward(arrived, inward), flops)
        yield Part(f"{kind}: rows, last", lambda p=products: p.forward(up, outward), flops)
        yield Part(f"{kind}: gradient of rows", lambda p=products: p.rows_backward([(up, inward)]), flops)
        yield Part(f"{kind}: gradient of matrices", lambda p=products: p.matrices_backward(up, arrived), flops)


def milliseconds(run: Callable[[], Any], repeat: int) -> float:
    """The median time of a run, after three that are not counted."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeat):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--repeat", type=int, default=20)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU")
    torch.manual_seed(0)
    found: dict[str, dict[str, float]] = {}
    groups = {"the device": ceilings("cuda")}
    groups |= {str(SHAPES[name]): parts(SHAPES[name], options.tokens, "cuda") for name in options.shapes}
    for title, pieces in groups.items():
        print(f"{title}, {torch.cuda.get_device_name()}, torch {torch.__version__}")
        found[title] = {}
        for part in pieces:
            took = found[title][part.name] = milliseconds(part.run, options.repeat)
            rate = f"{part.flops / took / 1e9:6.0f} TFLOP/s" if part.flops else ""
            rate = f"{part.bytes / took / 1e9:6.2f} TB/s" if part.bytes else rate
            print(f"  {part.name:40} {took:9.3f} ms {rate}", flush=True)
        torch.cuda.empty_cache()
    print(json.dumps({"milliseconds": found}))


if __name__ == "__main__":
    main()
