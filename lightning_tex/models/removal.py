"""Fewer experts of a model that is trained already: those that are named, or that nobody chose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from lightning_tex.models.config import DecoderConfig
from lightning_tex.models.growth import (
    Change,
    Growth,
    blocks_with_experts,
    capacity_differences,
    groups_of,
    router_differences,
    router_of,
)
from lightning_tex.moe import SigmoidRouter
from lightning_tex.parallel.errors import UserValueError


@dataclass(frozen=True)
class Remove(Growth):
    """Experts fewer.

    Args:
        gone: which, of every block; or by block, as many of each.
    """

    gone: Mapping[int, Sequence[int]] | Sequence[int]

    def sizes(self, old: DecoderConfig) -> tuple[int, int, int]:
        gone, groups = self._by_block(old), groups_of(old)
        if wrong := [e for experts in gone.values() for e in experts if not 0 <= e < old.num_experts]:
            raise UserValueError(
                f"remove names expert {wrong[0]} of num_experts={old.num_experts}; legal: 0 to {old.num_experts - 1}"
            )
        if wrong := [block for block in gone if block not in blocks_with_experts(old)]:
            legal = ", ".join(map(str, blocks_with_experts(old)))
            raise UserValueError(f"remove names block {wrong[0]}; legal, those with experts: {legal}")
        numbers = {
            block: [sum(e in group for e in set(gone.get(block, ()))) for group in groups]
            for block in blocks_with_experts(old)
        }
        if len(set(chain.from_iterable(numbers.values()))) != 1:
            told = "; ".join(f"block {block}: {', '.join(map(str, counts))}" for block, counts in numbers.items())
            raise UserValueError(
                f"remove takes these numbers of experts, by group: {told}; legal: as many of every block and group"
            )
        number = sum(next(iter(numbers.values())))
        least = max(old.top_k, 2)
        if old.num_experts - number < least:
            raise UserValueError(
                f"remove leaves {old.num_experts - number} of num_experts={old.num_experts}, with top_k={old.top_k}; "
                f"legal: at most {old.num_experts - least} fewer"
            )
        return old.num_experts - number, old.top_k, 1

    def change(self, old: DecoderConfig, block: int) -> Change:
        gone = set(self._by_block(old)[block])
        return Change([e for e in range(old.num_experts) if e not in gone])

    def _by_block(self, old: DecoderConfig) -> Mapping[int, Sequence[int]]:
        return self.gone if isinstance(self.gone, Mapping) else dict.fromkeys(blocks_with_experts(old), self.gone)

    def differences(self, old: DecoderConfig) -> Iterator[str]:
        router = router_of(old)
        yield from router_differences(router, "whether it needs those that are gone is not known")
        if router.experts_choose:
            yield "experts choose more tokens each, as there are fewer"
        elif not isinstance(router, SigmoidRouter) and not router.norm_topk_prob:
            yield "norm_topk_prob=False: scores of those that are gone go to the others"
        yield from capacity_differences(old)


def dead_experts(counts: Mapping[int, Sequence[float]]) -> dict[int, list[int]]:
    """By block, those that nobody chose: as many of each block as of the one with the fewest.

    Args:
        counts: by block, choices of each expert.

    Raises:
        ValueError: a block has none.
    """
    dead = {block: [e for e, n in enumerate(of_experts) if n == 0] for block, of_experts in counts.items()}
    least = min(map(len, dead.values()), default=0)
    if not least:
        told = ", ".join(f"block {block}: {len(experts)}" for block, experts in dead.items())
        raise UserValueError(
            f"remove_dead finds no expert to remove in every block, and all blocks have as many ({told}); legal: "
            "remove, which names experts"
        )
    return {block: experts[:least] for block, experts in dead.items()}
