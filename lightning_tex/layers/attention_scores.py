"""How positions see each other: windows, sinks, scaled and capped scores, by fast kernels where they can be."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_tex.parallel.initialization import by_index, init_normal_
from lightning_tex.parallel.sharding import TexModule

# B sequences, S positions, h query heads and g key/value heads held here, d width of queries and keys, c of values

# Kernels on GPUs take heads whose width is a multiple of this.
_EIGHT = 8
_SINK_STD = 0.02


class AttentionSinks(TexModule):
    """A learned score for each query head, which takes part in the head's softmax and has no value (gpt-oss).

    Args:
        num_heads: of all ranks.
    """

    shard_dims = {"weight": {"tensor": 0}}

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    @by_index
    def reset_parameters(self) -> None:
        """Draw from a normal distribution around 0."""
        init_normal_(self.weight, _SINK_STD, self.boxes()["weight"])


@dataclass(frozen=True)
class AttentionScores:
    """What becomes of the products of queries and keys.

    Args:
        scale: they are multiplied with it.
        window: a position sees this many, itself included; ``None``: all before it.
        softcap: scores s become softcap * tanh(s / softcap) (Gemma 2). No fast kernel has it: all scores of a layer,
            [B, h, S, S], exist at once.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        visible: Tensor | None,
        causal: bool,
        dropout: float,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Mix values.

        Args:
            query, key, value: [B, h, S, d], [B, g, S, d], [B, g, S, c].
            visible: boolean, broadcasts to [B, h, S, S]: what may be seen, whatever ``causal`` says.
            causal: a position sees nothing after it.
            dropout: of the weights.
            sinks: [h], of :class:`AttentionSinks`.

        Returns:
            [B, h, S, c]
        """
        visible = self._in_window(visible, query.shape[-2], causal, query.device)
        shared = query.shape[1] // key.shape[1]
        if shared > 1 and (visible is not None or self.softcap is not None):
            # Flash kernels on GPUs take no mask, and the one that does takes no heads in groups.
            key, value = (x.repeat_interleave(shared, 1) for x in (key, value))
        if self.softcap is not None:
            if visible is None and causal:
                visible = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
            return self._plainly(query, key, value, visible, dropout, None if sinks is None else sinks.view(-1, 1, 1))
        width = value.shape[-1]
        if sinks is not None:
            query, key, value, visible = self._with_sinks(query, key, value, visible, causal, sinks)
        if value.shape[-1] < query.shape[-1]:
            value = F.pad(value, (0, query.shape[-1] - value.shape[-1]))  # flash kernels have one width
        y = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=visible,
            dropout_p=dropout,
            is_causal=causal and visible is None,
            scale=self.scale,
            enable_gqa=key.shape[1] != query.shape[1],
        )
        if sinks is not None and visible is None and causal:
            y = y[..., 1:, :]
        return y[..., :width]

    def attend_last(
        self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, sinks: Tensor | None = None
    ) -> Tensor:
        """Mix values for one position of each sequence, of keys of which none is beyond its window. No gradient.

        Keys and values are read once, where they are: heads that share them are as positions to the kernel.

        Args:
            query, key, value: [B, h, 1, d], [B, g, N, d], [B, g, N, c].
            visible: [B, N] boolean, which keys may be seen; ``None``: all.
            sinks: [h], of :class:`AttentionSinks`.

        Returns:
            [B, h, 1, c]
        """
        query = query.unflatten(1, (key.shape[1], -1)).squeeze(3)  # [B, g, h / g, d]
        visible = None if visible is None else visible[:, None, None]
        if sinks is None and self.softcap is None and value.shape[-1] == key.shape[-1]:
            y = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=self.scale)
        else:
            sinks = None if sinks is None else sinks.view(key.shape[1], -1, 1)
            y = self._plainly(query, key, value, visible, 0.0, sinks)
        return y.flatten(1, 2).unsqueeze(2)

    def _in_window(self, visible: Tensor | None, length: int, causal: bool, device: torch.device) -> Tensor | None:
        if self.window is None or self.window >= length:
            return visible
        near = torch.ones(length, length, dtype=torch.bool, device=device).triu(1 - self.window)
        near = near.tril(0 if causal else self.window - 1)
        if visible is None:
            return near
        seen = visible & near
        # What is padding may have no key left in its window.
        return seen | ~seen.any(-1, keepdim=True) & torch.eye(length, dtype=torch.bool, device=device)

    def _with_sinks(
        self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, causal: bool, sinks: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """One more key that everybody sees, of value 0: one more column has the head's sink for it and 0 for others.

        A causal kernel lets all see it if it comes first; then there is a first query, too, whose result is nobody's.
        """
        column = (sinks / self.scale).to(query.dtype).view(1, -1, 1, 1).expand(*query.shape[:-1], 1)
        query = F.pad(torch.cat([query, column], -1), (0, _EIGHT - 1))
        sink = F.pad(key.new_ones(*key.shape[:2], 1, 1), (key.shape[-1], _EIGHT - 1))
        key = torch.cat([sink, F.pad(key, (0, _EIGHT))], 2)
        value = F.pad(value, (0, 0, 1, 0))
        if visible is not None:
            return query, key, value, F.pad(visible, (1, 0), value=True)
        return F.pad(query, (0, 0, 1, 0)) if causal else query, key, value, None

    def _plainly(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        visible: Tensor | None,
        dropout: float,
        sinks: Tensor | None,
    ) -> Tensor:
        """All scores at once; ``sinks`` broadcast to them, but for their last dim."""
        scores = query @ key.mT
        if self.softcap is None:
            scores = scores * self.scale
        else:
            scores = self.softcap * (scores * (self.scale / self.softcap)).tanh()
        if visible is not None:
            scores = scores.masked_fill(~visible, float("-inf"))
        if sinks is not None:
            scores = torch.cat([scores, sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)], -1)
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
        return F.dropout(weights, dropout)[..., : key.shape[-2]] @ value
