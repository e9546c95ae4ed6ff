"""Instants of a step at which a rank may be fullest, and what it holds then."""

from __future__ import annotations

from dataclasses import dataclass


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
        reached: where the backward is: the place of the first of the parameters whose gradients are there; ``None``
            before it.
    """

    event: str
    activations: int = 0
    stash: int = 0
    working: int = 0
    gradient_buffers: int = 0
    tile: int = 0
    reached: int | None = None

    @property
    def bytes(self) -> int:
        return self.activations + self.stash + self.working + self.gradient_buffers + self.tile
