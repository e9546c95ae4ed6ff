"""Memory of one rank, broken down, at the moment of a step when it is fullest."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_tex.planner.activations import Activations
from lightning_tex.planner.layouts import Candidate, Job
from lightning_tex.planner.states import StateBytes, buffers, state_bytes, tile_bytes

_UNDER_WAY = 3  # buffers of ZeRO 2 that exist at once: two that are sent, one that fills


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    Args:
        states: what is kept from step to step.
        activations: what the forwards of all blocks keep for the backward, without the stash.
        stash: what communication-aware recomputation keeps of collectives.
        working: the most that lives beside these for a moment: the logits, or one block's recomputation and gradients.
        collective_buffers: of ZeRO 2, gradients of whole buffers on their way.
        tile: temporaries of the optimizer's step, when activations are gone; on CPU what a reduce-scatter receives, if
            that is more.
    """

    states: StateBytes
    activations: int
    stash: int
    working: int
    collective_buffers: int
    tile: int

    @property
    def training(self) -> int:
        """The most in forward and backward."""
        return self.states.total + self.activations + self.stash + self.working + self.collective_buffers

    @property
    def stepping(self) -> int:
        """The most in the optimizer's step."""
        return self.states.total + self.tile

    @property
    def peak(self) -> int:
        return max(self.training, self.stepping)

    def parts(self) -> dict[str, int]:
        """What the peak is made of; the sum is the peak, but that a tile counts only as far as it stands out."""
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
            "collective buffers": self.collective_buffers,
            "tile": max(0, self.stepping - self.training),
        }


def memory(job: Job, candidate: Candidate, device: str = "cuda", tile_size: int | None = None) -> Memory:
    """Foresee the memory of one rank.

    Args:
        job, candidate: what is trained, and how.
        device: ``cuda`` or ``cpu``.
        tile_size: as the strategy's.
    """
    at = Activations(job, candidate)
    stash = at.stashes()
    return Memory(
        state_bytes(job, candidate, tile_size, device),
        at.forward() - stash,
        stash,
        # The last block's backward begins when head and last norm are done.
        max(at.logits(), block_backward(at) - at.ends()),
        gradient_buffers(job, candidate),
        max(tile_bytes(job, candidate, tile_size, device), received_bytes(job, candidate, device)),
    )


def block_backward(at: Activations) -> int:
    """The most that one block's backward takes beside what the forwards kept: a bound over its moments."""
    sizes = at.job.sizes
    kinds = [experts for experts, there in ((False, sizes.dense_layers), (True, sizes.moe_layers)) if there]
    return max(_recomputed(at, experts) + (_moe_flow(at) if experts else _mlp_flow(at)) for experts in kinds)


def _recomputed(at: Activations, experts: bool) -> int:
    """What a recomputation makes anew: the block's activations, but its input and what is on the tape."""
    if at.candidate.recompute is None:
        return 0
    made = at.block(experts)
    if at.norm_sees_stream:
        made -= at.stream
    if at.candidate.recompute == "communication_aware" and experts:
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
    home, picked, and at the experts. The last product: gradients of its result, its input and its matrix, when what
    came home is given back (unless it is on a tape). The end of a recomputed forward: what the experts gave, reordered
    and picked.
    """
    sizes, layout, size = at.job.sizes, at.candidate.layout, at.job.element_bytes
    cut = sizes.hidden // layout.expert_tensor
    matrix = sizes.num_experts // layout.expert * cut * sizes.dim * size
    given_back = 0 if at.candidate.recompute == "communication_aware" else at.home
    moments = [
        2 * at.home // size * at.score_bytes,
        2 * at.home + at.arrived - given_back,
        at.arrived + matrix + at.rows * cut * size - given_back,
    ]
    if at.candidate.recompute == "full":
        moments.append(3 * at.arrived)
    return at.stream + max(moments)


def gradient_buffers(job: Job, candidate: Candidate) -> int:
    """Gradients of whole buffers under ZeRO 2 before they are reduced; where they do not leave early, all of them."""
    if candidate.zero_stage != 2:
        return 0
    of = sorted((buffer.bytes for buffer in buffers(job, candidate)), reverse=True)
    return sum(of[:_UNDER_WAY] if candidate.communication.overlap else of)


def received_bytes(job: Job, candidate: Candidate, device: str) -> int:
    """What the ranks' parts of gradients take before they are summed: on CPU, where we sum them."""
    if device != "cpu" or candidate.zero_stage == 0:
        return 0
    of = sorted((buffer.bytes for buffer in buffers(job, candidate) if buffer.owners > 1), reverse=True)
    return sum(of[: _UNDER_WAY - 1] if candidate.zero_stage == 2 else of)
