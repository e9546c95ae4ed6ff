"""Where a batch's tokens come from: sources of a mixture, and some documents that are told apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_tex.data.mixing import Mixture
from lightning_tex.data.packing import Blocks, Samples

# B rows of a batch, S positions

# Tokens that a document has at least, to be told apart.
_LEAST = 128
# Characters of a document that are its name, and tokens that may have them.
_NAME, _NAME_TOKENS = 38, 40


@dataclass(frozen=True)
class Document:
    """One that is told apart.

    Args:
        source: its source's number.
        start, end: where it is, in tokens counted over all sources.
        name: its first words.
    """

    source: int
    start: int
    end: int
    name: str


class Origins:
    """Of one part of a data module's samples: blocks of a stream, or a mixture of such. Others are one source.

    Args:
        data: the data module, set up.
        part: ``"train"`` or ``"validation"``.
        documents: that are told apart at most, of all sources together.
    """

    def __init__(self, data: Any, part: str, documents: int) -> None:
        samples = getattr(getattr(data, "prepared", None), part, None)
        named = (
            {part: samples}
            if not isinstance(samples, Mixture)
            else dict(zip(samples.names, samples.sources, strict=True))
        )
        self.sources = list(named)
        self._first_samples = np.cumsum([0, *(len(one) if isinstance(one, Samples) else 0 for one in named.values())])
        self.length: int | None = None
        self.documents: list[Document] = []
        streams = [one for one in named.values() if isinstance(one, Blocks)]
        if len(streams) == len(named):
            self.length = streams[0].sequence_length
            for number, blocks in enumerate(streams):
                self.documents += self._told_apart(number, blocks, documents // len(named), data)

    def of(self, batch: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Source and document of each token: [B, S] twice; the number of documents for one that is not told apart."""
        sources, documents = torch.zeros_like(ids), torch.full_like(ids, len(self.documents))
        sample = batch.get("sample") if isinstance(batch, Mapping) else None
        if not isinstance(sample, Tensor) or sample.shape != ids.shape[:1]:
            return sources, documents
        firsts = torch.as_tensor(self._first_samples[1:-1], device=ids.device)
        sources += torch.searchsorted(firsts, sample.clamp(min=0), right=True)[:, None]
        if self.length is not None and self.documents:
            place = sample[:, None] * self.length + torch.arange(ids.shape[1], device=ids.device)
            starts, ends = (
                torch.tensor([getattr(one, name) for one in self.documents], device=ids.device)
                for name in ("start", "end")
            )
            number = torch.searchsorted(starts, place, right=True) - 1
            inside = (number >= 0) & (place < ends[number.clamp(min=0)])
            documents = torch.where(inside, number, documents)
        return sources, documents

    def _told_apart(self, source: int, blocks: Blocks, most: int, data: Any) -> Sequence[Document]:
        """Documents of a source that are long enough, evenly spaced."""
        assert self.length is not None
        ends = blocks.stream.ends()
        starts = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
        long = np.flatnonzero(ends - starts >= _LEAST)
        if len(long) > most:
            long = long[np.linspace(0, len(long) - 1, most).round().astype(int)] if most else long[:0]
        # Blocks of a source begin where those of the one before end.
        offset = int(self._first_samples[source]) * self.length
        found = []
        for start, end in zip(starts[long].tolist(), ends[long].tolist(), strict=True):
            text = data.decode(blocks.stream.read(start, min(start + _NAME_TOKENS, end)).tolist())
            name = " ".join("".join(c if c.isprintable() else " " for c in text).split())
            found.append(Document(source, offset + start, offset + end, name[:_NAME]))
        return found


def ids_of(batch: Any) -> Tensor | None:
    """A batch's tokens [B, S], where it has some."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    return ids if isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point() else None


def is_padding(batch: Any, ids: Tensor) -> Tensor:
    """Which positions are none of the data's: padding, and rows that fill a batch up. [B, S]"""
    mask, sample = batch.get("attention_mask"), batch.get("sample")
    padding = torch.zeros_like(ids, dtype=torch.bool) if mask is None else mask == 0
    return padding if sample is None else padding | (sample < 0)[:, None]
