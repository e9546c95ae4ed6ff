"""The optimizer step alone: temporary memory, time and bytes of state, beside torch's own and further contestants."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from lightning_tex.bench.candidates import REFERENCE, Build, Candidate, Tiled, Workload, ours, torchs
from lightning_tex.bench.memory import live_bytes, peak_bytes, settled_bytes
from lightning_tex.bench.moments import synchronise
from lightning_tex.optim.state_config import OptimizerStateFormat
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.parallel.layout import Layout
from lightning_tex.parallel.topology import Topology

PROBE_ELEMENTS = 1 << 16
FEWEST_TURNS, MOST_TURNS, STEPPED_ELEMENTS = 15, 300, 4 * 10**8


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Args:
        workloads: the sizes, each measured by itself.
        tile_size: elements in a tile; ``None``: the default.
        state_formats: how the tiled step keeps its states.
        turns: steps that are timed of each candidate, one in a turn; ``None``: the more, the smaller the workload.
        builds: how often candidates are made anew meanwhile: where tensors come to lie changes a step's time.
        limit_bytes: memory that may be taken at once.
        contestants: further implementations by name; one that cannot be had raises when it is built, and is skipped
            with the reason.
    """

    workloads: Sequence[Workload]
    tile_size: int | None
    state_formats: Sequence[OptimizerStateFormat]
    turns: int | None
    builds: int
    limit_bytes: int
    contestants: Mapping[str, Build] = field(default_factory=dict)

    def turns_of(self, elements: int) -> int:
        """Turns of a workload of so many elements."""
        if self.turns is not None:
            return self.turns
        return min(max(FEWEST_TURNS, STEPPED_ELEMENTS // elements), MOST_TURNS)


def conditions(plan: Plan) -> dict[str, Any]:
    """What all cases of a report have in common."""
    first = plan.workloads[0]
    return {
        "optimizer": first.optimizer,
        "device": torch.cuda.get_device_name(first.device) if first.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "layout": str(first.topology.layout),
        "torch": torch.__version__,
        "builds": plan.builds,
    }


def cases(plan: Plan) -> Iterator[dict[str, Any]]:
    """Measure one workload after the other. Collective over the workloads' ranks.

    Args:
        plan: what is measured.
    """
    gc.collect()
    gc.freeze()  # every count collects garbage, and need not go through all that was imported
    try:
        for workload in plan.workloads:
            yield Case(workload, plan).report()
    finally:
        gc.unfreeze()


class Case:
    """One workload under all candidates: memory one by one, then time in turns.

    Args:
        workload: the elements.
        plan: the rest.
    """

    def __init__(self, workload: Workload, plan: Plan) -> None:
        self.workload, self.plan = workload, plan
        self.elements = workload.count()
        self.turns = plan.turns_of(self.elements)
        formats = plan.state_formats if workload.low_precision else ("fp32",)  # the others are made for bf16
        self.ours = ours(plan.tile_size, formats)
        self.builds = self.ours | torchs(workload.low_precision) | dict(plan.contestants)
        self.rows: dict[str, dict[str, Any]] = {}
        self.skipped: dict[str, str] = {}
        self._needs: dict[str, float] = {}

    def report(self) -> dict[str, Any]:
        """Measure everything. Collective."""
        for name, build in self.builds.items():
            # Ours may refuse a combination of options; others are measured where they can be had.
            refusals = (ValueError,) if name in self.ours else (Exception,)
            try:
                self.rows[name] = self._memory(name, build)
            except refusals as error:
                self.skipped[name] = str(error).strip().partition("\n")[0] or type(error).__name__
        return {
            "elements": self.elements,
            "experts": self.workload.experts,
            "turns": self.turns,
            "dtype": str(self.workload.dtype).removeprefix("torch."),
            "copy_gb_per_s": self._time(),
            "candidates": self.rows,
            "skipped": self.skipped,
        }

    def _memory(self, name: str, build: Build) -> dict[str, Any]:
        self._require_fitting(name, build)
        device = self.workload.device
        # Of one process, too: peers make a group of it, and threads of gloo hold what they have sent.
        count = settled_bytes if dist.is_initialized() else live_bytes
        before = count(device)
        candidate = stepped(build(self.workload))
        state_bytes = count(device) - before
        stepped(candidate).prepare()
        peak = peak_bytes(candidate.step, device)
        row: dict[str, Any] = {
            "peak_temporary_bytes": peak,
            "state_bytes": state_bytes,
            "state_bytes_per_parameter": state_bytes / self.elements,
            "moved_bytes": self._moved(candidate, state_bytes),
        }
        candidate.close()
        return row | ({"tile_size": candidate.tile_size} if isinstance(candidate, Tiled) else {})

    def _require_fitting(self, name: str, build: Build) -> None:
        """Refuse, from the bytes of a small workload, what would not fit."""
        small = replace(self.workload, elements=PROBE_ELEMENTS, experts=None)
        probe = peak_bytes(lambda: stepped(build(small)).close(), self.workload.device)
        need = self._needs[name] = probe / PROBE_ELEMENTS * self.elements
        if need > self.plan.limit_bytes:
            raise UserValueError(
                f"needs about {need / 2**30:.1f} GiB of the {self.plan.limit_bytes / 2**30:.1f} GiB that may be taken; "
                "legal: a larger --memory_gib, or fewer elements"
            )

    def _moved(self, candidate: Candidate, state_bytes: int) -> int | None:
        """Bytes that a step cannot do without: gradients read, states read and written, parameters as well or written.

        Counted in one process only: with several, what a rank moves depends on how its collectives work.
        """
        if self.workload.topology.world.size > 1:
            return None
        parameters = gradients = candidate.workload.dtype.itemsize * self.elements
        states = state_bytes - parameters - gradients
        return gradients + 2 * states + parameters * (1 if candidate.has_master else 2)

    def _time(self) -> float:
        """Time as many candidates as fit into memory together, in turns. Gives the speed of a plain copy in GB/s."""
        source, target = (torch.ones(self.elements, device=self.workload.device) for _ in range(2))
        copy_bytes = source.nbytes + target.nbytes
        names = self._fitting(self.plan.limit_bytes - copy_bytes)
        copies: list[Clocked] = []
        times: dict[str, list[Clocked]] = {name: [] for name in names}
        running: dict[str, Candidate] = {}
        builds = min(self.plan.builds, self.turns)
        for turn in range(self.turns):
            first = turn % max(1, len(names))
            order = names[first:] + names[:first]  # nobody always steps, or lies in memory, behind the same neighbour
            if turn * builds // self.turns != (turn - 1) * builds // self.turns:
                running = self._built(running, order)
            for name in order:
                running[name].prepare()
                times[name].append(self._clock(running[name].step))
            copies.append(self._clock(partial(target.copy_, source)))
        self._built(running, [])
        for name, row in self.rows.items():
            row |= timing(times.get(name, []), times.get(REFERENCE, []), row["moved_bytes"])
        return copy_bytes / statistics.median(copy.wall_ms for copy in copies) / 1e6

    def _fitting(self, room: int) -> list[str]:
        """Candidates whose tensors fit into ``room`` bytes together; first the reference."""
        names = []
        for name in sorted(self.rows, key=lambda name: name != REFERENCE):
            if self._needs[name] <= room:
                room -= self.rows[name]["state_bytes"]
                names.append(name)
        return names

    def _built(self, before: dict[str, Candidate], names: list[str]) -> dict[str, Candidate]:
        """New candidates, two steps on, when those before are gone."""
        for name in list(before):
            before.pop(name).close()
        gc.collect()
        return {name: stepped(stepped(self.builds[name](self.workload))) for name in names}

    def _clock(self, run: Callable[[], object]) -> Clocked:
        """All ranks starting together."""
        if self.workload.topology.world.size > 1:
            dist.barrier(group=self.workload.topology.world.group)
        synchronise(self.workload.device)
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        synchronise(self.workload.device)
        return Clocked(1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu))


class Clocked(NamedTuple):
    """Wall time of one step, and processor time of this process in it."""

    wall_ms: float
    cpu_ms: float


def timing(times: list[Clocked], reference: list[Clocked], moved_bytes: int | None) -> dict[str, Any]:
    """What is said of a candidate's times; nothing where it was not timed.

    Ratios are medians over turns of this candidate's time by the reference's in the same turn.
    """
    if not times:
        return dict.fromkeys(
            ("step_ms", "step_ms_min", "step_ms_quartiles", "step_ms_all", "cpu_ms", "ratio", "cpu_ratio", "gb_per_s")
        )
    wall = [each.wall_ms for each in times]
    pairs = list(zip(times, reference, strict=bool(reference)))
    low, middle, high = statistics.quantiles(wall, n=4, method="inclusive") if len(wall) > 1 else wall * 3
    return {
        "step_ms": middle,
        "step_ms_min": min(wall),
        "step_ms_quartiles": [low, high],
        "step_ms_all": wall,
        "cpu_ms": statistics.median(each.cpu_ms for each in times),
        "ratio": statistics.median(a.wall_ms / b.wall_ms for a, b in pairs) if pairs else None,
        "cpu_ratio": statistics.median(a.cpu_ms / b.cpu_ms for a, b in pairs) if pairs else None,
        "gb_per_s": None if moved_bytes is None else moved_bytes / middle / 1e6,
    }


def stepped(candidate: Candidate) -> Candidate:
    """The candidate after one more step."""
    candidate.prepare()
    candidate.step()
    return candidate


def join(tensor_parallel_size: int, expert_parallel_size: int, device: torch.device) -> Topology:
    """This process's place in the layout of all processes that a launcher such as torchrun started; collective.

    Raises:
        ValueError: a size that the number of processes does not allow.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    layout = Layout.resolve(world, tensor_parallel_size, expert_parallel_size)
    if world == 1:
        return Topology.single()
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Topology.build(layout, device.type)


def free_bytes(device: torch.device, topology: Topology) -> int:
    """Memory that every process of this machine can take, the least over all ranks; collective."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        kib = next(int(words[1]) for words in lines if words[0] == "MemAvailable:")
        free = kib * 1024 // int(os.environ.get("LOCAL_WORLD_SIZE", topology.world.size))
    least = torch.tensor(free, device=device)
    if topology.world.size > 1:
        dist.all_reduce(least, dist.ReduceOp.MIN, group=topology.world.group)
    return int(least)
