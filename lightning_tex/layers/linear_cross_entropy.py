"""Head and cross-entropy in one, over chunks of tokens: no logits of all tokens ever exist, nor gradients of them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_tex.layers.head_gradients import HeadGradients, HeadMatrix
from lightning_tex.layers.vocab import Reduction, VocabParallelHead, require_reduction, require_targets
from lightning_tex.parallel.collectives import all_gather
from lightning_tex.parallel.compiled import leaf
from lightning_tex.parallel.device import device_type
from lightning_tex.parallel.precision import product_dtype
from lightning_tex.parallel.replay import recomputing
from lightning_tex.parallel.sharding import TexModule
from lightning_tex.parallel.topology import Axis

# T tokens, t tokens of a chunk, V vocabulary, v columns of the logits here (ceil(V / tensor)), D model width

# Bytes of a chunk's logits. A GPU adds up the gradient of the head's matrix once a chunk: chunks of about a thousand
# tokens keep that below what the products take. A CPU is fastest where memory is used again before it is cold.
CHUNK_BYTES = {"cuda": 256 * 2**20, "cpu": 32 * 2**20}


def chunk_sizes(tokens: int, columns: int, element_bytes: int, device: str) -> list[int]:
    """Tokens of each chunk in which the logits of T tokens, [t, v], are computed: as equal as can be."""
    largest = max(1, CHUNK_BYTES[device] // (columns * element_bytes))
    count = max(1, -(-tokens // largest))
    return [(place + 1) * tokens // count - place * tokens // count for place in range(count)]


class VocabParallelLinearCrossEntropy(TexModule):
    """Cross-entropy of a :class:`VocabParallelHead`'s logits, of which only a chunk exists at a time.

    It equals ``VocabParallelCrossEntropy()(head(x), target)`` in value and gradients. While a chunk's logits are there,
    what they give to the gradients of ``x`` and of the head's matrix is computed as well, and the backward only scales
    it; where that cannot be (``reduction="none"``, fp16, whose gradients need the loss scale, and a second backward)
    the backward computes them once more. The matrix's gradient is added up in fp32.

    Forward exchanges two numbers a token over tensor (log of the sum of exponentials, and the target's logit), in one
    all-gather a chunk; backward nothing but what entering the head does.

    Args:
        ignore_index: targets with this value cost nothing and are not counted.
        reduction: ``"mean"`` over counted targets (0 when there are none), ``"sum"`` or ``"none"``.
        z_loss_coefficient: of the squared logarithm of a token's sum of exponentials, which is added to its loss (PaLM,
            arXiv 2204.02311, section 5).

    Raises:
        ValueError: unknown reduction.
        IndexError: a target beyond the vocabulary, on CPU; on a GPU, which does not wait to be asked, such a token's
            loss is NaN.
    """

    def __init__(
        self, ignore_index: int = -100, reduction: Reduction = "mean", z_loss_coefficient: float = 0.0
    ) -> None:
        super().__init__()
        require_reduction(reduction)
        self.ignore_index, self.reduction, self.z_loss_coefficient = ignore_index, reduction, z_loss_coefficient

    def forward(self, x: Tensor, head: VocabParallelHead, target: Tensor) -> Tensor:
        """Loss of a head's logits.

        Args:
            x: [.., S, D], what the head would be given: under sequence parallelism a rank's part of every sequence.
            head: whose matrix scores the vocabulary.
            target: [.., S] integer, of whole sequences always.

        Returns:
            a scalar, or [.., S] for ``"none"``, in fp32 (fp64 for fp64 logits).
        """
        counted = target != self.ignore_index
        kept = target.masked_fill(~counted, 0)
        require_targets(kept, head.size)
        scores = _Scores(
            head.tensor,
            head.size,
            head.boxes()["weight"].extent.sizes[0],
            self.z_loss_coefficient,
            self.reduction != "none",
            torch.is_grad_enabled() and not recomputing(),
            head.softcap,
        )
        x = head.activation_layout.enter(x)
        loss: Tensor = _LinearCrossEntropy.apply(
            x.flatten(0, -2), head.weight, head.bias, kept.flatten(), counted.flatten(), scores
        )
        if self.reduction == "none":
            return loss.view(target.shape)
        return loss if self.reduction == "sum" else loss / counted.sum().clamp(min=1)


@dataclass(frozen=True)
class _Scores:
    """What a chunk's logits are computed by, and what becomes of them.

    Args:
        tensor: the axis over which the vocabulary is sharded.
        size: V.
        columns: of the vocabulary here, without padding.
        z_loss_coefficient: of the z-loss.
        summed: the result is one sum, so that the gradient of each counted token is the same number.
        trained: a backward may follow.
        softcap: of the logits, see :class:`VocabParallelHead`.
    """

    tensor: Axis
    size: int
    columns: int
    z_loss_coefficient: float
    summed: bool
    trained: bool
    softcap: float | None

    def logits(self, x: Tensor, matrix: HeadMatrix) -> tuple[Tensor, Tensor | None]:  # [t, D] -> [t, v] twice
        """Logits, and where they are capped their derivative by what was capped."""
        weight, (logits, slope) = matrix.weight, (F.linear(x, matrix.weight, matrix.bias), None)
        if self.softcap is not None:
            logits, slope = _capped(logits, self.softcap)
        if self.columns < weight.shape[0]:
            logits[:, self.columns :] = float("-inf")
        return logits, slope

    def place(self, target: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        """Column of each target among those here, or another one, and whether it is here: [t, 1], [t]."""
        local = target - self.tensor.rank * columns
        present = (local >= 0) & (local < columns)
        return local.masked_fill(~present, 0)[:, None], present

    def whole(self, log_sum: Tensor, at_target: Tensor, target: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        """The same numbers of the whole vocabulary: [t] each."""
        if self.tensor.size > 1:
            both = all_gather(torch.stack([log_sum, at_target])[None], 0, self.tensor)  # [tensor, 2, t]
            owner = (target // columns).clamp(0, self.tensor.size - 1)
            log_sum, at_target = both[:, 0].logsumexp(0), both[:, 1].gather(0, owner[None])[0]
        return log_sum, at_target.masked_fill((target < 0) | (target >= self.size), float("nan"))

    def losses(self, log_sum: Tensor, at_target: Tensor) -> Tensor:
        """[t] each."""
        losses = log_sum - at_target
        return losses + self.z_loss_coefficient * log_sum.square() if self.z_loss_coefficient else losses


class _Chunk:
    """Some tokens' logits, which become their exponentials and then their gradients.

    Args:
        scores: of all chunks.
        x, target: [t, D], [t].
        matrix: the head's.
    """

    def __init__(self, scores: _Scores, x: Tensor, matrix: HeadMatrix, target: Tensor) -> None:
        self.scores, self.target = scores, target
        self.logits, self.slope = scores.logits(x, matrix)
        self.local, self.present = scores.place(target, len(matrix.weight))
        at_local = self.logits.gather(1, self.local)[:, 0]
        self.exp, self.top, self.log_sum = _exponentials(self.logits)
        self.at_local = at_local.to(self.log_sum.dtype)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Of the whole vocabulary the log of the sum of exponentials, and the target's logit: [t] each."""
        return self.scores.whole(self.log_sum, self.at_local, self.target, self.logits.shape[-1])

    def gradient(self, log_sum: Tensor, upstream: Tensor) -> Tensor:
        """That of the logits, by those of the tokens' losses: [t] each -> [t, v]."""
        factor = upstream
        if self.scores.z_loss_coefficient:
            factor = upstream * (1 + 2 * self.scores.z_loss_coefficient * log_sum)
        at_local = (self.at_local - log_sum).exp() * factor - upstream * self.present
        gradient = _multiplied(self.exp, factor * (self.top - log_sum).exp(), self.logits)
        rows = torch.arange(len(gradient), device=gradient.device)
        gradient = gradient.index_put_((rows, self.local[:, 0]), at_local.to(gradient.dtype))
        return gradient if self.slope is None else gradient.mul_(self.slope)


