"""The ways to communicate less, one by one and together, as options of the strategy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lightning_tex.parallel.activation_checkpointing import ActivationCheckpointing
from lightning_tex.parallel.layout import Communication


@dataclass(frozen=True)
class Combination:
    """Which communication optimizations a run uses.

    Args:
        duplicate_token_dropping: duplicate-token dropping (paper section 5.1).
        activation_checkpointing: ``"communication_aware"`` (section 5.2) or ``"full"``.
        fused: reduce-scatter where the paper has an all-reduce and a split.
        overlap: reduce gradients while the backward runs.
        sequence_parallel: activations between layers are split along the sequence.
        folding: experts whole, their axis running through the tensor ranks.
        expert_chunks: of a MoE layer's tokens, one of which travels beside the products of another.
    """

    duplicate_token_dropping: bool = False
    activation_checkpointing: ActivationCheckpointing = "full"
    fused: bool = False
    overlap: bool = False
    sequence_parallel: bool = False
    folding: bool = False
    expert_chunks: int = 1

    def options(self, tensor: int, expert: int | str) -> dict[str, Any]:
        """The strategy's arguments, for a recipe of these sizes."""
        options: dict[str, Any] = {
            "duplicate_token_dropping": self.duplicate_token_dropping,
            "activation_checkpointing": self.activation_checkpointing,
            "sequence_parallel": self.sequence_parallel,
            "expert_chunks": self.expert_chunks,
            "expert_tensor_parallel_size": 1 if self.folding else tensor,
        }
        if self.folding:  # as many experts to a rank as before would leave ranks without any: spread them further
            options["expert_parallel_size"] = expert if expert == "auto" else int(expert) * tensor
        return options

    def communication(self, by_options: Communication) -> Communication:
        """How a strategy is to communicate: as its arguments say, and what is no argument as this says."""
        return replace(by_options, fused=self.fused, overlap=self.overlap)


PAPER = Combination(duplicate_token_dropping=True, activation_checkpointing="communication_aware")
COMBINATIONS: dict[str, Combination] = {
    "baseline": Combination(),
    "+DTD": Combination(duplicate_token_dropping=True),
    "+CAC": Combination(activation_checkpointing="communication_aware"),
    "+DTD +CAC": PAPER,
    "  and reduce-scatter": replace(PAPER, fused=True),
    "  and overlap": replace(PAPER, fused=True, overlap=True),
    "  and sequence parallel": replace(PAPER, fused=True, overlap=True, sequence_parallel=True),
    "  and folding": replace(PAPER, fused=True, overlap=True, sequence_parallel=True, folding=True),
    "  and chunks": replace(PAPER, fused=True, overlap=True, sequence_parallel=True, folding=True, expert_chunks=2),
}
