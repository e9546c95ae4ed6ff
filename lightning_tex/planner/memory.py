"""Memory of one rank, broken down, at the instant of a step when it is fullest."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf

from lightning_tex.optim.flat_sizes import BUFFERS_UNDER_WAY
from lightning_tex.planner.declared import DeclaredFormulas
from lightning_tex.planner.instants import Instant
from lightning_tex.planner.layouts import ActivationSource, Candidate, Job
from lightning_tex.planner.states import FlatBuffers, StateBytes, state_bytes, tile_bytes
from lightning_tex.planner.states_only import StatesOnly

_EXISTING = BUFFERS_UNDER_WAY + 1  # buffers of ZeRO 2 that exist at once: those that are sent, and one that fills


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, at the fullest instant of a step.

    Args:
        states: what is kept from step to step.
        fullest: the instant.
        at_least: it is more: not all activations are in it, since what is known already is too much.
    """

    states: StateBytes
    fullest: Instant
    at_least: bool = False

    @property
    def peak(self) -> int:
        return self.states.total + self.fullest.bytes

    def parts(self) -> dict[str, int]:
        """What the peak is made of."""
        states, fullest = self.states, self.fullest
        return {
            "dense parameters": states.dense_parameters,
            "expert parameters": states.expert_parameters,
            "gradients": states.gradients,
            "master": states.master,
            "moments": states.moments + states.scalars,
            "activations": fullest.activations,
            "stash": fullest.stash,
            "working": fullest.working,
            "gradient buffers": fullest.gradient_buffers,
            "tile": fullest.tile,
        }


def memory(
    job: Job,
    candidate: Candidate,
    device: str = "cuda",
    tile_size: int | None = None,
    flat: FlatBuffers | None = None,
    enough: float = inf,
) -> Memory:
    """Foresee the memory of one rank.

    Args:
        job, candidate: what is trained, and how.
        device: ``cuda`` or ``cpu``.
        tile_size: as the strategy's.
        flat: the candidate's flat buffers, if they have been laid out already.
        enough: bytes above which it does not matter how many there are: activations that are costly to know are left
            out where all else, and what is known of them, takes more.
    """
    flat = flat or FlatBuffers.of(job, candidate)
    states = state_bytes(flat, candidate.zero_stage, candidate.optimizer_state_format, tile_size, device)
    gradients, source = GradientBuffers(flat, candidate, device), activation_source(job)
    tile = tile_bytes(flat, candidate.optimizer_state_format, tile_size, device)
    fullest = max(
        Instant("end of the backward", gradient_buffers=gradients.begun(0)),
        Instant("step", gradient_buffers=gradients.received, tile=tile),
        key=_bytes,
    )
    if source.costly:
        known = Instant("end of the forward", activations=source.at_least(job, candidate, device))
        if states.total + max(fullest.bytes, known.bytes) > enough:
            return Memory(states, max(fullest, known, key=_bytes), at_least=True)
    instants = _with(gradients, source.instants(job, candidate, device))
    return Memory(states, max((fullest, *instants), key=_bytes))


def activation_source(job: Job) -> ActivationSource:
    """Where activations of a job are known from."""
    if job.activations is not None:
        return job.activations
    return DeclaredFormulas() if job.model.declared else StatesOnly("no batch to trace a step with")


def _bytes(instant: Instant) -> int:
    return instant.bytes


def _with(gradients: GradientBuffers, instants: Iterator[Instant]) -> Iterator[Instant]:
    """Instants of a micro-step, with gradients on their way."""
    for instant in instants:
        on_their_way = 0 if instant.reached is None else gradients.begun(instant.reached)
        yield replace(instant, gradient_buffers=on_their_way) if on_their_way else instant


def size(bytes_: float) -> str:
    """A size of memory with its unit."""
    return f"{bytes_ / 2**30:.2f} GiB" if bytes_ >= 0.1 * 2**30 else f"{bytes_ / 2**20:.1f} MiB"


@dataclass(frozen=True)
class GradientBuffers:
    """Bytes of gradients on their way that are no states.

    ZeRO 2 moves whole buffers: one fills while others are sent; or all are there, where they do not leave early. On
    CPU, where we sum the parts of a reduce-scatter, the other ranks' parts are received.

    Args:
        flat: the flat buffers.
        candidate: how they are reduced.
        device: ``cuda`` or ``cpu``.
    """

    flat: FlatBuffers
    candidate: Candidate
    device: str

    @property
    def gathers(self) -> bool:
        """Whether there are more of them, the further a backward is."""
        return self.candidate.zero_stage == 2

    def begun(self, place: int) -> int:
        """Of the buffers with a gradient, once those of all parameters from ``place`` on are there."""
        if not self.gathers:
            return 0
        lasts, most = self._most_from
        return most[bisect_left(lasts, place)]

    @cached_property
    def _most_from(self) -> tuple[list[int], list[int]]:
        """The buffers' last parameters in order, and the most bytes that exist of the buffers from each on."""
        by_last = sorted(zip(self.flat.last_members, self.flat.buffers, strict=True), key=lambda pair: pair[0])
        existing = _EXISTING if self.candidate.communication.overlap else len(by_last)
        most, largest = [0], list[int]()
        for _, buffer in reversed(by_last):
            largest = sorted([*largest, buffer.bytes], reverse=True)[:existing]
            most.append(sum(largest))
        return [last for last, _ in by_last], most[::-1]

    @property
    def received(self) -> int:
        """Before the step."""
        received: Sequence[int] = sorted(
            (buffer.bytes for buffer in self.flat.buffers if self.device == "cpu" and buffer.owners > 1), reverse=True
        )
        if self.gathers:
            return self.begun(0) + sum(received[:_EXISTING])
        return sum(received) if self.candidate.zero_stage == 1 else 0
