"""What routers send to decide, as the planner knows it."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_tex.moe import ExpertChoiceRouter, GShardRouter, HashRouter, Router, SigmoidRouter, SinkhornRouter
from lightning_tex.moe.softmax_routers import ForcedBalanceRouter


@dataclass(frozen=True)
class Deciding:
    """What a router sends to decide: nothing, where it decides by what every rank knows.

    Args:
        agreed_choices, agreed_scores, agreed_flags: numbers of a token that tensor rank 0 tells the others, by kind.
        column_sums: sums of a number for each expert over all tokens, one after the other.
        gathered_scores: over what scores of all experts are gathered, ``"sequence"`` or ``"batch"``; ``None``: nothing.
        counts_steps: choices of each expert are summed after every optimizer step.
        slots: choices that a token may have.
        learned: whether weights of choices have gradients.
    """

    slots: int
    agreed_choices: int = 0
    agreed_scores: int = 0
    agreed_flags: int = 0
    column_sums: int = 0
    gathered_scores: str | None = None
    counts_steps: bool = False
    learned: bool = True

    @classmethod
    def of(cls, router: Router) -> Deciding:
        """That of a router; one of the user's own is taken to choose by its scores."""
        k, experts = router.top_k, router.num_experts
        match router:
            case HashRouter():
                return cls(k, learned=False)
            case ForcedBalanceRouter():
                return cls(k)
            case ExpertChoiceRouter():
                return cls(experts, agreed_scores=experts, gathered_scores=router.within)
            case SinkhornRouter():
                return cls(k, k, column_sums=router.iterations)
            case GShardRouter():
                return cls(k, k, agreed_flags=1)
            case SigmoidRouter():
                return cls(k, k, counts_steps=router.bias_update_rate > 0)
        return cls(k, k)
