"""When copies are compared over ranks, and what of a module is a copy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn
from torchmetrics import Metric

from lightning_tex.optim import Stepped
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.parallel.sharding import ParameterSharding, TexModule, parameter_shardings
from lightning_tex.parallel.topology import Axis, Topology
from lightning_tex.resilience.replicas import Replica, ReplicasDiffer, describe_difference, differing

if TYPE_CHECKING:
    from lightning_tex.strategy.checkpointing import CheckpointingStrategy

_OFF = "TexMoEStrategy(check_replicas_every_n_steps=0) does not compare"


class ReplicaChecks:
    """Compares copies at the start of a fit, after steps 1, 2, 4, .., then every so many, and before every save.

    Args:
        strategy: of the run.
        period: steps between two comparisons; 0: none is made.

    Raises:
        ValueError: a negative period.
    """

    def __init__(self, strategy: CheckpointingStrategy, period: int) -> None:
        if period < 0:
            raise UserValueError(f"check_replicas_every_n_steps={period}; legal: 1 or more, or 0 for never")
        self._strategy, self._period = strategy, period
        self._last: int | None = None
        self._warned = False

    def fit_begins(self) -> None:
        """Compare at the next boundary."""
        self._last = None

    def step_boundary(self, step: int) -> None:
        """Between two batches of a fit, and at its end: compare, if it is time to; collective.

        Args:
            step: optimizer steps done.

        Raises:
            ReplicasDiffer: naming tensor, ranks and remedy; on all ranks.
        """
        if self._period and (self._last is None or self._is_due(self._last, step)):
            self._last = step
            self._compare(f"after step {step}" if step else "at the start")

    def before_save(self) -> None:
        """Compare what a fit is about to save; collective.

        Raises:
            ReplicasDiffer: nothing is saved then.
        """
        trainer = self._strategy.lightning_module.trainer if self._strategy.lightning_module else None
        if self._period and trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            self._compare(f"before the save of step {trainer.global_step}")

    def _is_due(self, last: int, step: int) -> bool:
        if step // self._period > last // self._period:
            return True
        return step > last and step.bit_length() > last.bit_length() and step <= self._period

    def _compare(self, when: str) -> None:
        strategy, topology = self._strategy, self._strategy.topology
        optimizer = strategy.stepped
        if topology.world.size == 1 or optimizer is None:
            return
        assert strategy.model is not None
        replicas = list(copies(strategy.model, topology, optimizer))
        places = differing(replicas, topology)
        for place in places:
            difference = describe_difference(replicas[place], topology)
            if difference is None:
                continue
            if not difference.may_be_rounding:
                more = f" (and {len(places) - 1} further tensors)" if len(places) > 1 else ""
                raise ReplicasDiffer(f"{when}{more}: {difference}; {_OFF}")
            if not self._warned:
                self._warned = True
                rank_zero_warn(
                    f"{when}: {difference.replica.name} differs by up to {difference.largest:.2g} over "
                    f"{difference.axis}, as rounding does where GPU kernels sum in another order each time; "
                    "torch.use_deterministic_algorithms(True) keeps copies equal"
                )


def copies(module: nn.Module, topology: Topology, optimizer: Stepped) -> Iterator[Replica]:
    """All tensors of a sharded module of which several ranks hold copies, with the axes over which they must be alike.

    Parameters that the optimizer steps are, over all axes they are replicated over. Others, and saved buffers, may
    depend on data, as running averages do: they are compared over tensor only, whose ranks see the same data, and not
    under sequence parallelism, where they see different tokens. Buffers of TEX layers and states of metrics are a
    rank's own, and so are buffers that are not saved (``register_buffer(.., persistent=False)``).
    """
    stepped = {id(entry.parameter) for shard in optimizer.shards for entry in shard.buffer.entries}
    parameters = dict(module.named_parameters())
    owners = dict(module.named_modules())
    over_tensor = () if topology.communication.sequence_parallel else _wide([topology.tensor])
    for name, sharding in parameter_shardings(module, topology).items():
        trained = id(parameters[name]) in stepped
        axes = _replicated_over(sharding)
        if not trained:
            axes = tuple(axis for axis in axes if axis in over_tensor)
        if axes and parameters[name].numel():
            owner, own = _split(name)
            yield Replica(
                name,
                type(owners[owner]).__name__,
                parameters[name],
                axes,
                tuple(axis for axis in axes if axis is sharding.replicas) if trained else (),
                _declare(owners, owner, own) if trained else _WRITTEN,
            )
    for prefix, part in owners.items():
        if over_tensor and not isinstance(part, (TexModule, Metric)):
            for own, buffer in part.named_buffers(recurse=False):
                if own not in part._non_persistent_buffers_set and buffer.numel():
                    name = f"{prefix}.{own}" if prefix else own
                    yield Replica(name, type(part).__name__, buffer, over_tensor, (), _NOT_SAVED)


def _replicated_over(sharding: ParameterSharding) -> tuple[Axis, ...]:
    return _wide([sharding.replicas, *sharding.copies])


def _wide(axes: list[Axis]) -> tuple[Axis, ...]:
    return tuple(axis for axis in axes if axis.size > 1)


def _split(name: str) -> tuple[str, str]:
    owner, _, own = name.rpartition(".")
    return owner, own


_WRITTEN = "Tensor ranks see the same data; legal: the same write on each of them"
_NOT_SAVED = (
    "A checkpoint has one value of it. Tensor ranks see the same data, but between ColumnParallelLinear and "
    "RowParallelLinear, or inside attention, each computes a part; legal: a buffer that ranks hold alike, or "
    "register_buffer(.., persistent=False)"
)


def _declare(owners: dict[str, nn.Module], owner: str, own: str) -> str:
    """How to declare a parameter whose gradient is a partial sum: in the user's class that holds it."""
    if type(owners[owner]).__module__.split(".")[0] in ("torch", __name__.split(".")[0]) and owner:
        owner, own = _split(owner)
    return (
        "Likely it acts inside a region that is sharded over tensor (inside attention, or between ColumnParallelLinear "
        "and RowParallelLinear), where a rank's gradient of it is only the part of its own heads or columns; then "
        f"declare, in {type(owners[owner]).__name__}: partial_gradients = ({own!r},), which sums it over tensor. Else "
        "ranks draw different random numbers, or something writes to it on one rank only"
    )
