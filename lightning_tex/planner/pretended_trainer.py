"""What a module may ask its Trainer for while one micro-step of it is traced, and nothing runs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_tex.parallel.topology import Axis


class PretendedStrategy:
    """Of a strategy what a training step communicates by: every rank is taken to hold what this one does.

    Args:
        data: the axis over which Lightning communicates.
    """

    def __init__(self, data: Axis) -> None:
        self._data = data

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """What it is given, which has the shape of the result."""
        return tensor

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """What it is given."""
        return obj

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Over the data axis: [..] -> [data, ..]."""
        return tensor.expand(self._data.size, *tensor.shape).clone()

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """The decision."""
        return decision

    def barrier(self, name: str | None = None) -> None:
        """Nothing: nobody is waited for."""


class PretendedTrainer:
    """A Trainer at its first step, which logs nothing. What else a module asks for it does not have.

    Args:
        data: the data axis, as the traced rank sees it.
        world_size: ranks in all.
    """

    barebones = True  # what is logged goes nowhere
    training, sanity_checking, validating, testing, predicting = True, False, False, False, False
    current_epoch = global_step = global_rank = local_rank = node_rank = 0
    max_steps, max_epochs, accumulate_grad_batches, num_nodes = -1, None, 1, 1
    is_global_zero = True
    logger = datamodule = checkpoint_callback = None

    def __init__(self, data: Axis, world_size: int) -> None:
        self.strategy = PretendedStrategy(data)
        self.world_size = world_size
        self.distributed_sampler_kwargs = {"num_replicas": data.size, "rank": data.rank}
        self.callbacks: list[Any] = []
        self.loggers: list[Any] = []
        self.callback_metrics: dict[str, Tensor] = {}
