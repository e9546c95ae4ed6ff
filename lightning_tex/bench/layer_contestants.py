"""MoE layers of one shape with equal weights: ours, a plain loop, and those of other projects where installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_tex.bench.layer_shapes import Shape
from lightning_tex.moe import MoE
from lightning_tex.moe.experts import Experts
from lightning_tex.parallel.precision import keeps_full_precision

# T tokens, D model width, H hidden width, E experts, k choices per token


class Ours(nn.Module):
    """The layer as bf16-mixed and 32-true train it: autocast, the router in fp32. [T, D] -> [T, D].

    Args:
        shape: the layer.
        device, dtype: of its parameters.
        capacity_factor: of the layer.
    """

    def __init__(
        self, shape: Shape, device: torch.device, dtype: torch.dtype, capacity_factor: float | None = None
    ) -> None:
        super().__init__()
        with device:
            self.moe = MoE(
                shape.dim,
                shape.hidden,
                shape.experts,
                shape.top_k,
                capacity_factor,
                activation="swiglu",
                norm_topk_prob=shape.norm_topk_prob,
                load_balance_coefficient=0,
            )
        for part in self.moe.modules():
            if not keeps_full_precision(part):
                for parameter in part.parameters(recurse=False):
                    parameter.data = parameter.to(dtype)
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, self.dtype is torch.bfloat16):
            return self.moe(x)


class PlainLoop(nn.Module):
    """Sort, loop over experts, add up: public operations of torch. [T, D] -> [T, D].

    Args:
        ours: whose weights it copies.
        shape: the layer.
    """

    def __init__(self, ours: Ours, shape: Shape) -> None:
        super().__init__()
        self.shape, experts = shape, ours.moe.experts
        assert isinstance(experts, Experts) and experts.gate is not None
        self.router = nn.Parameter(ours.moe.router.weight.detach().clone())
        self.gate = nn.Parameter(experts.gate.detach().clone())
        self.up = nn.Parameter(experts.up.detach().clone())
        self.down = nn.Parameter(experts.down.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        weights, indices = F.linear(x.to(self.router.dtype), self.router).softmax(-1).topk(self.shape.top_k)
        if self.shape.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        experts, choice = indices.flatten().sort()
        token = choice // self.shape.top_k
        sizes = torch.bincount(experts, minlength=self.shape.experts).tolist()
        matrices = zip(self.gate.unbind(), self.up.unbind(), self.down.unbind(), strict=True)
        outputs = [
            F.linear(F.silu(F.linear(rows, gate)) * F.linear(rows, up), down)
            for rows, (gate, up, down) in zip(x[token].split(sizes), matrices, strict=True)
        ]
        weighted = torch.cat(outputs) * weights.flatten()[choice, None].to(x.dtype)
        return torch.zeros_like(x).index_add(0, token, weighted)


class Transformers(nn.Module):
    """Qwen3's sparse block of transformers with its ``grouped_mm`` experts. [T, D] -> [T, D].

    Args:
        ours: whose weights it copies.
        shape: the layer.

    Raises:
        ImportError: there is no transformers with such experts.
    """

    def __init__(self, ours: Ours, shape: Shape) -> None:
        super().__init__()
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
        from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

        if "grouped_mm" not in ALL_EXPERTS_FUNCTIONS:
            raise ImportError("this transformers has no grouped_mm experts")
        config = Qwen3MoeConfig(
            hidden_size=shape.dim,
            moe_intermediate_size=shape.hidden,
            num_experts=shape.experts,
            num_experts_per_tok=shape.top_k,
            norm_topk_prob=shape.norm_topk_prob,
            experts_implementation="grouped_mm",
        )
        experts = ours.moe.experts
        assert isinstance(experts, Experts) and experts.gate is not None
        with torch.device("meta"):
            self.block = Qwen3MoeSparseMoeBlock(config)
        self.block.gate.weight = nn.Parameter(ours.moe.router.weight.detach().to(ours.dtype))
        self.block.experts.gate_up_proj = nn.Parameter(torch.cat([experts.gate, experts.up], 1).detach())
        self.block.experts.down_proj = nn.Parameter(experts.down.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x[None])[0]


class Sonic(nn.Module):
    """The layer of sonic-moe. [T, D] -> [T, D].

    Args:
        ours: whose weights it copies.
        shape: the layer.

    Raises:
        ImportError: there is no sonic-moe.
        ValueError: another dtype than bf16, or weights that are not rescaled.
    """

    def __init__(self, ours: Ours, shape: Shape) -> None:
        super().__init__()
        from sonicmoe import MoE as SonicMoE
        from sonicmoe.enums import ActivationType

        if ours.dtype is not torch.bfloat16 or not shape.norm_topk_prob:
            raise ValueError("it computes in bf16, with weights rescaled to sum to 1")
        experts = ours.moe.experts
        assert isinstance(experts, Experts) and experts.gate is not None
        self.layer = SonicMoE(
            shape.experts, shape.top_k, shape.dim, shape.hidden, ActivationType.SWIGLU, add_bias=False, std=0.02
        ).to(experts.up.device, ours.dtype)
        with torch.no_grad():
            self.layer.router.weight.copy_(ours.moe.router.weight)
            self.layer.c_fc.weight.copy_(torch.stack([experts.gate, experts.up], 2).flatten(1, 2))
            self.layer.c_proj.weight.copy_(experts.down)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


OURS = "ours"
PEERS: dict[str, Callable[[Ours, Shape], nn.Module]] = {
    "plain loop": PlainLoop,
    "transformers": Transformers,
    "sonic-moe": Sonic,
}


def peers(ours: Ours, shape: Shape, only: list[str] | None) -> Iterator[tuple[str, nn.Module | str]]:
    """Every peer by name, or why it cannot be had.

    Args:
        ours: whose weights they copy.
        shape: the layer.
        only: names of those that are wanted; ``None``: all.
    """
    for name, build in PEERS.items():
        if only is None or name in only:
            try:
                yield name, build(ours, shape)
            except Exception as error:
                yield name, str(error).strip().partition("\n")[0] or type(error).__name__