@leaf
def _capped(logits: Tensor, softcap: float) -> tuple[Tensor, Tensor]:
    """softcap * tanh(logits / softcap), and its derivative: [t, v] each."""
    tanh = (logits / softcap).tanh_()
    return tanh * softcap, 1 - tanh.square()


@leaf
def _exponentials(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Exponentials of what is left without a row's largest, that one, and log(sum(exp(logits))): [t, v], [t], [t].

    In at least fp32, in place of the logits where they have that. A row may be all -inf.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    top = logits.amax(-1).clamp(min=torch.finfo(logits.dtype).min).to(dtype)
    shifted = logits if logits.dtype == dtype else logits.to(dtype)
    exp = shifted.sub_(top[:, None]).exp_()
    return exp, top, exp.sum(-1).log_().add_(top)


@leaf
def _multiplied(exp: Tensor, factor: Tensor, logits: Tensor) -> Tensor:
    """Rows times their factors, in the logits' dtype and place."""
    exp.mul_(factor[:, None])
    return exp if exp.dtype == logits.dtype else logits.copy_(exp)


class _LinearCrossEntropy(torch.autograd.Function):
    """Losses of [T, D] tokens, or their sum."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, counted: Tensor, scores: _Scores
    ) -> Tensor:
        dtype, needed = product_dtype(x), ctx.needs_input_grad[:3]
        wide = torch.promote_types(dtype, torch.float32)
        log_sums, losses = x.new_empty(len(x), dtype=wide), x.new_empty(len(x), dtype=wide)
        at_once = scores.trained and scores.summed and dtype != torch.float16 and any(needed)
        with torch.autocast(x.device.type, enabled=False):
            rows, matrix, upstream = x.to(dtype), HeadMatrix(weight, bias).to(dtype), counted.to(wide)
            chunks = _chunks(rows, matrix.weight)
            gradients = HeadGradients(rows, matrix, needed, len(chunks)) if at_once else None
            for part in chunks:
                chunk = _Chunk(scores, rows[part], matrix, target[part])
                log_sum, at_target = chunk.statistics()
                log_sums[part], losses[part] = log_sum, scores.losses(log_sum, at_target)
                if gradients is not None:
                    gradients.add(part, chunk.gradient(log_sum, upstream[part]), rows[part], matrix.weight)
                del chunk  # before there is the next
        ctx.save_for_backward(x, weight, bias, target, counted, log_sums)
        ctx.scores, ctx.dtype, ctx.gradients = scores, dtype, gradients
        losses = losses.masked_fill_(~counted, 0)
        return losses.sum() if scores.summed else losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, target, counted, log_sums = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None  # they are given away: a second backward makes its own
        if gradients is not None:
            gradients.scale(grad)
        else:
            with torch.autocast(x.device.type, enabled=False):
                rows, matrix, upstream = x.to(ctx.dtype), HeadMatrix(weight, bias).to(ctx.dtype), counted * grad
                chunks = _chunks(rows, matrix.weight)
                gradients = HeadGradients(rows, matrix, ctx.needs_input_grad[:3], len(chunks))
                for part in chunks:
                    chunk = _Chunk(ctx.scores, rows[part], matrix, target[part])
                    gradients.add(part, chunk.gradient(log_sums[part], upstream[part]), rows[part], matrix.weight)
                    del chunk
        found = zip((gradients.x, gradients.weight, gradients.bias), (x, weight, bias), strict=True)
        return *(None if g is None else g.to(like.dtype) for g, like in found), None, None, None


def _chunks(x: Tensor, weight: Tensor) -> list[slice]:  # [T, D], [v, D]
    ends = list(accumulate(chunk_sizes(len(x), len(weight), x.element_size(), device_type(x)), initial=0))
    return [slice(*pair) for pair in pairwise(ends)]
