"""Memory of one rank, broken down, at the moment of a step when it is fullest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from lightning_tex.optim.flat_sizes import UNDER_WAY
from lightning_tex.planner.activations import Activations
from lightning_tex.planner.layouts import Candidate, Job
from lightning_tex.planner.states import StateBytes, buffers, last_members, state_bytes, tile_bytes

_EXISTING = UNDER_WAY + 1  # buffers of ZeRO 2 that exist at once: those that are sent, and one that fills


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, at the fullest moment of a step.

    Args:
        states: what is kept from step to step.
        moment: ``logits``, when the loss is computed; ``head``, its backward; ``last block``, when its backward begins;
            ``first gradients`` of it; ``next block``, the one with experts before it; ``embedding``, when the backward
            ends; ``step``, the optimizer's.
        activations: what forwards keep for backwards then, without the stash.
        stash: what communication-aware recomputation keeps of collectives then.
        working: what lives beside these for that moment: the logits, or one block's recomputation and gradients.
        gradient_buffers: gradients on their way that are no states.
        tile: temporaries of the optimizer's step.
    """

    states: StateBytes
    moment: str
    activations: int = 0
    stash: int = 0
    working: int = 0
    gradient_buffers: int = 0
    tile: int = 0

    @property
    def peak(self) -> int:
        parts = self.activations + self.stash + self.working + self.gradient_buffers + self.tile
        return self.states.total + parts

    def parts(self) -> dict[str, int]:
        """What the peak is made of."""
        states = self.states
        return {
            "dense parameters": states.dense_parameters,
            "expert parameters": states.expert_parameters,
            "gradients": states.gradients,
            "master": states.master,
            "moments": states.moments + states.scalars,
            "activations": self.activations,
            "stash": self.stash,
            "working": self.working,
            "gradient buffers": self.gradient_buffers,
            "tile": self.tile,
        }


