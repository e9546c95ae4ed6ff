"""Shapes of MoE layers that people train, and tokens whose choices of experts have a given distribution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_tex.parallel.errors import UserValueError

# T tokens, D model width, H hidden width, E experts, k choices per token

Routing = Literal["balanced", "zipf"]
_CHOSEN, _STEP = 4.0, 0.125  # logits of a token's choices: the first, and how much less each further one has; others 0


@dataclass(frozen=True)
class Shape:
    """A swiglu MoE layer.

    Args:
        name: as published.
        dim: D.
        hidden: H of one expert.
        experts: E, at most D.
        top_k: k.
        norm_topk_prob: whether a token's k weights are rescaled to sum to 1.

    Raises:
        ValueError: more choices than experts, or more experts than D.
    """

    name: str
    dim: int
    hidden: int
    experts: int
    top_k: int
    norm_topk_prob: bool = True

    def __post_init__(self) -> None:
        if self.top_k > self.experts:
            raise UserValueError(f"top_k={self.top_k} is more than experts={self.experts}")
        if self.experts > self.dim:
            raise UserValueError(
                f"experts={self.experts} is more than dim={self.dim}: no tokens can be drawn that choose them as wanted"
            )

    def forward_flops(self, tokens: int) -> int:
        """Of the products of one forward: router and experts."""
        return 2 * tokens * self.dim * (self.experts + 3 * self.top_k * self.hidden)

    def __str__(self) -> str:
        return f"{self.name} (D {self.dim}, H {self.hidden}, {self.experts} experts, top-{self.top_k})"


# OLMoE: arXiv 2409.02060, table 1. Qwen3-30B-A3B: its config.json. Mixtral 8x7B: arXiv 2401.04088, table 1.
SHAPES = {
    "olmoe": Shape("OLMoE", 2048, 1024, 64, 8, norm_topk_prob=False),
    "qwen3-30b-a3b": Shape("Qwen3-30B-A3B", 2048, 768, 128, 8),
    "mixtral": Shape("Mixtral", 4096, 14336, 8, 2),
}


def choices(shape: Shape, tokens: int, routing: Routing, exponent: float, seed: int = 0) -> Tensor:
    """Which experts tokens shall choose: [T, k] on CPU, without repetition in a row.

    Args:
        shape: the layer.
        tokens: T.
        routing: drawn without replacement, ``"balanced"``: with equal odds, so that loads differ as little as those of
            a trained router without bias; ``"zipf"``: with odds of expert e proportional to 1 / (e + 1) ** exponent.
        exponent: of Zipf's law.
        seed: of the draw.

    Raises:
        ValueError: an unknown routing.
    """
    generator = torch.Generator().manual_seed(seed)
    if routing not in get_args(Routing):
        raise UserValueError(f"routing={routing!r}; legal: {', '.join(map(repr, get_args(Routing)))}")
    generator = torch.Generator().manual_seed(seed)
    exponent = exponent if routing == "zipf" else 0.0
    odds = -exponent * torch.arange(1, shape.experts + 1, dtype=torch.float64).log()
    uniform = torch.rand(tokens, shape.experts, generator=generator, dtype=torch.float64)
    return (odds - (-uniform.log()).log()).topk(shape.top_k, dim=-1).indices  # Gumbel's way to draw


@torch.no_grad()
def tokens_that_choose(wanted: Tensor, router_weight: Tensor, seed: int = 0) -> Tensor:
    """Random tokens whose logits are largest for wanted experts: any router that takes the top k sends them there.

    The layer runs as it always does; nothing in it is replaced.

    Args:
        wanted: [T, k], distinct in a row.
        router_weight: [E, D], overwritten: its rows become orthonormal.
        seed: of the draw.

    Returns:
        [T, D] in the weight's dtype and on its device, normally distributed where no router looks.
    """
    experts, dim = router_weight.shape
    device = router_weight.device
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    rows = torch.linalg.qr(normal(dim, experts)).Q.T.contiguous()  # [E, D]
    router_weight.copy_(rows)
    x = normal(len(wanted), dim)
    x -= (x @ rows.T) @ rows
    logits = (_CHOSEN - _STEP * torch.arange(wanted.shape[1], device=device)).clamp(min=_CHOSEN / 2)
    seen = torch.zeros(len(wanted), experts, device=device).scatter_(1, wanted.to(device), logits.expand(wanted.shape))
    return (x + seen @ rows).to(router_weight.dtype)
