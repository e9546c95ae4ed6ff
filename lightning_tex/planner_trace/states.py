"""What a rank keeps between steps, and what each tensor of it is for."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from lightning_tex.optim import Stepped
from lightning_tex.parallel.allocations import storage_bytes, storage_key
from lightning_tex.parallel.sharding import parameter_shardings
from lightning_tex.parallel.topology import Topology

# The kinds of what is kept between steps.
STATES = ("dense_parameters", "expert_parameters", "gradients", "master", "moments")


def states(model: nn.Module, topology: Topology, optimizer: Stepped | None) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that a rank keeps of parameters, gradients and optimizer states, with its kind.

    Several tensors may be views of one storage; a storage belongs to the kind that names it first.

    Args:
        model: sharded already.
        topology: what it was sharded by.
        optimizer: its optimizer, if it has one.
    """
    parameters = dict(model.named_parameters())
    for name, sharding in parameter_shardings(model, topology).items():
        yield (
            "expert_parameters" if sharding.replicas.name == "expert_data" else "dense_parameters",
            parameters[name],
        )
    for shard in [] if optimizer is None else optimizer.shards:
        yield "gradients", shard.gradients.memory
        yield from shard.states.memory()


def state_bytes(model: nn.Module, topology: Topology, optimizer: Stepped | None) -> dict[str, int]:
    """Bytes of the storages that a rank keeps between steps, by kind."""
    by_storage: dict[int, tuple[str, Tensor]] = {}
    for kind, tensor in states(model, topology, optimizer):
        by_storage.setdefault(storage_key(tensor), (kind, tensor))
    totals = dict.fromkeys(STATES, 0)
    for kind, tensor in by_storage.values():
        totals[kind] += storage_bytes([tensor])
    return totals
