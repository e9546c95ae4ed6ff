"""Ranks agreeing on batches: the same batch over tensor, and no rank left waiting when another runs out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence, Sized
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DistributedSampler

from lightning_tex.parallel import collectives
from lightning_tex.parallel.errors import UserRuntimeError
from lightning_tex.parallel.topology import Axis
from lightning_tex.resilience.agreement import rank_list
from lightning_tex.resilience.star import current_star
from lightning_tex.resilience.vote import Vote


def gather_numbers(numbers: list[int], host: Axis) -> list[list[int]]:
    """Every rank's few integers, by rank; collective.

    Args:
        numbers: of this rank.
        host: all ranks over the host's network, so that no device is waited for.
    """
    return collectives.all_gather(torch.tensor([numbers]), 0, host).tolist()


# What is known of a loader on every rank: -1 where it is not.
_TRAITS = ("number of batches", "batch_size", "number of samples in the whole data set")


def _lengths(loader: Any, limit: float, host: Axis) -> list[int]:
    """Every rank's number of batches, -1 where it is not known; collective. Warns of loaders that differ otherwise."""
    lengths, *others = zip(*gather_numbers(_traits(loader, limit), host), strict=True)
    for trait, numbers in zip(_TRAITS[1:], others, strict=True):
        if len(set(numbers)) > 1:
            values = [str(n) if n >= 0 else "not known" for n in numbers]
            held = [(rank_list(r for r, v in enumerate(values) if v == value), value) for value in sorted(set(values))]
            rank_zero_warn(
                f"Ranks' data loaders differ: {trait} is {' and '.join(f'{value} on {who}' for who, value in held)}"
            )
    return list(lengths)


def _traits(loader: Any, limit: float) -> list[int]:
    try:
        length = int(min(len(loader), limit))
    except (TypeError, NotImplementedError):
        length = -1
    batch_size, sampler = getattr(loader, "batch_size", None), getattr(loader, "sampler", None)
    # Without such a sampler, ranks may have data sets of their own.
    samples = len(loader.dataset) if isinstance(sampler, DistributedSampler) else -1
    return [length, batch_size if isinstance(batch_size, int) else -1, samples]


def evaluation_loader(loader: Any, limit: float, host: Axis) -> Any:
    """An evaluation loader that refuses, on all ranks, to leave some of them without any batch to repeat.

    Args:
        loader: this rank's.
        limit: batches that are asked of it.
        host: all ranks.
    """
    lengths = _lengths(loader, limit, host)
    if min(lengths) < 0:
        return _BeginTogether(loader, host)
    _require_batches([n > 0 for n in lengths])
    return loader


def require_equal_lengths(loaders: Sequence[Any], limits: Sequence[float], host: Axis) -> None:
    """Refuse evaluation loaders that come one after another and that ranks would leave at different times; collective.

    Args:
        loaders: all but the last, with which the evaluation ends.
        limits: batches that are asked of each.
        host: all ranks.

    Raises:
        RuntimeError: naming the loader and the numbers by rank.
    """
    own = [_traits(loader, limit)[0] for loader, limit in zip(loaders, limits, strict=True)]
    for number, lengths in enumerate(zip(*gather_numbers(own, host), strict=True)):
        if len({length for length in lengths if length >= 0}) > 1:
            raise UserRuntimeError(
                f"evaluation data loader {number} of {len(loaders) + 1} has {', '.join(map(str, lengths))} batches on "
                "ranks 0, 1, ..: they would be in different loaders, and wait for one another for ever. Use one "
                "loader, or equal lengths (the last one may be unequal)"
            )


def _require_batches(has: list[bool]) -> None:
    if any(has) and not all(has):
        without = ", ".join(str(rank) for rank, some in enumerate(has) if not some)
        raise UserRuntimeError(
            f"rank(s) {without} have no batch to evaluate while others have; give every rank at least one "
            "(ranks with fewer batches than others are fine)"
        )


def agreed_loader(loader: Any, limit: float, host: Axis) -> Any:
    """A training loader that ends on all ranks when it ends on the first one; ``loader`` itself if lengths agree.

    Args:
        loader: this rank's.
        limit: batches that are asked of it.
        host: all ranks.
    """
    lengths = _lengths(loader, limit, host)
    if min(lengths) < 0:
        return _EndTogether(loader, host)
    if min(lengths) == max(lengths):
        return loader
    rank_zero_warn(
        f"The training data loader has {min(lengths)} batches on rank {lengths.index(min(lengths))} and {max(lengths)} "
        f"on rank {lengths.index(max(lengths))}; every epoch ends after {min(lengths)}."
    )
    return _Shortened(loader, min(lengths))


class _Wrapped:
    """A loader that shows everything of the one inside."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # while unpickling
            raise AttributeError(name)
        return getattr(self.loader, name)


class _Shortened(_Wrapped):
    def __init__(self, loader: Sized, length: int) -> None:
        super().__init__(loader)
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        for _, batch in zip(range(self.length), self.loader, strict=False):
            yield batch


class _Agreeing(_Wrapped):
    def __init__(self, loader: Any, host: Axis) -> None:
        super().__init__(loader)
        self.host = host


class _BeginTogether(_Agreeing):
    def __iter__(self) -> Iterator[Any]:
        nothing = object()
        batches = iter(self.loader)
        first = next(batches, nothing)
        _require_batches([bool(n) for (n,) in gather_numbers([first is not nothing], self.host)])
        if first is not nothing:
            yield first
            yield from batches


class _EndTogether(_Agreeing):
    def __iter__(self) -> Iterator[Any]:
        nothing = object()
        batches = iter(self.loader)
        vote = Vote(self.host, current_star())
        while True:
            batch = next(batches, nothing)
            ended, goes_on = vote.highest(batch is nothing, batch is not nothing)
            if ended.number:
                if goes_on.number:
                    rank_zero_warn(f"The training data of rank {ended.rank} ended first; the epoch ends for all.")
                return
            yield batch


def fingerprint(batch: Any) -> int:
    """A 62-bit number that depends on all tensors of a batch."""
    digest = hashlib.blake2b(digest_size=8)

    def add(tensor: Tensor) -> Tensor:
        digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return tensor

    apply_to_collection(batch, Tensor, add)
    return int.from_bytes(digest.digest(), "little") >> 2


def require_same_batch(batch: Any, tensor: Axis, host: Axis) -> None:
    """Refuse batches that differ over the tensor axis; collective, and raised on every rank of the world.

    Raises:
        RuntimeError: naming the ranks and the remedy.
    """
    prints = [n for (n,) in gather_numbers([fingerprint(batch)], host)]
    odd = [rank for rank in tensor.ranks if prints[rank] != prints[tensor.ranks[0]]]
    first_odd = [n for (n,) in gather_numbers([odd[0] if odd else -1], host)]
    wrong = sorted({n for n in first_odd if n >= 0})
    if wrong:
        raise UserRuntimeError(
            f"Ranks of one tensor group must see the same batch, but rank(s) {', '.join(map(str, wrong))} got another "
            "batch than their group's first rank. Give data loaders a sampler over the data axis "
            "(num_replicas, rank = trainer.distributed_sampler_kwargs), let Lightning add it "
            "(use_distributed_sampler=True), and seed random transforms with seed_everything(seed, workers=True)"
        )
