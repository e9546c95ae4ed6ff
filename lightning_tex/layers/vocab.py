"""Embedding, head and cross-entropy with the vocabulary sharded over the tensor axis: full logits are never gathered.

A vocabulary that the tensor axis does not divide is padded inside; the padding is never seen, learned or saved.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_tex.parallel.collectives import all_reduce, gather
from lightning_tex.parallel.errors import UserIndexError, UserValueError
from lightning_tex.parallel.initialization import by_index, has_values, init_normal_
from lightning_tex.parallel.sharding import TexModule
from lightning_tex.parallel.topology import Axis

Reduction = Literal["mean", "sum", "none"]

# V vocabulary, v rows stored here = ceil(V / tensor), D model width


class _Vocabulary(TexModule):
    shard_dims = {"weight": {"tensor": 0}, "bias": {"tensor": 0}}
    hidden = False
    bias: nn.Parameter | None

    def __init__(self, size: int, dim: int, std: float, bias: bool = False) -> None:
        super().__init__()
        self.size, self.dim, self.std = size, dim, std
        self.weight = nn.Parameter(torch.empty(size, dim))
        self.bias = nn.Parameter(torch.empty(size)) if bias else None
        self.reset_parameters()

    @by_index
    def reset_parameters(self) -> None:
        """Draw every row from a normal distribution; a bias is 0."""
        init_normal_(self.weight, self.std, self.boxes()["weight"])
        if self.bias is not None and has_values(self.bias):
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return f"{self.size}, {self.dim}"


class VocabParallelEmbedding(_Vocabulary):
    """Embedding table with its rows sharded over the tensor axis: [..] integer -> [.., dim].

    Alone in one process it is ``torch.nn.Embedding``. Forward all-reduces over tensor, backward communicates nothing.
    Under sequence parallelism the result is a rank's part of every sequence, [.., S] -> [.., S/tensor, dim]: forward
    reduce-scatters, backward gathers.

    Args:
        num_embeddings: size of the vocabulary, V.
        embedding_dim: width of a row, D.
        std: standard deviation of the initial weights.

    Raises:
        IndexError: ids that are not in the vocabulary, on CPU. A GPU does not wait to be asked: see
            :func:`lightning_tex.data.require_token_ids`.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, std: float = 1.0) -> None:
        super().__init__(num_embeddings, embedding_dim, std)

    def forward(self, ids: Tensor) -> Tensor:  # [..] -> [.., D]
        if self.tensor.size == 1:
            try:
                return F.embedding(ids, self.weight)
            except IndexError as error:
                raise self._out_of_range(ids) from error
        if ids.device.type == "cpu" and bool(((ids < 0) | (ids >= self.size)).any()):
            raise self._out_of_range(ids)
        local = ids - self.boxes()["weight"].extent.offsets[0]
        absent = (local < 0) | (local >= self.weight.shape[0])
        rows = F.embedding(local.masked_fill(absent, 0), self.weight)
        return self.activation_layout.leave_own(rows.masked_fill(absent[..., None], 0))

    def _out_of_range(self, ids: Tensor) -> UserIndexError:
        least, most = int(ids.min()), int(ids.max())
        return UserIndexError(f"token ids must be between 0 and {self.size - 1}; found {least} to {most}")


class VocabParallelHead(_Vocabulary):
    """Output projection with the vocabulary sharded over the tensor axis: [.., dim] -> [.., ceil(vocab/tensor)].

    Padding columns, where the vocabulary does not divide, are -inf. To tie it with an embedding assign
    ``head.weight = embedding.weight``. Under sequence parallelism it takes a rank's part of every sequence and gives
    whole ones: [.., S/tensor, dim] -> [.., S, ceil(vocab/tensor)].

    Args:
        dim: width of the input, D.
        vocab_size: V.
        gather_output: all-gather the logits over tensor: [.., dim] -> [.., vocab].
        softcap: logits l become softcap * tanh(l / softcap) (Gemma 2).
        bias: add a bias to the logits, sharded as they are.
    """

    def __init__(
        self,
        dim: int,
        vocab_size: int,
        gather_output: bool = False,
        softcap: float | None = None,
        bias: bool = False,
    ) -> None:
        self.gather_output, self.softcap = gather_output, softcap
        super().__init__(vocab_size, dim, dim**-0.5, bias)

    def forward(self, x: Tensor) -> Tensor:  # [.., D] -> [.., v]
        logits = self.columns(self.activation_layout.enter(x))
        return gather(logits, -1, self.tensor)[..., : self.size] if self.gather_output else logits

    def columns(self, x: Tensor) -> Tensor:  # [.., D] -> [.., v]
        """This rank's logits alone, of what has entered the tensor axis already."""
        logits = F.linear(x, self.weight, self.bias)
        if self.softcap is not None:
            logits = self.softcap * (logits / self.softcap).tanh()
        rows = self.boxes()["weight"].extent.sizes[0]
        if rows < self.weight.shape[0]:
            padding = torch.arange(self.weight.shape[0], device=x.device) >= rows
            logits = logits.masked_fill(padding, float("-inf"))
        return logits


