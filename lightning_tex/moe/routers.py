"""The routers that a MoE layer knows by name, and how one is named: with its arguments, as a class, or as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_tex.moe.expert_choice import ExpertChoiceRouter
from lightning_tex.moe.hash_router import HashRouter
from lightning_tex.moe.named import class_named, plain_choice, taken_apart
from lightning_tex.moe.router import Router
from lightning_tex.moe.sigmoid_router import SigmoidRouter
from lightning_tex.moe.sinkhorn import SinkhornRouter
from lightning_tex.moe.softmax_routers import (
    ForcedBalanceRouter,
    GShardRouter,
    SoftmaxRouter,
    SparseMixerRouter,
    SwitchRouter,
)
from lightning_tex.parallel.errors import UserTypeError, UserValueError

# A name; a name with arguments, {"name": .., "init_args": {..}}; a class; or an instance.
RouterChoice = str | Mapping[str, Any] | Router | type[Router]


ROUTERS: dict[str, type[Router]] = {
    "softmax": SoftmaxRouter,
    "sigmoid": SigmoidRouter,
    "switch": SwitchRouter,
    "gshard": GShardRouter,
    "sparsemixer": SparseMixerRouter,
    "sinkhorn": SinkhornRouter,
    "hash": HashRouter,
    "expert_choice": ExpertChoiceRouter,
    "forced_balance": ForcedBalanceRouter,
}


def make_router(router: RouterChoice, dim: int, num_experts: int, top_k: int, norm: bool) -> Router:
    """The router a user asked for by name, class or instance.

    Raises:
        ValueError: unknown name, arguments that it does not have, or an instance made for other sizes.
    """
    if isinstance(router, Router):
        if (router.dim, router.num_experts, router.top_k) != (dim, num_experts, top_k):
            raise UserValueError(
                f"router is made for dim={router.dim}, num_experts={router.num_experts}, top_k={router.top_k}; "
                f"the MoE layer has dim={dim}, num_experts={num_experts}, top_k={top_k}"
            )
        return router
    named, given = taken_apart(router, "router")
    kind = _named(named) if isinstance(named, str) else named
    try:
        return kind(dim, num_experts, top_k, norm, **given)
    except TypeError as error:
        raise UserTypeError(f"router {kind.__name__}: {error}") from error


def plain_router(router: RouterChoice) -> str | dict[str, Any]:
    """A choice as plain values, which files hold and every layer makes a router of its own from.

    Raises:
        ValueError: an instance, or a class without an import path.
    """
    return plain_choice(router, "router", " (an instance belongs to one layer: MoE(router=..))")


def _named(name: str) -> type[Router]:
    """A router of :data:`ROUTERS`, or a class by the path of its module."""
    if name in ROUTERS:
        return ROUTERS[name]
    kind = class_named(name, Router)  # type: ignore[type-abstract]
    if kind is not None:
        return kind
    known = ", ".join(map(repr, ROUTERS))
    raise UserValueError(f"router={name!r}; legal: {known}, or a Router class, its import path, or an instance")
