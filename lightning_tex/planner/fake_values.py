"""Which numbers exist in a trace: integers do, in memory; floating-point tensors are shapes without contents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import ProcessGroup
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_tex.parallel.allocations import tensors_in
from lightning_tex.parallel.errors import UserValueError

aten, c10d, prim = torch.ops.aten, torch.ops.c10d, torch.ops.prim


@dataclass
class Routing:
    """Which experts a router's top k are, in a trace: as many choices on each, but for an imbalance.

    Args:
        imbalance: choices that fall on the experts of the traced rank, relative to the mean over ranks.
        parts: ranks of the expert axis.
        part: the traced rank's place among them.
    """

    imbalance: float = 1.0
    parts: int = 1
    part: int = 0

    def choose(self, tokens: int, top_k: int, experts: int) -> Tensor:
        """[tokens, top_k] int64 in 0..experts - 1."""
        choices = torch.arange(tokens * top_k)
        if self.imbalance == 1.0 or self.parts == 1:
            return (choices % experts).view(tokens, top_k)
        each = experts // self.parts
        own = min(len(choices), round(self.imbalance * len(choices) / self.parts))
        before = choices * own // max(1, len(choices))  # choices on own experts up to here, evenly spread
        is_own = (choices + 1) * own // max(1, len(choices)) > before
        others = (choices - before) % (experts - each)
        others += each * (others >= self.part * each)
        return torch.where(is_own, self.part * each + before % each, others).view(tokens, top_k)


class ShapesOnly(TorchDispatchMode):
    """Under it floating-point tensors take no memory and no time; integers and single numbers are computed.

    Token ids, choices of experts, counts and sizes are integers, so whatever decides about shapes is real. What cannot
    be known is answered: a condition on values holds, a single floating-point value is 0, a router's top k, or its
    largest, are those of ``routing``. In a collective every rank is taken to do, and to hold, what this one does.

    Args:
        routing: which experts are chosen.
    """

    def __init__(self, routing: Routing) -> None:
        super().__init__()
        self.routing = routing
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        tensors = tensors_in(args, kwargs.values())
        if any(isinstance(t, FakeTensor) for t in tensors):
            return self._without_values(func, args, kwargs)
        if not tensors:
            return self._made(func, args, kwargs)
        if kwargs.get("device") is not None and any(t.is_meta for t in tensors):
            return self._taken_off_meta(func, args, kwargs)
        result = func(*args, **kwargs)
        if func is c10d.alltoall_base_.default:
            _everybody_sends_alike(*args)
        return result

    def _without_values(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is aten._local_scalar_dense.default:
            return _answer(args[0])
        result = func(*args, **kwargs)
        if func is aten.topk.default and args[0].dim() == 2:
            return result[0], self.routing.choose(len(result[1]), result[1].shape[1], args[0].shape[-1])
        if func is aten.argmax.default and args[0].dim() == 2 and tuple(args[1:2]) in ((1,), (-1,)):
            return self.routing.choose(len(result), 1, args[0].shape[-1]).view(result.shape)
        if isinstance(result, FakeTensor) and args and isinstance(args[0], Tensor) and _in_place(func):
            return args[0]
        return result

    def _made(self, func: Any, args: Any, kwargs: Any) -> Any:
        with self.fake:
            made = func(*args, **kwargs)
        if isinstance(made, FakeTensor) and made.is_floating_point() and made.dim() and made.fake_device.type != "meta":
            return made
        return func(*args, **kwargs)

    def _taken_off_meta(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        like = func(*args, **{**kwargs, "device": torch.device("meta")})
        options = {"dtype": like.dtype, "device": kwargs["device"]}
        return self._made(aten.empty_strided.default, (like.shape, like.stride()), options)


def takes_memory(tensor: Tensor) -> bool:
    """Whether a tensor would, or does: it is not on the meta device."""
    return isinstance(tensor, FakeTensor) or not tensor.is_meta


def _answer(unknown: Tensor) -> bool | float:
    if unknown.dtype == torch.bool:
        return True
    if unknown.is_floating_point():
        return 0.0
    raise UserValueError(
        "the traced step asks for an integer that depends on weights or activations, and a trace has neither; legal: "
        "modules whose shapes depend on token ids, sizes and the top k of a router"
    )


def _in_place(func: Any) -> bool:
    return bool(func._schema.name.endswith("_"))


def _everybody_sends_alike(out: Tensor, sent: Tensor, group: Any, arrive: list[int], leave: list[int], *_: Any) -> None:
    """From every rank arrives what this one would send to itself."""
    axis = ProcessGroup.unbox(group)
    parts = sent.split(leave) if leave else sent.chunk(axis.size())
    own = parts[axis.rank()]
    assert out.shape[0] == own.shape[0] * axis.size(), (arrive, leave)
    out.copy_(torch.cat([own] * axis.size()))
