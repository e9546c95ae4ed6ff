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
        collective_buffers: gradients on their way that are no states.
        tile: temporaries of the optimizer's step, when activations are gone.
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
        max(at.logits(), block_backward(at)),
        gradient_buffers(job, candidate, device),
        tile_bytes(job, candidate, tile_size, device),
    )


def block_backward(at: Activations) -> int:
    """The most that one block's backward takes beside what the forwards kept.

    Its recomputed activations, where they are; the gradients of the stream, of the rows at the experts and of what
    stands between two products; and the gradient of its largest matrix before it is added up.
    """
    sizes, layout = at.job.sizes, at.candidate.layout
    most = 0
    for experts in (False, True):
        if not (sizes.moe_layers if experts else sizes.dense_layers):
            continue
        recomputed = at.block(experts) if at.candidate.recompute is not None else 0
        if experts:
            hidden = at.rows * sizes.hidden // layout.expert_tensor
            matrix = sizes.num_experts // layout.expert * sizes.hidden // layout.expert_tensor * sizes.dim
            flow = at.stream + (2 * at.rows * sizes.dim + 2 * hidden) * at.job.element_bytes
        else:
            hidden = at.tokens * sizes.hidden // layout.tensor
            matrix = sizes.hidden // layout.tensor * sizes.dim
            flow = 2 * at.stream + 2 * hidden * at.job.element_bytes
        most = max(most, recomputed + flow + matrix * at.job.element_bytes)
    return most


def gradient_buffers(job: Job, candidate: Candidate, device: str) -> int:
    """Gradients under way that are no states: of ZeRO 2 whole buffers; on CPU what a reduce-scatter receives."""
    of = buffers(job, candidate)
    sent = sorted((buffer.bytes for buffer in of), reverse=True)
    total = sum(sent[:_UNDER_WAY]) if candidate.zero_stage == 2 else 0
    if device == "cpu" and candidate.zero_stage > 0:
        received = sorted((buffer.bytes for buffer in of if buffer.owners > 1), reverse=True)
        total += sum(received[: _UNDER_WAY - 1] if candidate.zero_stage == 2 else received)
    return total
