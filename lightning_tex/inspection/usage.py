"""Choices of one MoE layer, counted by token, source, document and pair of experts: tables on the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# T tokens, k choices per token, E experts, V vocabulary, S sources, D documents

# Tokens whose choices exist as rows of E numbers at a time.
_AT_ONCE = 1 << 14


class LayerUsage:
    """Where a layer's choices fell. Memory does not depend on how much is counted: V E * 4 + (S + D + 2 E) E * 8 bytes.

    Args:
        experts: E.
        vocabulary: V; 0: tokens are not told apart.
        sources: S.
        documents: D.
        before: experts of the MoE layer before; 0: there is none.
        device: of the tables.

    Attributes:
        by_token: [V, E] choices of a token of the vocabulary.
        by_source: [S, E] of the tokens of a source.
        by_document: [D, E] of those of a document.
        together: [E, E] tokens that chose both experts; those that chose one, on the diagonal.
        paths: [E before, E] tokens that chose this expert after that one in the layer before.
    """

    def __init__(
        self, experts: int, vocabulary: int, sources: int, documents: int, before: int, device: torch.device
    ) -> None:
        self.experts = experts
        self.by_token = torch.zeros(vocabulary, experts, dtype=torch.int32, device=device)
        self.by_source, self.by_document, self.together, self.paths = (
            torch.zeros(rows, experts, dtype=torch.int64, device=device)
            for rows in (sources, documents + 1, experts, before)
        )

    @property
    def choices(self) -> Tensor:
        """Of each expert. [E]"""
        return self.by_source.sum(0)

    def add(
        self, indices: Tensor, ids: Tensor | None, sources: Tensor, documents: Tensor, before: Tensor | None
    ) -> None:
        """Add what some tokens chose.

        Args:
            indices: [T, ..] experts, E for none.
            ids: [T] of the vocabulary; ``None``: not known.
            sources: [T].
            documents: [T], D for one that is not counted.
            before: [T, ..] what they chose in the layer before.
        """
        for start in range(0, len(indices), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            chosen = _marked(indices[part], self.experts)
            if len(self.by_token) and ids is not None:
                self.by_token.index_add_(0, ids[part], chosen.int())
            self.by_source.index_add_(0, sources[part], chosen.long())
            self.by_document.index_add_(0, documents[part], chosen.long())
            self.together += (chosen.T @ chosen).long()
            if before is not None and len(self.paths):
                self.paths += (_marked(before[part], len(self.paths)).T @ chosen).long()

    def reduced(self, total: Callable[[Tensor], Tensor]) -> LayerUsage:
        """The same summed over ranks, on the CPU; collective.

        Args:
            total: the sum of a table over ranks that hold different tokens.
        """
        made = LayerUsage(self.experts, 0, 0, 0, 0, torch.device("cpu"))
        for name in ("by_token", "by_source", "by_document", "together", "paths"):
            setattr(made, name, total(getattr(self, name).long()).cpu())
        made.by_document = made.by_document[:-1]
        return made


def _marked(indices: Tensor, experts: int) -> Tensor:
    """1 where a token chose an expert, in fp32, which counts as far as 2^24. [T, E]"""
    marks = torch.zeros(len(indices), experts + 1, device=indices.device)
    return marks.scatter_(1, indices, 1.0)[:, :experts]
