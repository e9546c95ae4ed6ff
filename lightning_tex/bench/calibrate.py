"""The profile of the machine it runs on, measured, for ``lightning-tex plan --cluster``."""

from __future__ import annotations

import json
import os
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import ceil, log2
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lightning_tex.bench.show import tell
from lightning_tex.collectives import gather_in_place, sum_in_place
from lightning_tex.planner.cluster import Cluster
from lightning_tex.topology import Axis

# Widths of the square products of which the fastest counts, and elements of the copy.
_WIDTHS = {"cpu": (512, 1024), "cuda": (4096, 8192)}
_COPY = {"cpu": 1 << 24, "cuda": 1 << 28}


@dataclass(frozen=True)
class Task:
    """How to measure.

    Args:
        device: ``cpu`` or ``cuda``.
        largest_bytes: of a tensor that is sent.
        turns: of which the median counts.
        like: whose peak and memory a GPU has; ``None``: the best product is the peak, that is, its efficiency is 1.
    """

    device: str
    largest_bytes: int
    turns: int
    like: Cluster | None = None


def run(task: Task, ranks: int | None, output: Path, as_json: bool) -> None:
    """Measure on the ranks of torchrun or on ranks of its own, and write the profile on the first."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        _rank(int(os.environ["RANK"]), task, output, as_json)
        return
    count = ranks or (torch.cuda.device_count() if task.device == "cuda" else 4)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    start = "spawn" if task.device == "cuda" else "fork"
    mp.start_processes(_own_rank, (task, output, as_json, {**world, **address}), count, start_method=start)


def _own_rank(rank: int, task: Task, output: Path, as_json: bool, environment: dict[str, str]) -> None:
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    if task.device == "cpu":
        torch.set_num_threads(1)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    _rank(rank, task, output, as_json)


def _rank(rank: int, task: Task, output: Path, as_json: bool) -> None:
    if task.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("nccl" if task.device == "cuda" else "gloo")
    try:
        cluster = measure(task)
        if rank == 0:
            cluster.write(output)
            for name, value in asdict(cluster).items():
                tell(f"{name:20} {value:.4g}" if isinstance(value, float) else f"{name:20} {value}")
            if dist.get_world_size() == cluster.gpus_per_node:
                tell("Only one node was measured: the network between nodes is written as fast as the links inside.")
            tell(f"Written to {output}.")
            if as_json:
                print(json.dumps(asdict(cluster)), flush=True)
    finally:
        dist.destroy_process_group()


def measure(task: Task) -> Cluster:
    """The profile of the world's ranks; collective. Everything is measured on all ranks at once, as they will work."""
    world, rank = dist.get_world_size(), dist.get_rank()
    on_node = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    clock = _Clock(task)
    low = torch.float16 if task.like is not None and "v100" in task.like.name else torch.bfloat16
    flops = {dtype: clock.product_flops(dtype) for dtype in (low, torch.float32)}
    inside = [_axis(range(start, start + on_node), rank) for start in range(0, world, on_node)]
    link = clock.link(next(axis for axis in inside if axis is not None), 1)
    network = link
    if world > on_node:
        across = [_axis(range(local, world, on_node), rank) for local in range(on_node)]
        network = clock.link(next(axis for axis in across if axis is not None), on_node)
    like = task.like
    peak = flops[low] if like is None else like.peak_flops
    return Cluster(
        name=like.name + " measured" if like is not None else f"{socket.gethostname()} {task.device}",
        gpus_per_node=on_node,
        memory_bytes=float(_memory_bytes(task.device, on_node)),
        peak_flops=peak,
        peak_flops_fp32=flops[torch.float32] if like is None else like.peak_flops_fp32,
        product_efficiency=min(1.0, flops[low] / peak),
        memory_bandwidth=clock.memory_bandwidth(),
        link_bandwidth=link[0],
        link_latency=link[1],
        network_bandwidth=network[0],
        network_latency=network[1],
        reserved_bytes=float(2**30) if task.device == "cuda" else 0.0,
        device=task.device,
    )


def _axis(ranks: range, rank: int) -> Axis | None:
    """The group of these ranks if this is one of them; collective over the world."""
    group = dist.new_group(list(ranks))
    return Axis("calibrated", len(ranks), ranks.index(rank), tuple(ranks), group) if rank in ranks else None


class _Clock:
    """Medians of what all ranks do at once; the slowest rank's counts."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def seconds(self, work: Callable[[], Any], repeat: int = 1) -> float:
        """Of one call, mean of ``repeat`` calls in a row, median over turns."""
        work()
        measured = []
        for _ in range(self.task.turns):
            dist.barrier()
            self._synchronise()
            start = time.perf_counter()
            for _ in range(repeat):
                work()
            self._synchronise()
            measured.append((time.perf_counter() - start) / repeat)
        slowest = torch.tensor(statistics.median(measured), device=self.task.device, dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return float(slowest)

    def _synchronise(self) -> None:
        if self.task.device == "cuda":
            torch.cuda.synchronize()

    def product_flops(self, dtype: torch.dtype) -> float:
        """FLOP/s of the fastest square product."""
        best = 0.0
        for width in _WIDTHS[self.task.device]:
            a = torch.randn(width, width, device=self.task.device).to(dtype)
            out = torch.empty_like(a)
            best = max(best, 2 * width**3 / self.seconds(lambda a=a, out=out: torch.mm(a, a, out=out), 3))  # type: ignore[misc]
        return best

    def memory_bandwidth(self) -> float:
        """Bytes per second that a copy reads and writes."""
        a = torch.zeros(_COPY[self.task.device], device=self.task.device)
        b = torch.ones_like(a)
        return 2 * a.numel() * a.element_size() / self.seconds(lambda: b.copy_(a))

    def link(self, axis: Axis, rings: int) -> tuple[float, float]:
        """Bandwidth and latency of an axis, as the planner reckons with them.

        Args:
            axis: the ranks.
            rings: groups that share what leaves a node.

        Returns:
            bytes per second of a node's all rings together, and seconds of a message.
        """
        if axis.size == 1:
            return self.memory_bandwidth(), 0.0
        small = torch.zeros(2, device=self.task.device)
        hops = min(axis.size - 1, ceil(log2(axis.size)))
        latency = self.seconds(lambda: sum_in_place(small, axis).wait(), 10) / (2 * hops)
        length = self.task.largest_bytes // 4 // axis.size * axis.size
        large = torch.zeros(length, device=self.task.device)
        taken = self.seconds(lambda: gather_in_place(large, axis).wait())
        sent = (axis.size - 1) / axis.size * 4 * length
        return rings * sent / max(taken - (axis.size - 1) * latency, 0.1 * taken), latency


def _memory_bytes(device: str, ranks: int) -> int:
    if device == "cuda":
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks
