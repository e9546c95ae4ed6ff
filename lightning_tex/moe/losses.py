"""Load-balance and z losses: over the whole data axis's micro-step, exactly once in the gradient."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from lightning_tex.moe.router import Route
from lightning_tex.parallel.activation_layout import ActivationLayout
from lightning_tex.parallel.collectives import sum_over
from lightning_tex.parallel.topology import Axis

# T tokens, E experts, k choices per token


def routing_losses(
    route: Route, counts: Tensor, token_mask: Tensor | None, data: Axis, layout: ActivationLayout
) -> tuple[Tensor, Tensor]:
    """Load-balance loss and z-loss of one micro-step over the data axis: two scalars.

    Load balance is E * sum_e f_e P_e (Switch, Eq. 4-6): f_e the fraction of choices that fell on expert e, without
    gradient, P_e its mean score. The z-loss is the mean of logsumexp(logits)^2 (ST-MoE, Eq. 5). Means are over the
    tokens of all data ranks that are not masked, so the values do not depend on the layout; their gradients, averaged
    over data as all others are, come out once.
    """
    scores, log_z = route.scores, route.logits.logsumexp(-1).square()
    if token_mask is not None:
        scores, log_z = scores * token_mask[:, None], log_z * token_mask
    experts = scores.shape[-1]
    counts = counts.to(scores.dtype)
    tokens = scores.new_full((1,), len(scores)) if token_mask is None else token_mask.sum(dtype=scores.dtype)[None]
    totals = sum_over(layout.total(torch.cat([scores.sum(0), log_z.sum()[None], counts, tokens])), data)
    score_sum, z_sum, counts, tokens = totals.split([experts, 1, experts, 1])
    counts, tokens = counts.detach(), tokens.detach().clamp(min=1)
    fraction = counts / counts.sum().clamp(min=1)
    balance = experts * (fraction * score_sum / tokens).sum()
    return balance, (z_sum / tokens).squeeze()


def count_choices(indices: Tensor, experts: int) -> Tensor:  # [.., k] -> [E] int64
    """How many choices fell on each expert; masked choices fall on none."""
    flat = indices.flatten()
    return flat.new_zeros(experts + 1).scatter_add_(0, flat, torch.ones_like(flat))[:experts]


class LossLedger:
    """The weighted losses that one MoE layer has recorded and nobody has collected yet."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.warned = False

    def __deepcopy__(self, memo: dict[int, object]) -> LossLedger:
        # A loss belongs to the graph it was recorded in, not to a copy of the layer.
        return LossLedger()

    def record(self, loss: Tensor, output: Tensor) -> None:
        """Keep a loss until it is collected; drop it, with one warning, if backward passes ``output`` before that."""
        self.losses.append(loss)

        def passed(_: Tensor) -> None:
            if any(kept is loss for kept in self.losses):
                self.losses = [kept for kept in self.losses if kept is not loss]
                if not self.warned:
                    self.warned = True
                    warnings.warn(
                        "A MoE layer's auxiliary loss was not collected before backward and has no effect: add "
                        "lightning_tex.moe.auxiliary_loss(model) to your loss, train with strategy='tex_moe', "
                        "or set load_balance_coefficient=0 and z_loss_coefficient=0",
                        stacklevel=2,
                    )

        if output.requires_grad:
            output.register_hook(passed)

    def collect(self) -> list[Tensor]:
        """The recorded losses; the ledger is empty afterwards."""
        losses, self.losses = self.losses, []
        return losses


def auxiliary_loss(module: nn.Module) -> Tensor:
    """The sum of all auxiliary losses recorded since the last call, already weighted: a scalar. Collects and clears.

    Layers record only in training, with gradients enabled, and not while recomputing. Under ``strategy="tex_moe"``
    calling this is optional: what nobody collected is added before the backward. In other strategies add it to the
    loss. Without MoE layers, or when nothing was recorded, it is 0.
    """
    ledgers = [vars(m)["ledger"] for m in module.modules() if isinstance(vars(m).get("ledger"), LossLedger)]
    losses = [loss for ledger in ledgers for loss in ledger.collect()]
    if losses:
        return torch.stack(losses).sum()
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    return torch.zeros((), device=device)