class VocabParallelCrossEntropy(TexModule):
    """Cross-entropy of logits whose last dim is sharded over the tensor axis. Computed in fp32 (fp64 for fp64 logits).

    Alone in one process it is ``torch.nn.CrossEntropyLoss`` over the last dim. Forward exchanges four numbers per
    token over tensor (maximum; sum, target and whether it was found), backward nothing. Logits that were gathered are
    whole on every rank: give those to torch's own.

    Args:
        ignore_index: targets with this value cost nothing and are not counted.
        reduction: ``"mean"`` over counted targets (0 when there are none), ``"sum"`` or ``"none"``.

    Raises:
        ValueError: unknown reduction.
        IndexError: a target that is no column of the logits, on CPU; on a GPU, which does not wait to be asked, such a
            token's loss is NaN.
    """

    def __init__(self, ignore_index: int = -100, reduction: Reduction = "mean") -> None:
        super().__init__()
        require_reduction(reduction)
        self.ignore_index, self.reduction = ignore_index, reduction

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:  # [.., v], [..] -> scalar, or [..] for "none"
        counted = target != self.ignore_index
        losses: Tensor = _CrossEntropy.apply(logits, target.masked_fill(~counted, 0), self.tensor)
        losses = losses.masked_fill(~counted, 0)
        if self.reduction == "none":
            return losses
        return losses.sum() if self.reduction == "sum" else losses.sum() / counted.sum().clamp(min=1)


class _CrossEntropy(torch.autograd.Function):
    """log(sum(exp(logits))) - logits[target] per token. Saves the softmax of its own columns only."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, axis: Axis) -> Tensor:
        ctx.dtype = logits.dtype
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        local = target - axis.rank * logits.shape[-1]
        absent = (local < 0) | (local >= logits.shape[-1])
        local = local.masked_fill(absent, 0)[..., None]
        shifted = logits - all_reduce(logits.amax(-1), axis, "max")[..., None]
        at_target = shifted.gather(-1, local)[..., 0].masked_fill(absent, 0)
        exp = shifted.exp_()
        found = (~absent).to(exp.dtype)
        total, at_target, found = all_reduce(torch.stack([exp.sum(-1), at_target, found]), axis).unbind()
        if not found.is_cuda and not bool((found == 1).all()):
            raise UserIndexError(f"targets between {target.min()} and {target.max()} are not all columns of the logits")
        at_target = at_target.masked_fill(found != 1, float("nan"))
        ctx.save_for_backward(exp.div_(total[..., None]), local, absent)
        return total.log() - at_target

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        softmax, local, absent = ctx.saved_tensors
        d_logits = softmax * grad[..., None]
        d_logits.scatter_add_(-1, local, -grad.masked_fill(absent, 0)[..., None])
        return d_logits.to(ctx.dtype), None, None


def require_reduction(reduction: str) -> None:
    """Raise ``ValueError`` unless the reduction is known."""
    if reduction not in get_args(Reduction):
        raise UserValueError(f"reduction={reduction!r}; legal: {', '.join(map(repr, get_args(Reduction)))}")


def require_targets(target: Tensor, vocab_size: int) -> None:
    """Raise ``IndexError`` unless targets are in the vocabulary, on CPU; a GPU does not wait to be asked."""
    if target.device.type == "cpu" and bool(((target < 0) | (target >= vocab_size)).any()):
        least, most = int(target.min()), int(target.max())
        raise UserIndexError(f"targets must be between 0 and {vocab_size - 1}; found {least} to {most}")


def require_both_ends(root: nn.Module) -> None:
    """Refuse sequence parallelism for a model whose sequence-sharded activations would not begin or not end.

    Raises:
        ValueError: naming the missing layer.
    """
    for end in (VocabParallelEmbedding, VocabParallelHead):
        if not any(isinstance(module, end) for module in root.modules()):
            raise UserValueError(
                f"sequence_parallel=True splits activations over tensor from VocabParallelEmbedding to "
                f"VocabParallelHead, and {type(root).__name__} has no {end.__name__}; legal: build it with both, or "
                "sequence_parallel=False"
            )
