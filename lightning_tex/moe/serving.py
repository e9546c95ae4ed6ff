"""MoE layers where tokens of one sequence are computed at different times: each token's experts are its own affair."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lightning_tex.moe.capacity import CapacityDispatcher
from lightning_tex.moe.dropless import DroplessDispatcher
from lightning_tex.moe.layer import MoE
from lightning_tex.moe.router import Router
from lightning_tex.moe.sequence_parallel import SequenceShardedCapacityDispatcher
from lightning_tex.parallel.errors import UserValueError


def require_tokenwise_routers(module: nn.Module) -> None:
    """Refuse routers for which it matters which other tokens there are: a token alone would have other experts.

    Raises:
        ValueError: naming them.
    """
    for name, router in module.named_modules():
        if isinstance(router, Router) and not router.tokenwise:
            raise UserValueError(
                f"{name} is a {type(router).__name__}, which chooses experts by all tokens of a batch, later ones "
                "included: text cannot be generated token by token; legal: a router that chooses by each token alone, "
                "such as 'softmax' or 'sigmoid'"
            )


@contextmanager
def every_choice_served(module: nn.Module) -> Iterator[None]:
    """Meanwhile, layers with a capacity serve all choices, so that a token does not depend on those beside it.

    Layers with a way to dispatch of their own keep it.
    """
    limited = {
        layer: layer.dispatcher
        for layer in module.modules()
        if isinstance(layer, MoE)
        and isinstance(layer.dispatcher, (CapacityDispatcher, SequenceShardedCapacityDispatcher))
    }
    try:
        for layer, dispatcher in limited.items():
            layer.dispatcher = DroplessDispatcher(layer.num_experts, dispatcher.axes)
        yield
    finally:
        for layer, dispatcher in limited.items():
            layer.dispatcher = dispatcher
