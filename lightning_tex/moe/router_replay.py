"""Decisions of routers, recorded in one forward and given again in another: of other weights, precision or layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tex.moe.router import Router
from lightning_tex.moe.tokens import Tokens
from lightning_tex.parallel.collectives import all_gather
from lightning_tex.parallel.errors import UserRuntimeError, UserValueError
from lightning_tex.parallel.replay import recomputing
from lightning_tex.parallel.topology import Axis

# B sequences of S positions, s of them held here, E experts, n numbers that are decided for a token

# One forward's decisions by name: [B, s, n].
Forward = dict[str, Tensor]


@dataclass
class RouterDecisions:
    """What the routers of a model have decided, forward by forward, in the smallest whole numbers that hold it.

    Plain tensors in dicts and lists: ``torch.save(vars(decisions))``, and ``RouterDecisions(**torch.load(..))``.

    Args:
        forwards: by a router's name in its model, in their order.
        num_experts: E by the same names.
        whole: of all ranks' tokens, which any layout takes; else of this rank's.
    """

    forwards: dict[str, list[Forward]] = field(default_factory=dict)
    num_experts: dict[str, int] = field(default_factory=dict)
    whole: bool = False

    def to(self, device: torch.device | str) -> RouterDecisions:
        """The same on a device."""
        return self._each(lambda _, decision: decision.to(device))

    @property
    def nbytes(self) -> int:
        """Of all of them."""
        return sum(d.nbytes for forwards in self.forwards.values() for one in forwards for d in one.values())

    def _each(self, change: Callable[[str, Tensor], Tensor], whole: bool | None = None) -> RouterDecisions:
        forwards = {
            name: [{what: change(name, decision) for what, decision in one.items()} for one in of_layer]
            for name, of_layer in self.forwards.items()
        }
        return RouterDecisions(forwards, dict(self.num_experts), self.whole if whole is None else whole)


class RouterReplay:
    """Records what a model's routers decide, and makes them decide so again.

    Experts are those of the record; scores, weights and their gradients are those of the forward that is run, as are
    losses, and what overflows a capacity follows from the choices. A recomputation of strategy ``tex_moe`` is part of
    its forward. Tokens must stand where they stood when they were recorded.

    Args:
        model: its routers, whose names decisions are kept by, decide through :meth:`Router.decide`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._routers = {name: each for name, each in model.named_modules() if isinstance(each, Router)}

    @contextmanager
    def record(self) -> Iterator[RouterDecisions]:
        """Inside, every forward's decisions are added to what is given: of this rank's tokens.

        Raises:
            RuntimeError: at the end, a router that was run and has decided nothing through :meth:`Router.decide`.
        """
        found = RouterDecisions()
        for name, router in self._routers.items():
            found.forwards[name], found.num_experts[name] = [], router.num_experts
        with self._sources({name: _Recorder(name, found.forwards[name]) for name in self._routers}):
            yield found
        if silent := [name for name, forwards in found.forwards.items() if not all(forwards)]:
            raise UserRuntimeError(
                f"router {', '.join(silent)} decides by itself, and nothing was recorded; legal: a router that decides "
                "through Router.decide, as all do that do not define forward"
            )

    @contextmanager
    def give(self, decisions: RouterDecisions) -> Iterator[None]:
        """Inside, forwards decide as those that were recorded, the first as the first.

        Args:
            decisions: of this rank's tokens, or of all (:meth:`whole`), of which each rank takes its own.

        Raises:
            ValueError: decisions of other layers or of other numbers of experts or tokens.
            RuntimeError: more forwards than there are decisions of.
        """
        if {name: each.num_experts for name, each in self._routers.items()} != decisions.num_experts:
            raise UserValueError(
                f"decisions of routers with so many experts: {decisions.num_experts}; the model has "
                f"{ {name: each.num_experts for name, each in self._routers.items()} }; legal: the same ones"
            )
        forwards = decisions.forwards.items()
        with self._sources({name: _Giver(name, each, decisions.whole) for name, each in forwards}):
            yield

    def whole(self, decisions: RouterDecisions) -> RouterDecisions:
        """Decisions of all ranks' tokens, on every rank, which any layout takes. Collective over tensor and data."""

        def gathered(name: str, own: Tensor) -> Tensor:
            router = self._routers[name]
            of_sequences = all_gather(own, 1, router.activation_layout.shard_axis)
            return all_gather(of_sequences, 0, router.data, _sizes(len(own), router.data, own.device))

        return decisions if decisions.whole else decisions._each(gathered, whole=True)

    @contextmanager
    def _sources(self, sources: dict[str, _Source]) -> Iterator[None]:
        hooks = []
        try:
            for name, source in sources.items():
                router = self._routers[name]
                if router.source is not None:
                    raise UserRuntimeError(f"{name} is being recorded or given decisions already; legal: one at a time")
                router.source = source.decide
                hooks.append(router.register_forward_pre_hook(source.begins, with_kwargs=True))
            yield
        finally:
            for name in list(sources)[: len(hooks)]:
                self._routers[name].source = None
            for hook in hooks:
                hook.remove()


