"""The ways to communicate less, one by one and together, as options of the strategy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lightning_tex.strategy import TexMoEStrategy


@dataclass(frozen=True)
class Combination:
    """Which communication optimizations a run uses.

    Args:
        duplicate_token_dropping: duplicate-token dropping (paper section 5.1).
        communication_aware: communication-aware activation checkpointing (section 5.2); otherwise full recomputation.
        fused: reduce-scatter where the paper has an all-reduce and a split.
        overlap: reduce gradients while the backward runs.
        sequence: sequence parallelism.
        folding: experts whole, their axis running through the tensor ranks.
    """

    duplicate_token_dropping: bool = False
    communication_aware: bool = False
    fused: bool = False
    overlap: bool = False
    sequence: bool = False
    folding: bool = False

    def options(self, tensor: int, expert: int | str) -> dict[str, Any]:
        """The strategy's arguments, for a recipe of these sizes."""
        options: dict[str, Any] = {
            "duplicate_token_dropping": self.duplicate_token_dropping,
            "activation_checkpointing": "communication_aware" if self.communication_aware else "full",
            "sequence_parallel": self.sequence,
            "expert_tensor_parallel_size": 1 if self.folding else tensor,
        }
        if self.folding:  # as many experts to a rank as before would leave ranks without any: spread them further
            options["expert_parallel_size"] = expert if expert == "auto" else int(expert) * tensor
        return options

    def tell(self, strategy: TexMoEStrategy) -> None:
        """Set what is no argument of the strategy."""
        strategy.communication = replace(strategy.communication, fused=self.fused, overlap=self.overlap)


PAPER = Combination(duplicate_token_dropping=True, communication_aware=True)
COMBINATIONS: dict[str, Combination] = {
    "baseline": Combination(),
    "+DTD": Combination(duplicate_token_dropping=True),
    "+CAC": Combination(communication_aware=True),
    "+DTD +CAC": PAPER,
    "  and reduce-scatter": replace(PAPER, fused=True),
    "  and overlap": replace(PAPER, fused=True, overlap=True),
    "  and sequence parallel": replace(PAPER, fused=True, overlap=True, sequence=True),
    "  and folding": replace(PAPER, fused=True, overlap=True, sequence=True, folding=True),
}