def memory(job: Job, candidate: Candidate, device: str = "cuda", tile_size: int | None = None) -> Memory:
    """Foresee the memory of one rank.

    Args:
        job, candidate: what is trained, and how.
        device: ``cuda`` or ``cpu``.
        tile_size: as the strategy's.
    """
    at = Activations(job, candidate)
    states = state_bytes(job, candidate, tile_size, device)
    forward, stash, block = at.forward(), at.stashes(), block_backward(at)
    blocks = forward - stash - at.ends()
    sent = gradient_buffers(job, candidate, device)
    # Of a shared matrix, the head's gradient waits for the embedding's.
    tied = at.vocabulary if job.sizes.tie_embeddings else 0
    layers = job.sizes.num_layers
    left = max(1, layers - job.sizes.moe_every)  # blocks, when the last one with experts is done
    moments = (
        Memory(states, "logits", forward - stash, stash, at.logits()),
        Memory(states, "head", forward - stash, stash, at.head_backward()),
        Memory(states, "last block", blocks, stash, tied + block, sent.head),
        Memory(states, "first gradients", blocks, stash, tied + first_gradients(at), sent.first),
        Memory(states, "next block", left * blocks // layers, left * stash // layers, tied + block, sent.blocks),
        Memory(states, "embedding", working=tied + at.embedding_backward(), gradient_buffers=sent.end),
        Memory(states, "step", gradient_buffers=sent.received, tile=tile_bytes(job, candidate, tile_size, device)),
    )
    return max(moments, key=lambda moment: moment.peak)


def size(bytes_: float) -> str:
    """A size of memory with its unit."""
    return f"{bytes_ / 2**30:.2f} GiB" if bytes_ >= 0.1 * 2**30 else f"{bytes_ / 2**20:.1f} MiB"


def block_backward(at: Activations) -> int:
    """The most that one block's backward takes beside what the forwards kept: a bound over its moments."""
    sizes = at.job.sizes
    kinds = [experts for experts, there in ((False, sizes.dense_layers), (True, sizes.moe_layers)) if there]
    return max(_recomputed(at, experts) + (_moe_flow(at) if experts else _mlp_flow(at)) for experts in kinds)


def _recomputed(at: Activations, experts: bool) -> int:
    """What a recomputation makes anew: the block's activations, but its input and what is on the tape."""
    if at.candidate.activation_checkpointing is None:
        return 0
    made = at.block(experts)
    if at.norm_sees_stream:
        made -= at.stream
    if at.candidate.activation_checkpointing == "communication_aware" and experts:
        made -= at.arrived + at.home
    return made


def _mlp_flow(at: Activations) -> int:
    """The gradients of the stream, of what goes into the last product, and of its matrix."""
    sizes, tensor, size = at.job.sizes, at.candidate.layout.tensor, at.job.element_bytes
    hidden = sizes.hidden // tensor
    return at.stream + (at.tokens + sizes.dim) * hidden * size


def _moe_flow(at: Activations) -> int:
    """Of the moments of a MoE layer's backward the one that takes most.

    The weighted sum: gradients of rows and weights in the weights' precision. The way to the experts: gradients at
    home, picked, the own part of them, and at the experts. The last product: gradients of its result, its input and its
    matrix, when what came home is given back (unless it is on a tape). The end of a recomputed forward: what the
    experts gave, reordered and picked.
    """
    size, gather = at.job.element_bytes, at.gather
    moments = [
        2 * at.home // size * at.score_bytes,
        2 * at.home + at.arrived + (at.arrived // gather if gather > 1 else 0) - _given_back(at),
        at.arrived + _expert_matrix(at) + at.hidden - _given_back(at),
    ]
    if at.candidate.activation_checkpointing == "full":
        moments.append(3 * at.arrived)
    return at.stream + max(moments)


def first_gradients(at: Activations) -> int:
    """Beside what the forwards kept, when the last MoE layer's first gradient is given to its buffer."""
    if not at.job.sizes.moe_layers:
        return 0
    return _recomputed(at, True) + at.stream + _expert_matrix(at) - _given_back(at)


def _expert_matrix(at: Activations) -> int:
    sizes, layout = at.job.sizes, at.candidate.layout
    experts, hidden = sizes.num_experts // layout.expert, sizes.hidden // layout.expert_tensor
    return experts * hidden * sizes.dim * at.job.element_bytes


def _given_back(at: Activations) -> int:
    return 0 if at.candidate.activation_checkpointing == "communication_aware" else at.home


class GradientBuffers(NamedTuple):
    """Bytes of gradients on their way that are no states, at the moments of a backward.

    Args:
        head: when the last block's begins; first: when its experts' first gradient is there; blocks: when the last
            ``moe_every`` blocks are done; end: of the backward; received: before the step.
    """

    head: int = 0
    first: int = 0
    blocks: int = 0
    end: int = 0
    received: int = 0


def gradient_buffers(job: Job, candidate: Candidate, device: str) -> GradientBuffers:
    """What ZeRO 2 moves to whole buffers: one fills, two are sent; or all are there, where they do not leave early.

    On CPU, where we sum the parts of a reduce-scatter, the other ranks' parts are received.
    """
    of, stage = buffers(job, candidate), candidate.zero_stage
    sends = sorted((buffer.bytes for buffer in of if device == "cpu" and buffer.owners > 1), reverse=True)
    if stage < 2:
        return GradientBuffers(received=sum(sends) if stage == 1 else 0)
    alive = _EXISTING if candidate.communication.overlap else len(of)

    def begun(place: int) -> int:
        """Of the buffers with a gradient, once those of all parameters from ``place`` on are there."""
        there = [b.bytes for b, last in zip(of, last_members(job, candidate), strict=True) if last >= place]
        return sum(sorted(there, reverse=True)[:alive])

    names = [parameter.name for parameter in job.sizes.parameters()]
    # Behind the last block come the last norm and the head, if it has a matrix of its own.
    head = begun(names.index("norm.weight"))
    experts = [place for place, name in enumerate(names) if name.endswith("experts.down")]
    first = begun(experts[-1]) if experts else head
    block = max(0, job.sizes.num_layers - job.sizes.moe_every)
    blocks, end = begun(names.index(f"blocks.{block}.attention_norm.weight")), begun(0)
    return GradientBuffers(head, first, blocks, end, end + sum(sends[:_EXISTING]))
