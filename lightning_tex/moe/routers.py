"""The routers that a MoE layer knows by name, and how one is named: with its arguments, as a class, or as it is."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from lightning_tex.moe.expert_choice import ExpertChoiceRouter
from lightning_tex.moe.hash_router import HashRouter
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
    named, given = _taken_apart(router)
    kind = _named(named) if isinstance(named, str) else named
    try:
        return kind(dim, num_experts, top_k, norm, **given)
    except TypeError as error:
        raise UserTypeError(f"router {kind.__name__}: {error}") from error


def plain_choice(router: RouterChoice) -> str | dict[str, Any]:
    """A choice as plain values, which files hold and every layer makes a router of its own from.

    Raises:
        ValueError: an instance, or a class without an import path.
    """
    if isinstance(router, str):
        return router
    if isinstance(router, Mapping):
        return {key: plain_choice(value) if key == "name" else value for key, value in router.items()}
    path = f"{router.__module__}.{router.__qualname__}" if isinstance(router, type) else ""
    if not path or "<locals>" in path:
        raise UserValueError(
            f"router={router!r} is no plain value; legal: a name, a class at the top of a module, or one of these with "
            'arguments, {"name": .., "init_args": {..}} (an instance belongs to one layer: MoE(router=..))'
        )
    return path


def _taken_apart(router: str | Mapping[str, Any] | type[Router]) -> tuple[str | type[Router], Mapping[str, Any]]:
    """A name or class, and its further arguments."""
    if not isinstance(router, Mapping):
        return router, {}
    unknown = ", ".join(map(repr, sorted(set(router) - {"name", "init_args"})))
    if unknown or "name" not in router:
        raise UserValueError(
            f"router has {unknown or 'no name'}; legal: name, and init_args, the arguments of what it names"
        )
    return router["name"], router.get("init_args") or {}


def _named(name: str) -> type[Router]:
    """A router of :data:`ROUTERS`, or a class by the path of its module."""
    if name in ROUTERS:
        return ROUTERS[name]
    module, _, own = name.rpartition(".")
    try:
        kind = getattr(import_module(module), own) if module else None
    except (ImportError, AttributeError):
        kind = None
    if isinstance(kind, type) and issubclass(kind, Router):
        return kind
    known = ", ".join(map(repr, ROUTERS))
    raise UserValueError(f"router={name!r}; legal: {known}, or a Router class, its import path, or an instance")
