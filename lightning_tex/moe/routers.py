"""The routers that a MoE layer knows by name, and how one is named: with its arguments, as a class, or as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tex.moe.router import Router
from lightning_tex.parallel.collectives import all_reduce
from lightning_tex.parallel.errors import UserTypeError, UserValueError
from lightning_tex.parallel.initialization import by_index, has_values

# T tokens, E experts, k choices per token

# A name; a name with arguments, {"name": .., "init_args": {..}}; a class; or an instance.
RouterChoice = str | Mapping[str, Any] | Router | type[Router]


class SoftmaxRouter(Router):
    """Softmax over all experts, then the k largest (Switch, GShard, DeepSeek-V2).

    With ``norm_topk_prob`` the weights are also the softmax over the k largest logits alone, which is how Mixtral,
    gpt-oss and Granite-MoE compute them.
    """

    def score(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)


class SigmoidRouter(Router):
    """A sigmoid of each expert; the k largest of it and a bias (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

    The bias, ``correction_bias`` [E], decides which experts are chosen and enters no weight. It is no parameter but a
    saved buffer in fp32. With a rate, each optimizer step raises it for experts that were chosen less often than the
    mean and lowers it for others: balance without an auxiliary loss (set ``load_balance_coefficient=0``).

    Args:
        args, kwargs: as of :class:`Router`; groups are chosen by their best two experts.
        bias_update_rate: by how much; DeepSeek-V3 takes 0.001. 0: the bias stays.

    Raises:
        ValueError: a negative rate.
    """

    axes = ("tensor", "data")
    group_score = "top2_sum"
    correction_bias: Tensor

    def __init__(self, dim: int, num_experts: int, *args: Any, bias_update_rate: float = 0.0, **kwargs: Any) -> None:
        super().__init__(dim, num_experts, *args, **kwargs)
        if bias_update_rate < 0:
            raise UserValueError(f"bias_update_rate={bias_update_rate}; legal: 0, or above")
        self.bias_update_rate = bias_update_rate
        self._chosen: Tensor | None = None
        self.register_buffer("correction_bias", torch.zeros(num_experts, dtype=torch.float32))

    @by_index
    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "correction_bias" in self._buffers and has_values(self.correction_bias):
            nn.init.zeros_(self.correction_bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SigmoidRouter:
        kept = self.correction_bias
        super()._apply(fn, recurse)
        # A module that is cast casts its buffers; steps of this one would vanish in 16 bits.
        if self.correction_bias.dtype != kept.dtype:
            self.correction_bias = kept.to(self.correction_bias.device)
        return self

    def score(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def chose(self, counts: Tensor) -> None:
        if self.bias_update_rate:
            self._chosen = counts if self._chosen is None else self._chosen + counts

    @torch.no_grad()
    def step_is_over(self, taken: bool) -> None:
        chosen, self._chosen = self._chosen, None
        if chosen is not None and taken:
            total = all_reduce(self.activation_layout.total(chosen), self.data)
            # In whole numbers: every layout decides alike.
            self.correction_bias += self.bias_update_rate * (total.sum() - total * len(total)).sign()

    def prefer(self, scores: Tensor) -> Tensor:
        return scores + self.correction_bias

    def balance(self, scores: Tensor) -> Tensor:
        """Scores relative to a token's sum of them (Eq. 19)."""
        return scores / (scores.sum(-1, keepdim=True) + torch.finfo(scores.dtype).tiny)


class SparseMixerRouter(SoftmaxRouter):
    """The k largest logits; a choice's weight is its softmax among those that are left and not far below (Phi-MoE).

    Left are experts that are no earlier choice of the token; far below are logits l with (top - l) / max(|l|, top) of
    more than twice ``jitter_eps``, the top one being the choice (SparseMixer-v2, arXiv 2409.12136, without its sampling
    and its estimate of gradients: choices are the largest, and gradients those of the weights).

    Args:
        args, kwargs: as of :class:`Router`.
        jitter_eps: half of how far below.
    """

    def __init__(self, dim: int, num_experts: int, *args: Any, jitter_eps: float = 0.01, **kwargs: Any) -> None:
        super().__init__(dim, num_experts, *args, **kwargs)
        self.jitter_eps = jitter_eps

    def weigh(self, logits: Tensor, scores: Tensor, indices: Tensor) -> Tensor:
        weights, left = [], logits
        for chosen in indices.split(1, dim=-1):  # [T, 1]
            top = left.detach().gather(-1, chosen)
            far = (top - logits.detach()) / logits.detach().abs().maximum(top) > 2 * self.jitter_eps
            weights.append(left.masked_fill(far, float("-inf")).softmax(-1).gather(-1, chosen))
            left = left.scatter(-1, chosen, float("-inf"))
        return torch.cat(weights, -1)


class ForcedBalanceRouter(SoftmaxRouter):
    """Chooses by the token's place, as many tokens for each expert; weights are those of the softmax, with gradients.

    Learns nothing worth having: it makes benches of one routing out of any weights and tokens.
    """

    tokenwise = False

    def choose(self, scores: Tensor) -> Tensor:
        tokens, experts = scores.shape
        return torch.arange(tokens * self.top_k, device=scores.device).view(tokens, self.top_k) % experts


def step_is_over(module: nn.Module, taken: bool = True) -> None:
    """Let the routers of a module act after an optimizer step; collective over the data axis.

    Under ``strategy="tex_moe"`` and for :class:`lightning_tex.LanguageModel` that happens by itself.

    Args:
        module: holds the routers.
        taken: whether the step was taken. One that a GPU left out by itself, for numbers that are not finite, counts.
    """
    for each in module.modules():
        if isinstance(each, Router):
            each.step_is_over(taken)


ROUTERS: dict[str, type[Router]] = {
    "softmax": SoftmaxRouter,
    "sigmoid": SigmoidRouter,
    "sparsemixer": SparseMixerRouter,
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
