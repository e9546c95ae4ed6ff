"""Keys and values of tokens that were seen, remembered layer by layer, so that a further token is computed alone."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_tex.layers.attention_scores import AttentionScores
from lightning_tex.layers.rotary import Rotary, RotaryTables
from lightning_tex.layers.token_context import Context

# B sequences, S positions of one of them, T places of the one row in which tokens lie flat, C slots of a layer,
# h query heads and g key/value heads held here, d and c widths of keys and values


class LayerCache:
    """Keys [B, g, C, d], which have turned, and values [B, g, C, c] of one layer's heads on this rank.

    That of position p is in slot p % C: a layer with a window has no more slots than that, and forgets what nobody
    sees any more.

    Args:
        positions: of the longest sequence there will be.
    """

    def __init__(self, positions: int) -> None:
        self.positions = positions
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(kept.nbytes for kept in (self.keys, self.values) if kept is not None)

    def fill(self, key: Tensor, value: Tensor, lengths: Tensor, window: int | None) -> None:
        """Remember whole sequences.

        Args:
            key, value: [B, g, S, d], [B, g, S, c]; what lies behind a sequence's last token is nobody's.
            lengths: [B], tokens of each sequence.
            window: how many positions the layer sees; ``None``: all.
        """
        slots = self.positions if window is None else min(self.positions, window)
        used = torch.arange(min(slots, key.shape[2]), device=key.device)
        # The last position that belongs to each slot.
        place = used + slots * ((lengths[:, None] - 1 - used).clamp(min=0) // slots)
        self.keys, self.values = (_filled(x, place, slots) for x in (key, value))

    def add(self, key: Tensor, value: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Remember one more token of each sequence, [B, g, 1, d] and [B, g, 1, c] at [B, 1]; gives all slots."""
        assert self.keys is not None and self.values is not None, "no prompt has filled the cache"
        slot = (positions % self.keys.shape[2])[:, None, :, None]  # [B, 1, 1, 1]
        for kept, new in ((self.keys, key), (self.values, value)):
            kept.scatter_(2, slot.expand_as(new), new.to(kept.dtype))
        return self.keys, self.values


def _filled(x: Tensor, place: Tensor, slots: int) -> Tensor:
    """Slots of which the first have x, [B, g, S, d], at places [B, n]: [B, g, C, d]."""
    index = place[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return F.pad(x.gather(2, index), (0, 0, 0, slots - place.shape[1]))


class KVCache:
    """What all layers of a model remember of some sequences, each by its number.

    Heads are sharded over tensor, and so is the cache: a rank's layer has ``2 * B * C * K / tensor * d`` elements in
    the dtype of its activations, of K key/value heads of width d, with C the ``positions``, or the layer's window if
    that is shorter. Latent attention remembers the heads that it makes of latents, ``B * C * H / tensor * (n + r + c)``
    elements: they are sharded over tensor and attended to as any others, with adapters, where latents would be whole on
    every tensor rank and expanded in every step, or need products of another order than training's.

    Args:
        positions: of the longest sequence there will be, in tokens.
    """

    def __init__(self, positions: int) -> None:
        self.positions = positions
        self._layers: dict[int, LayerCache] = {}

    def layer(self, number: int) -> LayerCache:
        """What the layer of that number remembers, nothing at first."""
        return self._layers.setdefault(number, LayerCache(self.positions))

    @property
    def nbytes(self) -> int:
        """Bytes of it on this rank."""
        return sum(layer.nbytes for layer in self._layers.values())


@dataclass(frozen=True)
class CachedContext(Context):
    """Tokens that a cache remembers: those of all sequences lie one behind the other in one row, [1, T].

    So no padding is computed but where attention needs it, and sequence parallelism, which cuts the row over tensor,
    can cut a step of one token each; places at the end of the row fill it up to a multiple of the ranks.

    Args:
        cache: what came before, and these tokens as soon as a layer has seen them.
        lengths: [B], tokens of each sequence, these included.
        longest: of them, known to the host.
        even: they are all equal, as the host knows.
        source: [B, S], the place in the row of each sequence's tokens; its last one's again behind its end.
        places: [T], where in [B * S] what lies in each place of the row is.
        token_mask: [1, T], False for places that fill it up and for tokens of nobody; ``None``: there are none.
        layer: the number of the layer that this is for.
    """

    cache: KVCache
    lengths: Tensor
    longest: int
    even: bool
    source: Tensor
    places: Tensor
    token_mask: Tensor | None
    layer: int | None = None

    def of_layer(self, layer: int) -> Context:
        return replace(self, layer=layer)

    def pack(self, x: Tensor) -> Tensor:  # [1, T, D] -> [B, S, D]
        return x[0][self.source]

    def unpack(self, x: Tensor) -> Tensor:  # [B, S, D] -> [1, T, D]
        return x.flatten(0, 1)[self.places][None]

    def tables(self, rotary: Rotary, length: int, like: Tensor) -> RotaryTables:
        """Those of the tokens' positions in sequences as long as the longest."""
        return rotary.tables(self.longest, like, self.positions)

    @property
    @abstractmethod
    def positions(self) -> Tensor:
        """[B, S], of tokens in their sequences."""

    @abstractmethod
    def last(self, x: Tensor) -> Tensor:  # [1, T, D] -> [B, D]
        """Of what lies in the row, that of each sequence's last token."""

    def next(self, going: Tensor | None = None, parts: int = 1) -> NextTokens:
        """One more token of each sequence.

        Args:
            going: [B] boolean, False for sequences whose tokens are nobody's; ``None``: all are somebody's.
            parts: the row's length is a multiple of it.
        """
        sequences = len(self.lengths)
        place = torch.arange(-(-sequences // parts) * parts, device=self.lengths.device)
        mask = None
        if going is not None or len(place) > sequences:
            going = torch.ones_like(self.lengths, dtype=torch.bool) if going is None else going
            mask = F.pad(going, (0, len(place) - sequences))[None]
        source, places = place[:sequences, None], place.clamp(max=sequences - 1)
        return NextTokens(self.cache, self.lengths + 1, self.longest + 1, self.even, source, places, mask)

    def _layer(self) -> LayerCache:
        assert self.layer is not None, "a model gives each of its layers of_layer(number)"
        return self.cache.layer(self.layer)


class PromptTokens(CachedContext):
    """All tokens of some sequences, which fill an empty cache."""

    @classmethod
    def of(
        cls, cache: KVCache, lengths: Sequence[int], device: torch.device, are_real: bool = True, parts: int = 1
    ) -> PromptTokens:
        """Those of sequences of these lengths.

        Args:
            cache: is filled.
            lengths: of the sequences, in tokens, each at least 1.
            device: of the model.
            are_real: False where they are nobody's.
            parts: the row's length is a multiple of it.
        """
        own, longest, total = torch.tensor(lengths), max(lengths), sum(lengths)
        starts = torch.tensor([0, *accumulate(lengths)][:-1])
        within = torch.arange(longest)
        source = starts[:, None] + within.minimum(own[:, None] - 1)
        # Of each place of the row its sequence's, and its own in it.
        sequence = torch.arange(len(lengths)).repeat_interleave(own)
        places = F.pad(sequence * longest + torch.arange(total) - starts[sequence], (0, -total % parts))
        mask = None
        if len(places) > total or not are_real:
            mask = ((torch.arange(len(places)) < total) & are_real).to(device)[None]
        even = min(lengths) == longest
        return cls(cache, own.to(device), longest, even, source.to(device), places.to(device), mask)

    @property
    def positions(self) -> Tensor:
        return torch.arange(self.longest, device=self.lengths.device)[None]

    def last(self, x: Tensor) -> Tensor:  # [1, T, D] -> [B, D]
        return x[0][self.source[:, -1]]

    def attend(
        self,
        scores: AttentionScores,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout: float = 0.0,
        sinks: Tensor | None = None,
    ) -> Tensor:
        self._layer().fill(key, value, self.lengths, scores.window)
        return scores.attend(query, key, value, None, True, dropout, sinks)


class NextTokens(CachedContext):
    """One token of each sequence, which sees those that the cache remembers."""

    @property
    def positions(self) -> Tensor:
        return self.lengths[:, None] - 1

    def last(self, x: Tensor) -> Tensor:  # [1, T, D] -> [B, D]
        return x[0, : len(self.lengths)]

    def attend(
        self,
        scores: AttentionScores,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout: float = 0.0,
        sinks: Tensor | None = None,
    ) -> Tensor:
        keys, values = self._layer().add(key, value, self.positions)
        used = min(self.longest, keys.shape[2])
        visible = None
        if not self.even:  # slots that a shorter sequence has not come to
            visible = torch.arange(used, device=key.device) < self.lengths[:, None]
        return scores.attend_last(query.to(keys.dtype), keys[:, :, :used], values[:, :, :used], visible, sinks)
