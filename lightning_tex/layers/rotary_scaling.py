"""Rotary embeddings stretched over sequences longer than those that a model was trained on: one class for each way."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from lightning_tex.parallel.errors import UserValueError

# d width that turns, L length of the sequence


class RotaryScaling(ABC):
    """Changes the rates by which pairs turn, and the size of what has turned."""

    @abstractmethod
    def rates(self, rates: Tensor, base: float, length: int) -> Tensor:
        """Radians per position of each pair: [d/2] -> [d/2].

        Args:
            rates: base^(-2i/d).
            base: of the wavelengths.
            length: L.
        """

    def table_factor(self, length: int) -> float:
        """What cosines and sines of a sequence of that length are multiplied with."""
        return 1.0

    @property
    def score_factor(self) -> float:
        """What latent attention's scores are multiplied with besides."""
        return 1.0

    def turns_anew(self, length: int) -> bool:
        """Whether a sequence that grows to that length has to turn the keys of all its tokens anew."""
        return False


@dataclass(frozen=True)
class LinearScaling(RotaryScaling):
    """Positions are divided by a factor (position interpolation, arXiv 2306.15595)."""

    factor: float

    def rates(self, rates: Tensor, base: float, length: int) -> Tensor:
        return rates / self.factor


@dataclass(frozen=True)
class DynamicScaling(RotaryScaling):
    """The base grows with a sequence that is longer than the original ones (dynamic NTK)."""

    factor: float
    original_max_position_embeddings: int

    def rates(self, rates: Tensor, base: float, length: int) -> Tensor:
        original, width = self.original_max_position_embeddings, 2 * len(rates)
        if length <= original or width == 2:
            return rates
        growth = (self.factor * length / original - (self.factor - 1)) ** (width / (width - 2))
        return rates * growth ** (-torch.arange(len(rates), device=rates.device, dtype=rates.dtype) * 2 / width)


@dataclass(frozen=True)
class Llama3Scaling(RotaryScaling):
    """Long waves are stretched, short ones are not, with a ramp between (Llama 3.1)."""

    factor: float
    original_max_position_embeddings: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def rates(self, rates: Tensor, base: float, length: int) -> Tensor:
        turns = rates * self.original_max_position_embeddings / (2 * math.pi)
        kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return kept * rates + (1 - kept) * rates / self.factor


@dataclass(frozen=True)
class YarnScaling(RotaryScaling):
    """Pairs that turn seldom are stretched, those that turn often are not (YaRN, arXiv 2309.00071).

    ``attention_factor`` multiplies the tables; left out it is 0.1 ln(factor) + 1, and with ``mscale`` and
    ``mscale_all_dim`` the ratio of that with either before the logarithm. ``truncate``: the ramp between
    ``beta_fast`` and ``beta_slow`` turns begins and ends at whole pairs.
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def rates(self, rates: Tensor, base: float, length: int) -> Tensor:
        low, high = (self._pair(turns, base, 2 * len(rates)) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * len(rates) - 1)
        pairs = torch.arange(len(rates), device=rates.device, dtype=rates.dtype)
        stretched = ((pairs - low) / (high - low if high > low else 0.001)).clamp(0, 1)
        return rates * (1 - stretched) + rates / self.factor * stretched

    def _pair(self, turns: float, base: float, width: int) -> float:
        """The pair that turns so often over the original length."""
        return width * math.log(self.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(base))

    def table_factor(self, length: int) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._magnitude(self.mscale) / self._magnitude(self.mscale_all_dim)
        return self._magnitude(1.0)

    @property
    def score_factor(self) -> float:
        return self._magnitude(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def _magnitude(self, scale: float) -> float:
        return 0.1 * scale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


@dataclass(frozen=True)
class LongRopeScaling(RotaryScaling):
    """Each pair is stretched by a number of its own, one list for short and one for long sequences (arXiv 2402.13753).

    ``short_factor``, ``long_factor``: [d/2] each, the second beyond ``original_max_position_embeddings`` tokens.
    ``attention_factor`` multiplies the tables; left out it is sqrt(1 + ln(factor) / ln(original length)). In its place
    may be ``short_mscale`` and ``long_mscale``, one for short and one for long sequences (Phi-MoE).
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    factor: float = 1.0
    attention_factor: float | None = None
    short_mscale: float | None = None
    long_mscale: float | None = None

    def rates(self, rates: Tensor, base: float, length: int) -> Tensor:
        factors = self.long_factor if self._is_long(length) else self.short_factor
        if len(factors) != len(rates):
            raise UserValueError(f"longrope has {len(factors)} factors; legal: one for each of {len(rates)} pairs")
        return rates / torch.tensor(factors, device=rates.device, dtype=rates.dtype)

    def table_factor(self, length: int) -> float:
        of_length = self.long_mscale if self._is_long(length) else self.short_mscale
        if of_length is not None:
            return of_length
        if self.attention_factor is not None:
            return self.attention_factor
        if self.factor <= 1:
            return 1.0
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_max_position_embeddings))

    def turns_anew(self, length: int) -> bool:
        return length == self.original_max_position_embeddings + 1

    def _is_long(self, length: int) -> bool:
        return length > self.original_max_position_embeddings


SCALINGS: dict[str, type[RotaryScaling]] = {
    "linear": LinearScaling,
    "dynamic": DynamicScaling,
    "llama3": Llama3Scaling,
    "yarn": YarnScaling,
    "longrope": LongRopeScaling,
}


def make_scaling(given: Mapping[str, Any] | None) -> RotaryScaling | None:
    """The scaling of a mapping as published configurations have it: ``rope_type``, and that one's numbers.

    Raises:
        ValueError: an unknown type, unknown numbers, or some that are missing.
    """
    if given is None:
        return None
    numbers = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    name = numbers.pop("rope_type", None)
    if name not in SCALINGS:
        raise UserValueError(f"rope_scaling has rope_type={name!r}; legal: {', '.join(map(repr, SCALINGS))}")
    known = fields(SCALINGS[name])  # type: ignore[arg-type]
    needed = [field.name for field in known if field.default is MISSING]
    wrong = [f"unknown {one}" for one in numbers if one not in {field.name for field in known}]
    wrong += [f"no {one}" for one in needed if one not in numbers]
    if wrong:
        legal = ", ".join(field.name + ("" if field.name in needed else " (optional)") for field in known)
        raise UserValueError(f"rope_scaling of rope_type={name!r} has {', '.join(wrong)}; legal: {legal}")
    return SCALINGS[name](**numbers)
