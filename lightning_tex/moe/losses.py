"""Load-balance and z losses: over the whole data axis's micro-step, exactly once in the gradient."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_tex.moe.router import Route
from lightning_tex.parallel.activation_layout import ActivationLayout
from lightning_tex.parallel.collectives import all_reduce
from lightning_tex.parallel.compiled import leaf
from lightning_tex.parallel.topology import Axis

# T tokens, E experts, k choices per token


def routing_loss(
    route: Route,
    counts: Tensor,
    token_mask: Tensor | None,
    data: Axis,
    layout: ActivationLayout,
    load_balance: float,
    z: float,
) -> Tensor:
    """Load-balance loss and z-loss of one micro-step over the data axis, summed by their coefficients: a scalar.

    Load balance is E * sum_e f_e P_e (Switch, Eq. 4-6): f_e the fraction of choices that fell on expert e, without
    gradient, P_e its mean score. The z-loss is the mean of logsumexp(logits)^2 (ST-MoE, Eq. 5). Means are over the
    tokens of all data ranks that are not masked, so the values do not depend on the layout; their gradients, averaged
    over data as all others are, come out once.

    Args:
        counts: [E] choices of this rank's tokens that fell on each expert.
        token_mask: [T] boolean.
        load_balance, z: the coefficients.
    """
    return _RoutingLoss.apply(route.scores, route.logits, counts, token_mask, data, layout, load_balance, z)


class _RoutingLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, logits: Tensor, counts: Tensor, mask: Tensor | None, data: Axis,
        layout: ActivationLayout, load_balance: float, z: float,
    ) -> Tensor:  # fmt: skip
        log_sums = logits.logsumexp(-1) if z else None  # [T]
        totals = all_reduce(layout.total(_totals(scores, counts, mask, log_sums)), data)
        loss, by_score, by_square = _loss(totals, load_balance, z)
        # Gradients are averaged over data later, and this is the loss of all ranks together.
        ctx.ranks, ctx.shape = data.size, scores.shape
        ctx.save_for_backward(by_score, by_square, mask, logits if z else None, log_sums)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        by_score, by_square, mask, logits, log_sums = ctx.saved_tensors
        grad = grad * ctx.ranks
        d_scores, d_logits = (grad * by_score).expand(ctx.shape), None
        if mask is not None:
            d_scores = d_scores * mask[:, None]
        if logits is not None:
            d_logits = _z_backward(grad * by_square, logits, log_sums, mask)
        return d_scores, d_logits, None, None, None, None, None, None


@leaf
def _totals(scores: Tensor, counts: Tensor, mask: Tensor | None, log_sums: Tensor | None) -> Tensor:
    """[2 E + 2]: sums of scores, of squared sums of logits, counts, tokens."""
    squares = scores.new_zeros(1) if log_sums is None else log_sums.square()
    tokens = torch.full((1,), scores.shape[0], dtype=scores.dtype, device=scores.device)
    if mask is not None:
        scores, squares = scores * mask[:, None], squares * mask if log_sums is not None else squares
        tokens = mask.sum(dtype=scores.dtype)[None]
    return torch.cat([scores.sum(0), squares.sum()[None], counts.to(scores.dtype), tokens])


@leaf
def _loss(totals: Tensor, load_balance: float, z: float) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, its derivative by each expert's score of a token [E], and that by a token's square."""
    experts = (totals.shape[0] - 2) // 2
    scores, squares, counts, tokens = totals.split([experts, 1, experts, 1])
    tokens = tokens.clamp(min=1)
    by_score = load_balance * experts * counts / counts.sum().clamp(min=1) / tokens
    by_square = z / tokens
    return ((by_score * scores).sum() + (by_square * squares).sum()), by_score, by_square


@leaf
def _z_backward(by_square: Tensor, logits: Tensor, log_sums: Tensor, mask: Tensor | None) -> Tensor:
    of_token = 2 * by_square * log_sums
    if mask is not None:
        of_token = of_token * mask
    return (logits - log_sums[:, None]).exp() * of_token[:, None]


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
