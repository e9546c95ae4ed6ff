"""The profile of the machine it runs on, measured, for ``lightning-tex plan --cluster``."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from math import ceil, log2
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lightning_tex.bench.kernels import Clock, Kernels
from lightning_tex.parallel import collectives, in_place_collectives
from lightning_tex.parallel.all_to_all import all_to_all
from lightning_tex.parallel.topology import Axis
from lightning_tex.planner.cluster import Cluster


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


def run(task: Task, ranks: int | None, output: Path) -> Cluster | None:
    """Measure on the ranks of torchrun or on ranks of its own, and write the profile.

    Args:
        task: how to measure.
        ranks: of its own; ``None``: as many as there are GPUs, else 4.
        output: the YAML file.

    Returns:
        The profile; ``None`` on all ranks of torchrun but the first.
    """
    if launched():
        return _rank(int(os.environ["RANK"]), task, output)
    count = ranks or (torch.cuda.device_count() if task.device == "cuda" else 4)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    start = "spawn" if task.device == "cuda" else "fork"
    mp.start_processes(_own_rank, (task, output, {**world, **address}), count, start_method=start)
    return Cluster.named(str(output))


def launched() -> bool:
    """Whether a launcher such as torchrun started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _own_rank(rank: int, task: Task, output: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    if task.device == "cpu":
        torch.set_num_threads(1)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    _rank(rank, task, output)


def _rank(rank: int, task: Task, output: Path) -> Cluster | None:
    if task.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("nccl" if task.device == "cuda" else "gloo")
    try:
        cluster = measure(task)
        if rank:
            return None
        cluster.write(output)
        return cluster
    finally:
        dist.destroy_process_group()


def measure(task: Task) -> Cluster:
    """The profile of the world's ranks; collective. Everything is measured on all ranks at once, as they will work."""
    world, rank = dist.get_world_size(), dist.get_rank()
    on_node = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    kernels = Kernels(Clock(task.device, task.turns))
    low = torch.float16 if task.like is not None and "v100" in task.like.name else torch.bfloat16
    usual = low if task.device == "cuda" else torch.float32
    flops = {dtype: kernels.square_flops(dtype) for dtype in (low, torch.float32)}
    narrow, memory = kernels.narrow_flops(usual), kernels.memory_bandwidth()
    links = Links(kernels, task.largest_bytes, memory)
    inside = [_axis(range(start, start + on_node), rank) for start in range(0, world, on_node)]
    axis = next(axis for axis in inside if axis is not None)
    link = network = links.measure(axis, 1)
    if world > on_node:
        across = [_axis(range(local, world, on_node), rank) for local in range(on_node)]
        axis = next(axis for axis in across if axis is not None)
        network = links.measure(axis, on_node)
    like = task.like
    peak = flops[low] if like is None else like.peak_flops
    return Cluster(
        name=like.name + " measured" if like is not None else f"{socket.gethostname()} {task.device}",
        gpus_per_node=on_node,
        memory_bytes=float(_memory_bytes(task.device, on_node)),
        peak_flops=peak,
        peak_flops_fp32=flops[torch.float32] if like is None else like.peak_flops_fp32,
        product_efficiency=min(1.0, flops[low] / peak),
        memory_bandwidth=memory,
        link_bandwidth=link.bandwidth,
        link_latency=link.latency,
        network_bandwidth=network.bandwidth,
        network_latency=network.latency,
        reserved_bytes=float(2**30) if task.device == "cuda" else 0.0,
        device=task.device,
        narrow_products=tuple((width, min(1.0, reached / flops[usual])) for width, reached in narrow.items()),
        attention_efficiency=min(1.0, kernels.attention_flops(usual) / flops[usual]),
        pass_bandwidth=kernels.pass_bandwidth(usual),
        link_shares=link.shares,
        network_shares=network.shares,
        overlap=links.overlap(axis),
    )


def _axis(ranks: range, rank: int) -> Axis | None:
    """The group of these ranks if this is one of them; collective over the world."""
    group = dist.new_group(list(ranks))
    return Axis("calibrated", len(ranks), ranks.index(rank), tuple(ranks), group) if rank in ranks else None


class Link(NamedTuple):
    """An axis as the planner reckons with it.

    Args:
        bandwidth: bytes per second of a node's all rings together.
        latency: seconds of a message.
        shares: operation -> share of the bandwidth that it reaches.
    """

    bandwidth: float
    latency: float
    shares: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Links:
    """Speed of collectives.

    Args:
        kernels: for what runs beside them.
        largest_bytes: of a tensor that is sent.
        memory_bandwidth: what an axis of one rank is written as.
    """

    kernels: Kernels
    largest_bytes: int
    memory_bandwidth: float

    def _tensor(self, axis: Axis) -> torch.Tensor:
        return torch.zeros(self.largest_bytes // 4 // axis.size * axis.size, device=self.kernels.clock.device)

    def measure(self, axis: Axis, rings: int) -> Link:
        """Alpha and beta of an axis; collective over the world.

        Args:
            axis: the ranks.
            rings: groups that share what leaves a node.
        """
        if axis.size == 1:
            return Link(self.memory_bandwidth, 0.0)
        seconds, n = self.kernels.clock.seconds, axis.size
        small, large = torch.zeros(2, device=self.kernels.clock.device), self._tensor(axis)
        latency = seconds(lambda: in_place_collectives.sum_in_place(small, axis).wait(), 10) / (
            2 * min(n - 1, ceil(log2(n)))
        )
        sent = (n - 1) / n * 4 * large.numel()
        taken = {
            "all_gather": (seconds(lambda: collectives.all_gather(large[: len(large) // n], 0, axis)), 1, n - 1),
            "reduce_scatter": (seconds(lambda: collectives.reduce_scatter(large, 0, axis)), 1, ceil(log2(n))),
            "all_to_all": (seconds(lambda: all_to_all(large, axis)), 1, ceil(log2(n))),
            "all_reduce": (seconds(lambda: collectives.all_reduce(large, axis)), 2, 2 * (n - 1)),
        }
        reached = {
            operation: times * sent / max(time - hops * latency, 0.1 * time)
            for operation, (time, times, hops) in taken.items()
        }
        best = max(reached.values())
        return Link(rings * best, latency, tuple((name, rate / best) for name, rate in reached.items()))

    def overlap(self, axis: Axis) -> float:
        """Share of a collective's time that passes beside products; collective over the world."""
        if axis.size == 1:
            return 1.0
        width, seconds, buffer = self.kernels.sizes.squares[0], self.kernels.clock.seconds, self._tensor(axis)
        a = torch.randn(width, width, device=buffer.device)
        out = torch.empty_like(a)

        def products(count: int) -> None:
            for _ in range(count):
                torch.mm(a, a, out=out)

        def both(count: int) -> None:
            started = in_place_collectives.sum_in_place(buffer, axis)
            products(count)
            started.wait()

        communication = seconds(lambda: both(0))
        count = max(1, round(communication / seconds(lambda: products(1))))
        computation = seconds(lambda: products(count))
        hidden = communication + computation - seconds(lambda: both(count))
        return min(1.0, max(0.0, hidden / min(communication, computation)))


def _memory_bytes(device: str, ranks: int) -> int:
    if device == "cuda":
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks
