"""``lightning-tex bench``: measure communication, steps, layers, the optimizer's step or the machine, where it runs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse.typing import PositiveFloat

from lightning_tex.bench import calibrate, optimizer
from lightning_tex.bench.candidates import Build, OptimizerName, Workload
from lightning_tex.bench.combinations import COMBINATIONS
from lightning_tex.bench.communication import CommunicationBench
from lightning_tex.cli.bench_layer import LAYER
from lightning_tex.cli.bench_step import STEP
from lightning_tex.cli.bench_tables import LEGEND, draw_steps, show_communication, show_profile, show_steps
from lightning_tex.cli.options import Command, Count, Device, device_of, run_one_of
from lightning_tex.cli.tables import require_matplotlib, tell
from lightning_tex.optim.state_config import OptimizerStateFormat
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.planner.cluster import Cluster
from lightning_tex.recipe import Recipe


@dataclass(frozen=True)
class CommunicationOptions:
    """What is timed.

    Args:
        config: the recipe.
        steps: optimizer steps timed together.
        warmup: steps before them.
        turns: turns of all combinations.
        only: combinations, by the names in the table; the baseline is added. Left out: all.
    """

    config: str
    steps: Count = Count(5)
    warmup: Count = Count(2)
    turns: Count = Count(3)
    only: list[str] | None = None


def bench_communication(options: CommunicationOptions, more: list[str]) -> dict[str, Any] | None:
    """Train a recipe's model for a few steps under every combination of communication options, in turns, and show step
    time, speed against the baseline (full recomputation, no duplicate-token dropping) and bytes sent by axis. Further
    options are the recipe's own, such as --trainer.devices 8.
    """
    names = [name.strip() for name in COMBINATIONS]
    only = {name.strip() for name in options.only or names}
    if unknown := only - set(names):
        raise UserValueError(f"--only {sorted(unknown)}; legal: {names}")
    combinations = {n: c for n, c in COMBINATIONS.items() if n.strip() in only or n == "baseline"}
    bench = CommunicationBench(Recipe(options.config, more), options.warmup, options.steps)
    for _ in range(options.turns):
        bench.turn(combinations)
    if not bench.is_first_rank:
        return None
    report = bench.report()
    show_communication(report)
    return report


@dataclass(frozen=True)
class OptimizerOptions:
    """What is stepped, and how it is measured.

    Args:
        elements: parameters of a rank, in one tensor; without --experts: 1e6 1e7 1e8.
        experts: experts of a transformer block, which are more sizes; without --elements: 4 8 16 32 64.
        width: of that block: 4 w^2 dense, 8 w^2 an expert.
        dtype: of parameters and gradients.
        formats: of the tiled step's states.
        optimizer: a torch optimizer.
        tile_size: elements in a tile; left out: the strategy's.
        tensor_parallel_size: of the layout.
        expert_parallel_size: of the layout.
        turns: steps timed of each, in turns; left out: 15 to 300, more of small sizes.
        builds: how often all are made anew in between.
        threads: of torch, on CPU.
        device: where; left out: cuda if torch sees one.
        memory_gib: memory that may be taken; left out: half of what is free.
        plot: draw temporary memory to this file (needs matplotlib).
    """

    elements: list[Count] = field(default_factory=list)
    experts: list[Count] = field(default_factory=list)
    width: Count = Count(256)
    dtype: list[Literal["float32", "bfloat16"]] = field(default_factory=lambda: ["float32", "bfloat16"])
    formats: list[OptimizerStateFormat] = field(default_factory=lambda: ["fp32"])
    optimizer: OptimizerName = "AdamW"
    tile_size: Count | None = None
    tensor_parallel_size: Count = Count(1)
    expert_parallel_size: Count = Count(1)
    turns: Count | None = None
    builds: Count = Count(5)
    threads: Count = Count(1)
    device: Device | None = None
    memory_gib: PositiveFloat | None = None
    plot: Path | None = None


def bench_optimizer(options: OptimizerOptions, contestants: Mapping[str, Build] | None = None) -> dict[str, Any] | None:
    """Step made-up parameters with the tiled optimizer, the same untiled, and torch's own, and show the most temporary
    memory in a step, time, and bytes of state. Under torchrun the layout is that of its processes, and rank 0 reports.

    Args:
        options: what is stepped.
        contestants: further implementations by name, measured beside ours and torch's.
    """
    require_matplotlib(options.plot)
    torch.set_num_threads(options.threads)
    device = device_of(options.device)
    topology = optimizer.join(options.tensor_parallel_size, options.expert_parallel_size, device)
    elements: Sequence[int] = options.elements
    experts: Sequence[int] = options.experts
    if not elements and not experts:
        elements, experts = (10**6, 10**7, 10**8), (4, 8, 16, 32, 64)
    workloads = [
        Workload(n, e, options.width, getattr(torch, dtype), device, options.optimizer, topology)
        for dtype in options.dtype
        for n, e in [*((n, None) for n in elements), *((None, e) for e in experts)]
    ]
    free = optimizer.free_bytes(device, topology) // 2
    limit = free if options.memory_gib is None else int(options.memory_gib * 2**30)
    plan = optimizer.Plan(
        workloads, options.tile_size, options.formats, options.turns, options.builds, limit, contestants or {}
    )
    is_first_rank = topology.world.rank == 0
    report: dict[str, Any] = {**optimizer.conditions(plan), "cases": []}
    if is_first_rank:
        tell("{optimizer} on {device}, {threads} threads, {layout}, {builds} builds".format(**report))
    for case in optimizer.cases(plan):
        report["cases"].append(case)
        if is_first_rank:
            show_steps(case)
    if not is_first_rank:
        return None
    tell(LEGEND)
    if options.plot is not None:
        draw_steps(report, options.plot)
    return report


@dataclass(frozen=True)
class CalibrateOptions:
    """How it is measured.

    Args:
        output: the YAML file that the profile is written to.
        ranks: processes, without torchrun; left out: as many as there are GPUs, else 4.
        like: a built-in cluster whose data-sheet peak and memory the GPUs have.
        device: what is measured; left out: cuda if torch sees one.
        megabytes: of the tensors sent; left out: 8 on CPU, 64 on GPUs.
        turns: of which the median counts.
    """

    output: Path
    ranks: Count | None = None
    like: str | None = None
    device: Device | None = None
    megabytes: Count | None = None
    turns: Count = Count(7)


def bench_calibrate(options: CalibrateOptions) -> dict[str, Any] | None:
    """Measure products, memory and collectives with all ranks at work, and write the YAML that `lightning-tex plan
    --cluster FILE` reads. Ranks are those of torchrun, on every node, or as many as --ranks says on this machine.
    """
    if options.output.suffix not in (".yaml", ".yml"):
        raise UserValueError(f"--output {options.output}; legal: a .yaml file")
    device = device_of(options.device).type
    like = None if options.like is None else Cluster.named(options.like)
    megabytes = options.megabytes or (64 if device == "cuda" else 8)
    cluster = calibrate.run(calibrate.Task(device, megabytes << 20, options.turns, like), options.ranks, options.output)
    if cluster is None:
        return None
    world = int(os.environ["WORLD_SIZE"]) if calibrate.launched() else cluster.gpus_per_node
    show_profile(cluster, options.output, one_node=world == cluster.gpus_per_node)
    return cluster.as_dict()


OPTIMIZER = Command("bench optimizer", bench_optimizer, (OptimizerOptions,))
COMMANDS = (
    Command("bench communication", bench_communication, (CommunicationOptions,), takes_recipe=True),
    STEP,
    LAYER,
    OPTIMIZER,
    Command("bench calibrate", bench_calibrate, (CalibrateOptions,)),
)


def main(words: Sequence[str]) -> None:
    """Run ``lightning-tex bench``."""
    run_one_of("bench", COMMANDS, words)
