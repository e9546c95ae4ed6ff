"""Memory of one rank, broken down, at the instant of a step when it is fullest."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from lightning_tex.optim.flat_sizes import BUFFERS_UNDER_WAY
from lightning_tex.planner.activations import Activations, width
from lightning_tex.planner.layers import Embedding, Head, Layer, Mlp, Moe
from lightning_tex.planner.layouts import Candidate, Job
from lightning_tex.planner.micro_step import MicroStep
from lightning_tex.planner.states import FlatBuffers, StateBytes, state_bytes, tile_bytes

_EXISTING = BUFFERS_UNDER_WAY + 1  # buffers of ZeRO 2 that exist at once: those that are sent, and one that fills


@dataclass(frozen=True)
class Instant:
    """What a rank holds beside its states at one instant of a step, in bytes.

    Args:
        event: what happens then.
        activations: what forwards keep for backwards, without the stash.
        stash: what communication-aware recomputation keeps of collectives.
        working: what lives for that instant: the logits, or one block's recomputation and gradients.
        gradient_buffers: gradients on their way that are no states.
        tile: temporaries of the optimizer's step.
    """

    event: str
    activations: int = 0
    stash: int = 0
    working: int = 0
    gradient_buffers: int = 0
    tile: int = 0

    @property
    def bytes(self) -> int:
        return self.activations + self.stash + self.working + self.gradient_buffers + self.tile


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, at the fullest instant of a step.

    Args:
        states: what is kept from step to step.
        fullest: the instant.
    """

    states: StateBytes
    fullest: Instant

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
) -> Memory:
    """Foresee the memory of one rank.

    Args:
        job, candidate: what is trained, and how.
        device: ``cuda`` or ``cpu``.
        tile_size: as the strategy's.
        flat: the candidate's flat buffers, if they have been laid out already.
    """
    flat = flat or FlatBuffers.of(job, candidate)
    states = state_bytes(flat, candidate.zero_stage, candidate.optimizer_state_format, tile_size, device)
    instants = timeline(job, candidate, device, tile_size, flat)
    return Memory(states, max(instants, key=lambda instant: instant.bytes))


def size(bytes_: float) -> str:
    """A size of memory with its unit."""
    return f"{bytes_ / 2**30:.2f} GiB" if bytes_ >= 0.1 * 2**30 else f"{bytes_ / 2**20:.1f} MiB"


def timeline(
    job: Job, candidate: Candidate, device: str, tile_size: int | None, flat: FlatBuffers
) -> Iterator[Instant]:
    """The instants of the last micro-step and of the optimizer's step at which a rank may be fullest, in their order.

    Where activations are not foreseen, only gradients on their way and the optimizer's step are in it.
    """
    gradients = GradientBuffers(flat, candidate, device)
    if job.model.activations == "formulas":
        yield from _forward_and_backward(job, candidate, gradients)
    else:
        yield Instant("end of the backward", gradient_buffers=gradients.begun(0))
    tile = tile_bytes(flat, candidate.optimizer_state_format, tile_size, device)
    yield Instant("step", gradient_buffers=gradients.received, tile=tile)


def _forward_and_backward(job: Job, candidate: Candidate, gradients: GradientBuffers) -> Iterator[Instant]:
    model, at = job.model, Activations(MicroStep(job, candidate))
    embedding, head = (
        next(layer for layer in model.outside_blocks if isinstance(layer, kind)) for kind in (Embedding, Head)
    )
    assert isinstance(embedding, Embedding) and isinstance(head, Head)
    costs, kinds = [_BlockCosts.of(at, layers) for layers in model.blocks.kinds], model.blocks.order
    kept = list(accumulate(costs[kind].kept for kind in kinds))
    stash = list(accumulate(costs[kind].stash for kind in kinds))
    forward = kept[-1] + at.block(model.outside_blocks)
    yield Instant("logits", forward, stash[-1], at.logits(head))
    yield Instant("head", forward, stash[-1], at.head_backward(head))
    # Of a shared matrix, the head's gradient waits for the embedding's.
    tied = at.vocabulary(head) if model.tied else 0
    # An earlier block of the same kind holds less, unless gradients gather on the way to it.
    last_of_kind = {kind: block for block, kind in enumerate(kinds)}
    blocks = range(len(kinds)) if gradients.gathers else sorted(last_of_kind.values())
    for block in reversed(blocks):
        cost, after = costs[kinds[block]], model.first_after_block[block]
        yield Instant(f"block {block}", kept[block], stash[block], tied + cost.backward, gradients.begun(after))
        if cost.first_gradients:
            # The experts' last matrix is the block's last parameter.
            begun = gradients.begun(after - 1)
            yield Instant(f"experts of block {block}", kept[block], stash[block], tied + cost.first_gradients, begun)
    yield Instant("embedding", working=tied + at.embedding_backward(embedding), gradient_buffers=gradients.begun(0))


