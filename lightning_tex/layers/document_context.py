"""Documents that lie one behind the other in a sequence and do not see each other, known once for all layers."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from lightning_tex.layers.attention_scores import AttentionScores
from lightning_tex.layers.rotary import Rotary, RotaryTables
from lightning_tex.layers.token_context import Context, TokenContext, visible_keys
from lightning_tex.parallel.device import device_type
from lightning_tex.parallel.errors import UserValueError

# Versions of torch differ in what it takes.
_VARLEN_OPTIONS = frozenset(inspect.signature(varlen_attn).parameters)
_WIDEST_FLASH_HEAD, _AMPERE = 256, (8, 0)

# B sequences, S positions, N documents of all sequences, h query heads and g key/value heads, d and c their widths


@dataclass(frozen=True)
class DocumentContext(Context):
    """A token sees those of its own document up to itself, and its position is its place in that document.

    Attention is computed of each document by itself, so that a token pays for what it sees: by one kernel for sequences
    of any length where a GPU has it, else by one call for each document.

    Args:
        padding: what is no token; ``None``: there is none.
        positions: [B, S] int64, of a token in its document, in the order in which attention has tokens.
        ends: [N + 1] int32, 0 and where each document ends, counted over all sequences, padding behind the last one of
            each included.
        lengths: of the documents, so counted: the differences of ``ends``, known to the host.
    """

    padding: TokenContext | None
    positions: Tensor
    ends: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, segments: Tensor, token_mask: Tensor | None = None) -> DocumentContext:
        """The context of a batch; on a GPU it waits once for what the numbers are.

        Args:
            segments: [B, S] integers. Neighbours of the same number are of one document, also with padding between.
            token_mask: [B, S], True or 1 for a token, False or 0 for padding, whose numbers count for nothing.

        Raises:
            ValueError: another shape or kind of numbers.
        """
        if segments.dim() != 2 or segments.is_floating_point():
            raise UserValueError(
                f"segments are {segments.dtype} of shape {list(segments.shape)}; legal: integers of shape [B, S], a "
                "token's document in its sequence"
            )
        padding = None if token_mask is None else TokenContext.causal(token_mask)
        begins = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0))
        if padding is not None:
            segments, is_token = (x.gather(1, padding.order) for x in (segments, padding.token_mask))
            # Padding stands behind the tokens: to the last document it comes later, and is not seen.
            begins = F.pad((segments[:, 1:] != segments[:, :-1]) & is_token[:, 1:], (1, 0))
        place = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
        positions = place - (place * begins).cummax(-1).values
        begins[:, 0] = True
        starts = begins.cpu().flatten().nonzero().flatten()
        ends = F.pad(starts, (0, 1), value=segments.numel())
        lengths = tuple(end - start for start, end in pairwise(ends.tolist()))
        return cls(padding, positions, ends.to(segments.device, torch.int32, non_blocking=True), lengths)

    @property
    def token_mask(self) -> Tensor | None:  # type: ignore[override]
        return None if self.padding is None else self.padding.token_mask

    @property
    def position_ids(self) -> Tensor:
        """[B, S] int64, of a token among those of its document, from 0."""
        return self.positions if self.padding is None else self.positions.gather(1, self.padding.places)

    @property
    def visible(self) -> Tensor:
        """[B, 1, S, S] boolean, True where a position (dim -2) sees another one (dim -1): for attention of your own."""
        count = torch.arange(len(self.lengths), device=self.ends.device)
        document = count.repeat_interleave(self.ends.diff(), output_size=self.positions.numel())
        document = document.view_as(self.positions)
        if self.padding is not None:
            document = document.gather(1, self.padding.places)
        own = document[:, None, :, None] == document[:, None, None, :]
        return visible_keys(own if self.token_mask is None else own & self.token_mask[:, None, None], causal=True)

    def pack(self, x: Tensor) -> Tensor:
        return x if self.padding is None else self.padding.pack(x)

    def unpack(self, x: Tensor) -> Tensor:
        return x if self.padding is None else self.padding.unpack(x)

    def tables(self, rotary: Rotary, length: int, like: Tensor) -> RotaryTables:
        return rotary.tables(length, like, None if self._are_whole else self.positions)

    @property
    def _are_whole(self) -> bool:
        """Each sequence is one document."""
        return len(self.lengths) == len(self.positions)

    def attend(
        self,
        scores: AttentionScores,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout: float = 0.0,
        sinks: Tensor | None = None,
    ) -> Tensor:
        if self._are_whole:
            return scores.attend(query, key, value, None, True, dropout, sinks)
        flat = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]  # [B S, h, d]
        if dropout == 0 and sinks is None and _has_kernel(scores, query, value):
            y = self._by_one_kernel(scores, *flat)
        else:
            documents = zip(*(x.split(self.lengths) for x in flat), strict=True)
            y = torch.cat([_alone(scores, q, k, v, dropout, sinks) for q, k, v in documents])
        return y.unflatten(0, self.positions.shape).transpose(1, 2)

    def _by_one_kernel(self, scores: AttentionScores, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[B S, h, d], [B S, g, d], [B S, g, c] -> [B S, h, c]"""
        options: dict[str, Any] = {"scale": scores.scale}
        options["window_size"] = (-1 if scores.window is None else scores.window - 1, 0)
        shared, width = query.shape[1] // key.shape[1], value.shape[-1]
        if shared > 1 and "enable_gqa" in _VARLEN_OPTIONS:
            options["enable_gqa"] = True
        elif shared > 1:
            key, value = (x.repeat_interleave(shared, 1) for x in (key, value))
        value = F.pad(value, (0, query.shape[-1] - width))
        longest = max(self.lengths)
        y = varlen_attn(query, key, value, self.ends, self.ends, longest, longest, **options)
        assert isinstance(y, Tensor)
        return y[..., :width]


def _alone(
    scores: AttentionScores, query: Tensor, key: Tensor, value: Tensor, dropout: float, sinks: Tensor | None
) -> Tensor:
    """One document of L tokens: [L, h, d], [L, g, d], [L, g, c] -> [L, h, c]."""
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    return scores.attend(query, key, value, None, True, dropout, sinks)[0].transpose(0, 1)


def _has_kernel(scores: AttentionScores, query: Tensor, value: Tensor) -> bool:
    """Whether torch's kernel for sequences of any length takes these."""
    width = query.shape[-1]
    return (
        {"scale", "window_size"} <= _VARLEN_OPTIONS
        and device_type(query) == "cuda"
        and (not query.is_cuda or torch.cuda.get_device_capability(query.device) >= _AMPERE)
        and query.dtype in (torch.float16, torch.bfloat16)
        and value.dtype == query.dtype
        and scores.softcap is None
        and value.shape[-1] <= width
        and takes_documents(width)
    )


def takes_documents(width: int) -> bool:
    """Whether heads of this width are among those that torch's kernel takes."""
    return width % 8 == 0 and width <= _WIDEST_FLASH_HEAD
