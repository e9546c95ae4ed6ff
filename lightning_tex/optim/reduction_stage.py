"""Where the gradients of a step are, what has been done to them, and what is legal then."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, unique

from torch import Tensor


@unique
class ReductionStage(Enum):
    """Where the gradients of a step are.

        COLLECTING -> IN_BACKWARD -> COLLECTING (ZeRO 2: SENT) -> .. -> IN_LAST_BACKWARD -> COMPLETE
        COLLECTING, SENT or COMPLETE -> COMBINED (-> UNSCALED, where there is a loss scale) -> step -> COLLECTING

    A backward that is not announced leaves the stage as it is; ``zero_grad`` leads from every stage to the first one.
    A stage says what is so, and what is legal then.
    """

    COLLECTING = "no backward is under way", "backward_begins(loss), step() or zero_grad()"
    IN_BACKWARD = (
        "a backward has begun and not ended, or has failed",
        "backward_ended() after it, or zero_grad() to give the step up",
    )
    IN_LAST_BACKWARD = (
        "the last backward of the step has begun and not ended, or has failed",
        "backward_ended() after it, or zero_grad() to give the step up",
    )
    SENT = "gradients of the step's backwards are with their owners", "backward_begins(loss), step() or zero_grad()"
    COMPLETE = "the last backward of the step is over", "clip_by_norm(..), clip_by_value(..), step() or zero_grad()"
    COMBINED = (
        "the gradients of this step have been combined (a norm, clipping and the step do that)",
        "step() or zero_grad() before the next backward",
    )
    UNSCALED = (
        "the gradients of this step have been combined, and the loss scale has been taken out of them",
        "step() or zero_grad() before the next backward",
    )

    def __init__(self, said: str, legal: str) -> None:
        self.said, self.legal = said, legal


@dataclass(frozen=True)
class ReductionState:
    """What has been done to the gradients since the last step; never changed, but replaced by the next one.

    Args:
        stage: where they are.
        scale: what they are still to be multiplied by; a scalar where only the device knows it.
        norm: their norm before that, if it has been taken.
        finite: whether it was, on their device, if that has been looked at; clamping loses the norm and not this.
        losses_finite: whether the losses of all ranks were, if that has been looked at.
        announced: the stage of a backward that had begun when ``zero_grad`` began the step anew, as in a hook before
            the backward; it may still be ended.
    """

    stage: ReductionStage = ReductionStage.COLLECTING
    scale: float | Tensor = 1.0
    norm: Tensor | None = None
    finite: Tensor | None = None
    losses_finite: Tensor | None = None
    announced: ReductionStage | None = None
