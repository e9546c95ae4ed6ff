"""Load-balance, z and entropy losses: over the whole data axis's micro-step, exactly once in the gradient."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_tex.moe.router import Route
from lightning_tex.parallel.activation_layout import ActivationLayout
from lightning_tex.parallel.collectives import sum_over
from lightning_tex.parallel.compiled import leaf
from lightning_tex.parallel.topology import Axis

# T tokens, E experts, k choices per token


@dataclass(frozen=True)
class Coefficients:
    """Weights of the losses over a micro-step's tokens, on all data ranks.

    Args:
        load_balance: of E * sum_e f_e P_e (Switch, arXiv 2101.03961, Eq. 4-6): f_e the fraction of choices that fell on
            expert e, without gradient, P_e its mean score.
        z: of the mean of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, Eq. 5).
        entropy: of the mean entropy of a token's scores, in nats (LIMoE, arXiv 2206.02770, Eq. 4: the local one).
        step_balance: of load balance whose f_e is over the micro-steps of an optimizer step up to this one (arXiv
            2501.11873, section 3).
    """

    load_balance: float
    z: float
    entropy: float = 0.0
    step_balance: float = 0.0

    def __bool__(self) -> bool:
        return any((self.load_balance, self.z, self.entropy, self.step_balance))


def routing_loss(
    route: Route,
    counts: Tensor,
    token_mask: Tensor | None,
    data: Axis,
    layout: ActivationLayout,
    coefficients: Coefficients,
    counts_before: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Losses of one micro-step over the data axis, summed by their coefficients, a scalar, and choices of each expert.

    Means are over the tokens of all data ranks that are not masked, so the values do not depend on the layout; their
    gradients, averaged over data as all others are, come out once.

    Args:
        counts: [E] choices of this rank's tokens that fell on each expert.
        token_mask: [T] boolean.
        counts_before: [E] of all ranks, in earlier micro-steps of the optimizer step; ``None``: there was none.

    Returns:
        The loss, and what ``counts_before`` is in the next micro-step.
    """
    totals = _Totals.apply(route.scores, route.logits, counts, token_mask, coefficients)
    totals = sum_over(layout.total(totals), data)
    experts = route.scores.shape[1]
    so_far = totals.detach()[-experts - 1 : -1]
    so_far = so_far if counts_before is None else so_far + counts_before
    c = coefficients
    return _Loss.apply(totals, so_far, (c.load_balance, c.z, c.entropy, c.step_balance)), so_far


class _Totals(torch.autograd.Function):
    """Sums over own tokens: scores [E], squared logsumexp of logits, entropies if wanted; counts [E] and tokens.

    Of the last two there is no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, logits: Tensor, counts: Tensor, mask: Tensor | None, wanted: Coefficients
    ) -> Tensor:
        log_sums = logits.logsumexp(-1) if wanted.z else None  # [T]
        entropies = torch.special.entr(scores).sum(-1) if wanted.entropy else None
        ctx.shape = scores.shape
        ctx.save_for_backward(mask, logits if wanted.z else None, log_sums, scores if wanted.entropy else None)
        return _totals(scores, counts, mask, log_sums, entropies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mask, logits, log_sums, scores = ctx.saved_tensors
        experts = ctx.shape[1]
        d_scores = grad[:experts].expand(ctx.shape)
        if scores is not None:
            least = torch.finfo(scores.dtype).tiny
            d_scores = d_scores - grad[experts + 1] * (scores.clamp(min=least).log() + 1)
        if mask is not None:
            d_scores = d_scores * mask[:, None]
        d_logits = None if logits is None else _squares_backward(grad[experts], logits, log_sums, mask)
        return d_scores, d_logits, None, None, None


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, totals: Tensor, so_far: Tensor, coefficients: tuple[float, ...]) -> Tensor:
        loss, derivative = _loss(totals, so_far, *coefficients)
        ctx.save_for_backward(derivative)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.saved_tensors[0], None, None


@leaf
def _totals(
    scores: Tensor, counts: Tensor, mask: Tensor | None, log_sums: Tensor | None, entropies: Tensor | None
) -> Tensor:
    tokens = torch.full((1,), scores.shape[0], dtype=scores.dtype, device=scores.device)
    of_tokens = [None if log_sums is None else log_sums.square(), entropies]
    if mask is not None:
        scores, tokens = scores * mask[:, None], mask.sum(dtype=scores.dtype)[None]
        of_tokens = [None if each is None else each * mask for each in of_tokens]
    squares, entropies = of_tokens
    total = scores.new_zeros(1) if squares is None else squares.sum()[None]
    further = [] if entropies is None else [entropies.sum()[None]]
    return torch.cat([scores.sum(0), total, *further, counts.to(scores.dtype), tokens])


@leaf
def _loss(
    totals: Tensor, so_far: Tensor, load_balance: float, z: float, entropy: float, step_balance: float
) -> tuple[Tensor, Tensor]:
    """The loss, and its derivative by the totals."""
    experts = so_far.shape[0]
    counts, tokens = totals[-experts - 1 : -1], totals[-1:].clamp(min=1)
    of_scores = load_balance * experts * (counts / counts.sum().clamp(min=1))
    if step_balance:
        of_scores = of_scores + step_balance * experts * (so_far / so_far.sum().clamp(min=1))
    of_entropies = [entropy / tokens] if entropy else []
    rest = torch.zeros_like(totals[-experts - 1 :])
    derivative = torch.cat([of_scores / tokens, z / tokens, *of_entropies, rest])
    return (derivative * totals).sum(), derivative


@leaf
def _squares_backward(grad: Tensor, logits: Tensor, log_sums: Tensor, mask: Tensor | None) -> Tensor:
    of_token = 2 * grad * log_sums
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
                        "or set load_balance_coefficient=0 and other coefficients to 0",
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
