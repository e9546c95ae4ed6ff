"""More or fewer experts of a model that is trained already: what each new one is of, and whether logits stay equal."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch

from lightning_tex.models.config import DecoderConfig
from lightning_tex.moe import (
    ExpertChoiceRouter,
    GShardRouter,
    Router,
    SigmoidRouter,
    SinkhornRouter,
    SoftmaxRouter,
    SwitchRouter,
)
from lightning_tex.moe.routers import make_router
from lightning_tex.parallel.errors import UserValueError

# E experts, k choices per token, s experts that one becomes

# Of which it is known how weights are shared among experts that are alike.
_KNOWN = (SoftmaxRouter, SwitchRouter, GShardRouter, SinkhornRouter, SigmoidRouter, ExpertChoiceRouter)


@dataclass(frozen=True)
class Change:
    """One layer's new experts.

    Args:
        sources: the old expert that each is of.
        parts: an old expert's hidden units are cut into so many; expert i has part i % parts.
        weight: an old expert's output counts so many times among the new ones that are of it.
        added: new experts that are not to be chosen yet, where a router has a bias that decides alone.
    """

    sources: Sequence[int]
    parts: int = 1
    weight: float = 1.0
    added: frozenset[int] = frozenset()

    def is_copy(self, number: int) -> bool:
        """Whether a new expert is what one before it is already."""
        return self.parts == 1 and self.sources[number] in self.sources[:number]


class Growth(ABC):
    """How a model's experts change, in every layer that has some.

    ``noise``: standard deviation of what is added to the weights of copies, relative to theirs.
    """

    noise: float = 0.0

    @abstractmethod
    def sizes(self, old: DecoderConfig) -> tuple[int, int, int]:
        """Experts, choices of a token, and parts of an old expert's hidden units.

        Raises:
            ValueError: numbers that are not legal.
        """

    @abstractmethod
    def change(self, old: DecoderConfig, block: int) -> Change:
        """Of one block's layer."""

    @abstractmethod
    def differences(self, old: DecoderConfig) -> Iterator[str]:
        """Why logits do not stay equal but for rounding; none: they do."""

    def config(self, old: DecoderConfig) -> DecoderConfig:
        """Of the new model.

        Raises:
            ValueError: numbers that are not legal.
        """
        if not router_of(old).learned:
            raise UserValueError(
                f"router={old.router!r} chooses by no weights, and other numbers of experts are other choices; "
                "legal: a router that is learned"
            )
        if old.zero_experts or old.identity_experts:
            raise UserValueError(
                f"zero_experts={old.zero_experts}, identity_experts={old.identity_experts}: rows of the router behind "
                "those of experts that compute; legal: 0 and 0"
            )
        experts, top_k, parts = self.sizes(old)
        new = replace(old, num_experts=experts, top_k=top_k)
        if parts > 1:
            new = replace(new, expert_hidden_dim=old.expert_hidden // parts)
        router_of(new)
        return new


def router_of(config: DecoderConfig) -> Router:
    """A router of a decoder, without values.

    Raises:
        ValueError: sizes that it cannot have.
    """
    c = config
    with torch.device("meta"):
        return make_router(c.router, c.dim, c.num_experts, c.top_k, c.norm_topk_prob)


def groups_of(config: DecoderConfig) -> list[range]:
    """Experts by group; one where there are none."""
    limit = router_of(config).groups
    size = config.num_experts // (1 if limit is None else limit.n_group)
    return [range(start, start + size) for start in range(0, config.num_experts, size)]


@dataclass(frozen=True)
class Split(Growth):
    """Every expert becomes s, with its row of the router.

    Copies are chosen together, as they are alike: a token uses s times as many, whose weights are its old one's. The
    parts of one that is cut likewise, with outputs multiplied by s, so that nothing costs more than before.

    Args:
        into: s.
        granular: cut each into s parts of its hidden units (DeepSeekMoE, arXiv 2401.06066, section 3.1); else s copies.
        top_k: of the new model; ``None``: s k, or 1 of a router that always chooses one.
        noise: that makes copies differ.
    """

    into: int
    granular: bool = False
    top_k: int | None = None
    noise: float = 0.0

    def sizes(self, old: DecoderConfig) -> tuple[int, int, int]:
        parts = self.into if self.granular else 1
        if self.into < 2:
            raise UserValueError(f"split={self.into}; legal: at least 2")
        if self.granular and (old.expert_module or old.expert_hidden % self.into):
            raise UserValueError(
                f"split={self.into} with granular=True of experts of {old.expert_module or old.expert_hidden} hidden "
                "units; legal: MLPs, and a divisor of their hidden units, or granular=False"
            )
        if self.granular and self._top_k(old) != self.into * old.top_k:
            raise UserValueError(f"top_k={self.top_k} with granular=True; legal: {self.into * old.top_k}, all parts")
        if self.granular and self.noise:
            raise UserValueError(f"noise={self.noise} with granular=True, whose parts differ by themselves; legal: 0")
        return self.into * old.num_experts, self._top_k(old), parts

    def change(self, old: DecoderConfig, block: int) -> Change:
        sources = list(chain.from_iterable([e] * self.into for e in range(old.num_experts)))
        return Change(sources, self.into if self.granular else 1, self._weight(old))

    def differences(self, old: DecoderConfig) -> Iterator[str]:
        router, top_k = router_of(old), self._top_k(old)
        together = top_k == self.into * old.top_k
        one_of_one = top_k == old.top_k == 1 and not router.experts_choose
        yield from router_differences(router, "how it weighs experts that are alike is not known")
        if not together and not one_of_one:
            yield f"top_k={top_k} of {self.into * old.num_experts}: copies of one expert take the places of others"
        if not together and old.capacity_factor is not None:
            yield f"capacity_factor={old.capacity_factor}: all choose the first copy, whose capacity is smaller"
        if router.groups is not None and router.groups.group_score == "top2_sum":
            yield "group_score='top2_sum': a group's best two are copies of one"
        if self.noise:
            yield f"noise={self.noise}"
        if old.expert_module is not None and self._weight(old) != 1:
            yield f"outputs of expert_module={old.expert_module} are not multiplied by {self._weight(old):g}"

    def _top_k(self, old: DecoderConfig) -> int:
        if self.top_k is not None:
            return self.top_k
        return 1 if isinstance(router_of(old), SwitchRouter) else self.into * old.top_k

    def _weight(self, old: DecoderConfig) -> float:
        router, share = router_of(old), old.top_k / self._top_k(old)
        if router.norm_topk_prob:
            return 1.0
        # A softmax is shared among copies; of a sigmoid each has the whole.
        return share if isinstance(router, SigmoidRouter) else self.into * share


@dataclass(frozen=True)
class Add(Growth):
    """Experts more, each a copy of an old one; they stand behind the others of their group.

    Args:
        count: how many.
        like: by block, the old experts in the order in which they are copied, such as by their load; ``None``: theirs.
        noise: that the new ones are given.
    """

    count: int
    like: Mapping[int, Sequence[int]] | None = None
    noise: float = 0.0

    def sizes(self, old: DecoderConfig) -> tuple[int, int, int]:
        groups = groups_of(old)
        if self.count < 1 or self.count % len(groups) or self.count > old.num_experts:
            raise UserValueError(
                f"add={self.count} to num_experts={old.num_experts} in {len(groups)} groups; legal: 1 to "
                f"{old.num_experts}, the same number for each group"
            )
        return old.num_experts + self.count, old.top_k, 1

    def change(self, old: DecoderConfig, block: int) -> Change:
        groups, sources, added = groups_of(old), list[int](), set[int]()
        order = list(range(old.num_experts)) if self.like is None else self.like[block]
        for group in groups:
            sources += group
            first = len(sources)
            sources += [e for e in order if e in group][: self.count // len(groups)]
            added |= set(range(first, len(sources)))
        return Change(sources, added=frozenset(added))

    def differences(self, old: DecoderConfig) -> Iterator[str]:
        router = router_of(old)
        yield from router_differences(router, "whether it chooses a copy is not known")
        first_of_alike = old.top_k == 1 and router.norm_topk_prob
        if not isinstance(router, SigmoidRouter) and not (first_of_alike and not router.experts_choose):
            yield f"top_k={old.top_k}, norm_topk_prob={router.norm_topk_prob}: copies take a share"
        yield from capacity_differences(old)
        if self.noise and not isinstance(router, SigmoidRouter):
            yield f"noise={self.noise}"


def blocks_with_experts(config: DecoderConfig) -> list[int]:
    """Numbers of the blocks that have some."""
    return [layer for layer in range(config.num_layers) if config.has_experts(layer)]


def router_differences(router: Router, unknown: str) -> Iterator[str]:
    """That of a router which is not known.

    Args:
        unknown: of it.
    """
    if type(router) not in _KNOWN:
        yield f"router {type(router).__name__}: {unknown}"


def capacity_differences(old: DecoderConfig) -> Iterator[str]:
    """That of another number of experts, with a capacity."""
    if old.capacity_factor is not None:
        yield f"capacity_factor={old.capacity_factor}: an expert's capacity is another"
