"""Muon of hidden matrices and AdamW of everything else, as one optimizer that recipes can name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lightning_tex.optim.combined import CombinedOptimizer
from lightning_tex.optim.muon import Muon
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.parallel.sharding import TexModule

HIDDEN = "hidden"  # of a group: whether its parameters are hidden matrices


def hidden_matrices(root: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """A model's trained parameters: matrices between embedding and head, those of experts among them, and the rest.

    The rest are vectors, stacks of vectors of experts, and the matrices of ``nn.Embedding``, ``VocabParallelEmbedding``
    and ``VocabParallelHead``. A head that is an ``nn.Linear`` counts as hidden.
    """
    vectors_or_ends = set()
    for module in root.modules():
        stacks = getattr(module, "shard_dims", {}) if isinstance(module, TexModule) else {}
        end = isinstance(module, nn.Embedding) or (isinstance(module, TexModule) and not module.hidden)
        for name, parameter in module.named_parameters(recurse=False):
            dims = parameter.dim() - (stacks.get(name, {}).get("expert") == 0)
            if end or dims < 2:
                vectors_or_ends.add(id(parameter))
    trained = [parameter for parameter in root.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if id(parameter) not in vectors_or_ends]
    return matrices, [parameter for parameter in trained if id(parameter) in vectors_or_ends]


class MuonAdamW(CombinedOptimizer):
    """:class:`Muon` of a model's hidden matrices, and AdamW of everything else: embeddings, heads, norms, biases.

    ``return MuonAdamW(self, lr=3e-4)`` in ``configure_optimizers``, or ``--optimizer lightning_tex.optim.MuonAdamW``.

    Args:
        params: the model, or groups as :meth:`groups_of` makes them.
        lr: learning rate of AdamW, and of Muon unless ``muon_lr`` says otherwise.
        muon_lr: learning rate of Muon.
        weight_decay: of matrices; vectors have none.
        momentum, nesterov, ns_steps: of Muon.
        adjust_lr_fn: ``"match_rms_adamw"``: Muon's updates are as large as AdamW's, so that one ``lr`` suits both
            (arXiv 2502.16982, section 2.2); ``"original"`` or ``None``: as Muon was first published, with a ``muon_lr``
            of about 0.02.
        betas, eps: of AdamW.

    Raises:
        ValueError: groups that do not say which are hidden matrices; no such matrix, or nothing else.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[dict[str, Any]],
        lr: float = 3e-4,
        muon_lr: float | None = None,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        given = self.groups_of(params) if isinstance(params, nn.Module) else list(params)
        if not all(isinstance(group, Mapping) and HIDDEN in group for group in given):
            raise UserValueError(
                "MuonAdamW cannot tell hidden matrices from embeddings by their shapes; legal: MuonAdamW(module, ..), "
                "or MuonAdamW(MuonAdamW.groups_of(module), ..)"
            )
        ratio = 1.0 if muon_lr is None else muon_lr / lr
        matrices = [{**_own(group), "lr": ratio * group.get("lr", lr)} for group in given if group[HIDDEN]]
        others = [_own(group) for group in given if not group[HIDDEN]]
        if not matrices or not others:
            missing = "other parameters" if matrices else "hidden matrices"
            raise UserValueError(f"MuonAdamW: the model has no {missing} to train; legal: Muon or AdamW alone")
        super().__init__(
            [
                Muon(
                    matrices, lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov, ns_steps=ns_steps,
                    adjust_lr_fn=adjust_lr_fn,
                ),
                torch.optim.AdamW(others, lr, betas=betas, eps=eps, weight_decay=weight_decay),
            ]
        )  # fmt: skip

    @staticmethod
    def groups_of(root: nn.Module) -> list[dict[str, Any]]:
        """A model's trained parameters: hidden matrices, other matrices, vectors without weight decay."""
        matrices, rest = hidden_matrices(root)
        ends = [parameter for parameter in rest if parameter.dim() > 1]
        vectors = [parameter for parameter in rest if parameter.dim() <= 1]
        groups = [
            {"params": matrices, HIDDEN: True},
            {"params": ends, HIDDEN: False},
            {"params": vectors, HIDDEN: False, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]


def _own(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != HIDDEN}
