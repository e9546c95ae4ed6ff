"""Linear layers sharded over the tensor axis (Megatron's column and row parallelism; paper section 3)."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_tex.layers.adapters import Adapter, ColumnAdapter, RowAdapter
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.parallel.initialization import by_index, init_uniform_
from lightning_tex.parallel.layout import Layout
from lightning_tex.parallel.sharding import TexModule


def require_divisible(name: str, option: str, value: int, layout: Layout) -> None:
    """Raise ``ValueError`` unless the tensor axis divides ``value``; the message lists sizes that would."""
    if value % layout.tensor:
        legal = Layout.legal_tensor_sizes(layout.world, [value])
        raise UserValueError(
            f"{name}: {option}={value} is not divisible by tensor_parallel_size={layout.tensor}; "
            f"legal sizes on {layout.world} ranks: {', '.join(map(str, legal))}"
        )


class _Linear(TexModule):
    """What both linear layers share: shapes, torch.nn.Linear's initialisation, and an adapter if they are given one."""

    adapter_type: ClassVar[type[Adapter]]
    adapter: Adapter | None
    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.adapter = None
        self.reset_parameters()

    @by_index
    def reset_parameters(self) -> None:
        """Draw as ``torch.nn.Linear`` does: uniform within 1/sqrt(in_features)."""
        boxes = self.boxes()
        for name, parameter in self.named_parameters(recurse=False):
            init_uniform_(parameter, 1 / math.sqrt(self.in_features), boxes[name])

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class ColumnParallelLinear(_Linear):
    """A linear layer whose output features are sharded over the tensor axis: [.., in] -> [.., out/tensor].

    Alone in one process it is ``torch.nn.Linear``. Forward needs no communication; backward all-reduces the input's
    gradient over tensor. Under sequence parallelism the input is gathered along dim -2 forward, and its gradient
    reduce-scattered backward.

    Args:
        in_features: width of the input, whole on every rank.
        out_features: width of the whole output; divisible by the tensor axis.
        bias: add a bias, sharded as the output is.
        gather_output: all-gather the output over tensor: [.., in] -> [.., out]; it then lies as the input did.
    """

    adapter_type = ColumnAdapter
    shard_dims = {"weight": {"tensor": 0}, "bias": {"tensor": 0}}

    def __init__(self, in_features: int, out_features: int, bias: bool = True, gather_output: bool = False) -> None:
        self.gather_output = gather_output
        super().__init__(in_features, out_features, bias)

    def check(self, name: str, layout: Layout) -> None:
        require_divisible(name, "out_features", self.out_features, layout)

    def forward(self, x: Tensor) -> Tensor:  # [.., in] -> [.., out/tensor]
        y = self.columns(self.activation_layout.enter(x))
        return self.activation_layout.gather_columns(y) if self.gather_output else y

    def columns(self, x: Tensor) -> Tensor:  # [.., in] -> [.., out/tensor]
        """The product alone, for an ``x`` that entered the tensor axis already and feeds several such layers."""
        y = F.linear(x, self.weight, self.bias)
        return y if self.adapter is None else y + self.adapter(x)


class RowParallelLinear(_Linear):
    """A linear layer whose input features are sharded over the tensor axis: [.., in/tensor] -> [.., out].

    Alone in one process it is ``torch.nn.Linear``. Forward all-reduces the partial outputs over tensor; backward
    needs no communication. Under sequence parallelism forward reduce-scatters along dim -2, and backward gathers.
    The bias is whole and added once, after the sum.

    Args:
        in_features: width of the whole input; divisible by the tensor axis.
        out_features: width of the output.
        bias: add a bias.
    """

    adapter_type = RowAdapter
    shard_dims = {"weight": {"tensor": 1}}

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)

    def check(self, name: str, layout: Layout) -> None:
        require_divisible(name, "in_features", self.in_features, layout)

    def forward(self, x: Tensor) -> Tensor:  # [.., in/tensor] -> [.., out]
        products = [(x, self.weight)]
        if self.adapter is not None:
            products.append((self.adapter.inner(x), self.adapter.b))
        y = self.activation_layout.leave_products(products)
        return y if self.bias is None else y + self.bias