@dataclass(frozen=True)
class _BlockCosts:
    """Bytes of one block.

    Args:
        kept: between its forward and its backward, without the stash.
        stash: likewise, of its collectives' results.
        backward: the most that its backward takes beside what forwards kept: a bound over its instants.
        first_gradients: the same when its experts' first gradient is given to its buffer; 0 without experts.
    """

    kept: int
    stash: int
    backward: int
    first_gradients: int

    @classmethod
    def of(cls, at: Activations, layers: tuple[Layer, ...]) -> _BlockCosts:
        again, stream = _recomputed(at, layers), at.stream(width(layers))
        flows = [_mlp_flow(at, layer) for layer in layers if isinstance(layer, Mlp)]
        experts = [layer for layer in layers if isinstance(layer, Moe)]
        flows += [_moe_flow(at, layer) for layer in experts]
        first = [_expert_matrix(at, layer) - _given_back(at, layer) for layer in experts]
        first_gradients = again + stream + max(first) if first else 0
        return cls(at.kept(layers), at.stash(layers), again + stream + max(flows), first_gradients)


def _recomputed(at: Activations, layers: tuple[Layer, ...]) -> int:
    """What a recomputation makes anew: the block's activations, but its input and what is on the tape."""
    mode = at.step.candidate.activation_checkpointing
    if mode is None:
        return 0
    made = at.block(layers)
    if at.norm_sees_stream:
        made -= at.stream(width(layers))
    if mode == "communication_aware":
        made -= sum(at.arrived(layer) + at.home(layer) for layer in layers if isinstance(layer, Moe))
    return made


def _mlp_flow(at: Activations, layer: Mlp) -> int:
    """The gradients of what goes into the last product, and of its matrix."""
    hidden = layer.hidden // at.step.layout.tensor
    return (at.step.tokens + layer.dim) * hidden * at.step.element_bytes


def _moe_flow(at: Activations, layer: Moe) -> int:
    """Of the instants of a MoE layer's backward the one that takes most.

    The weighted sum: gradients of rows and weights in the weights' precision. The way to the experts: gradients at
    home, picked, the own part of them, and at the experts. The last product: gradients of its result, its input and its
    matrix, when what came home is given back (unless it is on a tape). The end of a recomputed forward.
    """
    step, arrived, home, given_back = at.step, at.arrived(layer), at.home(layer), _given_back(at, layer)
    instants = [
        2 * home // step.element_bytes * step.score_bytes,
        2 * home + arrived + (arrived // step.gather if step.gather > 1 else 0) - given_back,
        arrived + _expert_matrix(at, layer) + at.hidden(layer) - given_back,
    ]
    if step.candidate.activation_checkpointing == "full":
        instants += [3 * arrived, _brought_back(at, layer)]
    return max(instants)


def _brought_back(at: Activations, layer: Moe) -> int:
    """What the way back from the experts makes, beside its result.

    What the experts gave; that by sender; the own part of it; and with the row of zeros that overflowed choices pick
    the own part, or the whole buffer, which takes as much once more while it is gathered.
    """
    step, arrived = at.step, at.arrived(layer)
    own = arrived // step.gather
    moved = arrived + own if step.gather * step.layout.expert > 1 else 0
    return arrived + moved + (2 * own * step.split if step.static(layer) and step.split > 1 else own)


def _expert_matrix(at: Activations, layer: Moe) -> int:
    experts, hidden = layer.num_experts // at.step.layout.expert, layer.hidden // at.step.layout.expert_tensor
    return experts * hidden * layer.dim * at.step.element_bytes


def _given_back(at: Activations, layer: Moe) -> int:
    return 0 if at.step.candidate.activation_checkpointing == "communication_aware" else at.home(layer)


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
