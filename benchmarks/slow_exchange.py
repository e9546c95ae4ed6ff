"""One MoE layer whose tokens travel in chunks, over a network that is really slow: forward and backward, in turns.

Two hosts of two ranks, as of ``slow_network.py``, with the experts over all four. Beside the layer in 1, 2 and 4
chunks stand its parts alone: the experts' products of as many rows, which travel nowhere, and the all-to-alls of as
many bytes. What two chunks can hide is the products, or half the exchange, whichever takes less:

    sudo python benchmarks/slow_exchange.py --rates 200mbit 1gbit [--turns 9] [--hidden 512]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from lightning_tex.moe import MoE
from lightning_tex.parallel.all_to_all import all_to_all
from lightning_tex.parallel.layout import Communication, Layout
from lightning_tex.parallel.sharding import shard_module
from lightning_tex.parallel.topology import Topology

CHUNKS = (1, 2, 4)
EXPERTS, TOP_K, DIM = 8, 2, 256


def layer(topology: Topology, hidden: int) -> MoE:
    torch.manual_seed(0)
    made = MoE(
        DIM, hidden, EXPERTS, TOP_K, activation="swiglu", router="forced_balance", load_balance_coefficient=0
    )  # fmt: skip
    shard_module(made, topology)
    return made


def turns_of(tokens: int, hidden: int, turns: int) -> dict[str, list[float]]:
    """Milliseconds of each contestant on the slowest rank, by turn."""
    dist.init_process_group("gloo")
    world = dist.get_world_size()
    layout = Layout(world, 1, world, 1)
    x, rows = torch.randn(tokens, DIM), torch.randn(tokens * TOP_K, DIM)
    topologies = {n: Topology.build(layout, "cpu", communication=Communication(expert_chunks=n)) for n in CHUNKS}
    by_chunks = {n: layer(topology, hidden) for n, topology in topologies.items()}
    # As many rows, and as many to an expert, as every rank computes.
    here = EXPERTS // world
    alone = MoE(
        DIM, hidden, here, min(TOP_K, here), activation="swiglu", router="forced_balance", load_balance_coefficient=0
    )  # fmt: skip
    axis = topologies[1].expert

    def both(module: MoE, tokens: torch.Tensor) -> None:
        given = tokens.detach().requires_grad_()
        module(given).sum().backward()

    def exchange() -> None:
        for _ in range(4):  # there and back, forward and backward
            all_to_all(rows, axis)

    contestants: dict[str, Callable[[], None]] = {
        f"{n} chunks": lambda module=module: both(module, x) for n, module in by_chunks.items()
    }
    contestants |= {"products alone": lambda: both(alone, x), "exchange alone": exchange}
    seen: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(turns + 1):
        for name, run in contestants.items():
            dist.barrier()
            begun = time.perf_counter()
            run()
            took = torch.tensor(1e3 * (time.perf_counter() - begun))
            dist.all_reduce(took, op=dist.ReduceOp.MAX)
            if turn:
                seen[name].append(took.item())
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", default=["200mbit", "1gbit"], help="tc rates, or 'unshaped'")
    parser.add_argument("--tokens", type=int, default=1024, help="of a rank")
    parser.add_argument("--hidden", type=int, default=512, help="width of an expert")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--rank", action="store_true", help="be one of the ranks")
    options = parser.parse_args()
    if options.rank:
        torch.set_num_threads(1)
        seen = turns_of(options.tokens, options.hidden, options.turns)
        if int(os.environ["RANK"]) == 0:
            print(json.dumps(seen), flush=True)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))
    sys.path.insert(0, str(Path(__file__).parent))
    from slow_network import HOSTS, RANKS_PER_HOST, hosts, run

    arguments = [__file__, "--rank", "--turns", str(options.turns)]
    arguments += ["--tokens", str(options.tokens), "--hidden", str(options.hidden)]
    for rate in options.rates:
        with hosts(rate) as names:
            seen = run(names, arguments, {"WORLD_SIZE": str(HOSTS * RANKS_PER_HOST)})
        medians = {name: statistics.median(times) for name, times in seen.items()}
        first = f"{CHUNKS[0]} chunks"
        ratios = {name: statistics.median(a / b for a, b in zip(seen[first], seen[name], strict=True)) for name in seen}
        told = (
            f"{name} {ms:.0f} ms" + (f" ({ratios[name]:.2f})" if "chunks" in name else "")
            for name, ms in medians.items()
        )
        print(f"{rate}, hidden {options.hidden}: {', '.join(told)}", flush=True)


if __name__ == "__main__":
    main()