class _Source:
    """Of one router's decisions: what is asked instead of the router.

    Args:
        name: of the router.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def begins(self, router: Any, given: tuple[Any, ...], further: dict[str, Any]) -> None:
        """A forward of the router."""
        if not recomputing():
            tokens = given[1] if len(given) > 1 else further.get("tokens")
            self.router, self.sequences = router, tokens.sequences if isinstance(tokens, Tokens) else 1
            self.count = len(given[0])
            self.next_forward()

    def next_forward(self) -> None:
        raise NotImplementedError

    def decide(self, what: str, choose: Callable[[], Tensor]) -> Tensor:
        """What the router decides."""
        if recomputing():
            raise UserRuntimeError(
                f"{self.name} decides again in a recomputation; legal with RouterReplay: activation_checkpointing of "
                "TexMoEStrategy, which decides once"
            )
        return self.decided(what, choose)

    def decided(self, what: str, choose: Callable[[], Tensor]) -> Tensor:
        raise NotImplementedError


class _Recorder(_Source):
    def __init__(self, name: str, forwards: list[Forward]) -> None:
        super().__init__(name)
        self.forwards = forwards

    def next_forward(self) -> None:
        self.forwards.append({})

    def decided(self, what: str, choose: Callable[[], Tensor]) -> Tensor:
        decision = choose()
        shape = self.sequences, self.count // max(self.sequences, 1), decision.shape[1]
        self.forwards[-1][what] = _compact(decision, self.router.num_experts).view(shape)
        return decision


class _Giver(_Source):
    def __init__(self, name: str, forwards: list[Forward], whole: bool) -> None:
        super().__init__(name)
        self.forwards, self.whole, self.number = forwards, whole, -1

    def next_forward(self) -> None:
        self.number += 1
        if self.number >= len(self.forwards):
            raise UserRuntimeError(
                f"{self.name} is run for the {self.number + 1}. time, and decisions are of {len(self.forwards)} "
                "forwards; legal: as many"
            )

    def decided(self, what: str, choose: Callable[[], Tensor]) -> Tensor:
        decision = self.forwards[self.number].get(what)
        if decision is None:
            return choose()
        if self.whole:
            shard, data = self.router.activation_layout.shard_axis, self.router.data
            decision = _part(decision, 0, data)
            decision = _part(decision, 1, shard)
        if decision.shape[:2].numel() != self.count:
            raise UserValueError(
                f"{self.name} decides for {self.count} tokens, and those recorded are of {list(decision.shape[:2])} "
                "sequences and positions; legal: the same tokens"
            )
        flat = decision.flatten(0, 1)
        return flat if flat.dtype == torch.bool else flat.long()


def _compact(decision: Tensor, num_experts: int) -> Tensor:
    """In the smallest dtype that holds 0 to E."""
    if decision.dtype == torch.bool:
        return decision.clone()
    dtypes = (torch.uint8, torch.int16, torch.int32)
    return decision.to(next(dtype for dtype in dtypes if num_experts <= torch.iinfo(dtype).max))


def _part(decision: Tensor, dim: int, axis: Axis) -> Tensor:
    """This rank's of equal consecutive shares."""
    share = decision.shape[dim] // axis.size
    return decision.narrow(dim, axis.rank * share, share)


def _sizes(own: int, axis: Axis, device: torch.device) -> list[int]:
    return all_gather(torch.tensor([own], device=device), 0, axis).tolist()
