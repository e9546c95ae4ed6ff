"""How many choices of the same tokens have changed since these tokens were last seen."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

# T tokens, E experts, k choices per token


class ChoiceChanges:
    """Compares what a batch's tokens choose with what they chose when the same batch passed the layers before.

    Another batch, told by the values of its tensors, is compared with nothing. Of one batch, and of this rank's tokens.
    """

    def __init__(self) -> None:
        self._batch: list[Tensor] = []
        self._before: dict[str, Tensor] = {}  # [T, k] int16
        self._now: dict[str, Tensor] = {}
        self._experts: dict[str, int] = {}
        self._hooks: list[RemovableHandle] = []

    def begin(self, layers: Mapping[str, nn.Module], batch: Any) -> None:
        """A batch is about to pass the layers, which have labels, and routers under this name."""
        tensors = [leaf.clone() for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
        self._before = self._now if _alike(tensors, self._batch) else {}
        self._batch, self._now = tensors, {}
        self._hooks = [
            layer.get_submodule("router").register_forward_hook(partial(self._see, label))
            for label, layer in layers.items()
        ]

    def end(self) -> None:
        """It has passed them."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def take(self, label: str) -> Tensor | None:
        """Of a layer, the choices that fall on experts which the token did not choose before, and all choices. [2]

        Once for a batch; ``None``: there is nothing to compare.
        """
        last = self._before.pop(label, None)
        if last is None or label not in self._now:
            return None
        before, now = self._chosen(label, last), self._chosen(label, self._now[label])
        return torch.stack([(now & ~before).sum(), now.sum()]).double()

    def _see(self, label: str, router: nn.Module, given: Any, route: Any) -> None:
        self._now[label] = route.indices.to(torch.int16)
        self._experts[label] = route.scores.shape[1]

    def _chosen(self, label: str, choices: Tensor) -> Tensor:  # [T, k] -> [T, E] boolean
        experts = self._experts[label]
        marks = torch.zeros(len(choices), experts + 1, dtype=torch.bool, device=choices.device)
        return marks.scatter_(1, choices.long(), True)[:, :experts]


def _alike(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) > 0 and all(map(torch.equal, some, others))
