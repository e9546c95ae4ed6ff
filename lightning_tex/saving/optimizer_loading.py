"""Optimizer states of any form and layout, read into the sharded optimizer in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_tex.optim import Stepped, one_by_one
from lightning_tex.optim.formats import LOW_PRECISION, MASTER
from lightning_tex.optim.shard import Piece, Shard
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.saving.checkpoint_format import Finish, ShardedRun
from lightning_tex.saving.global_tensor import GlobalTensor
from lightning_tex.saving.model_state import MODEL, OPTIMIZER, Described, Source, TensorPath
from lightning_tex.saving.optimizer_state import GROUPS_OF_EACH, ROOTS, ROUNDING_SEED, group_options, held_parts

StatesByName = Mapping[str, Mapping[str, Described]]


class UnderRoot:
    """The states of one optimizer of several in a checkpoint, where those of the only one would be.

    Args:
        source: the checkpoint.
        root: what the optimizer's states lie under.
    """

    def __init__(self, source: Source, root: str) -> None:
        self._source, self._root = source, root

    @property
    def saved(self) -> Mapping[TensorPath, Described]:
        """What there is."""
        saved = self._source.saved
        return {(OPTIMIZER, *path[1:]): tensor for path, tensor in saved.items() if path[0] == self._root}

    def fill(self, request: Mapping[TensorPath, GlobalTensor]) -> None:
        """Read the parts of each requested tensor into their place."""
        self._source.fill({(self._root, *path[1:]): wanted for path, wanted in request.items()})


@dataclass(frozen=True)
class OptimizerStates:
    """The optimizer states of a checkpoint, of whatever form and version.

    Args:
        source: has the tensors, as ``("optimizer_0", "state", parameter name, key)``.
        groups: options with parameter names as ``params``, as :func:`group_options` gives.
        number_keys: keys whose states are Python numbers.
        rounding_seed: of stochastic rounding; ``None`` where the writer had none.
    """

    source: Source
    groups: list[dict[str, Any]]
    number_keys: frozenset[str]
    rounding_seed: Mapping[str, int] | None

    @classmethod
    def by_name(cls, about: Mapping[str, Any], source: Source) -> OptimizerStates:
        """From what a directory's ``meta.pt`` says of its optimizer (:func:`optimizer_state.optimizer_entry`)."""
        return cls(source, about["param_groups"], frozenset(about["numbers"]), about.get(ROUNDING_SEED))

    @classmethod
    def of_each(
        cls, about: Mapping[str, Any], stepped: Stepped, under: Callable[[str], Source]
    ) -> Iterator[tuple[Stepped, OptimizerStates]]:
        """The optimizers with their states: all of them at once, where these lie together.

        Args:
            about: as of :meth:`by_name`.
            stepped: the optimizers.
            under: gives the states that lie under a root, as those of the only optimizer.

        Raises:
            ValueError: optimizers that share parameters, of other numbers of groups.
        """
        counts = about.get(GROUPS_OF_EACH, [len(about["param_groups"])])
        places = about.get(ROOTS, [OPTIMIZER] * len(counts))
        if len(set(places)) == 1:
            yield stepped, cls.by_name(about, under(OPTIMIZER))
            return
        each = one_by_one(stepped)
        if [len(one.param_groups) for one in each] != counts:
            raise UserValueError(
                f"the checkpoint's optimizers have {counts} parameter groups, these have "
                f"{[len(one.param_groups) for one in each]}"
            )
        groups = iter(about["param_groups"])
        for one, place, count in zip(each, places, counts, strict=True):
            yield one, cls.by_name({**about, "param_groups": list(islice(groups, count))}, under(place))

    def tensors(self) -> StatesByName:
        """What is known of each state but the masters, by parameter name and key."""
        states: dict[str, dict[str, Described]] = {}
        for path, tensor in self.source.saved.items():
            if path[:2] == (OPTIMIZER, "state") and path[3] != MASTER:
                states.setdefault(path[2], {})[path[3]] = tensor
        return states


@torch.no_grad()
def load_optimizer(optimizer: Stepped, states: OptimizerStates) -> None:
    """Read all states, whatever the layout they come from, and take over the groups' options.

    Raises:
        ValueError: the groups hold other parameters.
    """
    for one in one_by_one(optimizer):
        one.take_up_groups()
    require_same_groups(states.groups, optimizer)
    for group, options in zip(optimizer.param_groups, states.groups, strict=True):
        # In place, because schedulers hold the group itself.
        group.update({key: value for key, value in options.items() if key not in ("params", "param_names")})
    saved = states.tensors()
    scalars = _scalar_keys(saved, optimizer)
    for shard in optimizer.shards:
        shard.states.clear()
        # Shard by shard: a compact format reads into memory that is given back.
        _load_elements(shard, states.source, saved, scalars)
    _load_scalars(optimizer, states, saved, scalars)
    optimizer.rounding_seed.restore(states.rounding_seed)


def require_same_groups(saved: list[dict[str, Any]], optimizer: Stepped) -> None:
    """Raise ``ValueError`` if the groups of a checkpoint hold other parameters than the optimizer's."""
    groups = group_options(optimizer)
    if len(saved) != len(groups):
        raise UserValueError(
            f"the checkpoint's optimizer has {len(saved)} parameter groups, this one has {len(groups)}"
        )
    for index, (theirs, ours) in enumerate(zip(saved, groups, strict=True)):
        differing = set(theirs["params"]) ^ set(ours["params"])
        if differing:
            raise UserValueError(
                f"optimizer group {index} holds other parameters than in the checkpoint; only in one of them: "
                f"{', '.join(sorted(differing)[:8])}"
            )


# --- states with a value per element


def _load_elements(shard: Shard, source: Source, saved: StatesByName, scalars: set[str]) -> None:
    wanted: dict[tuple[int, str], Described] = {}
    for piece in shard.pieces():
        for key, tensor in saved.get(piece.sharding.name, {}).items():
            if key not in scalars:
                wanted[piece.window, key] = tensor
    _read_windows(shard, source, wanted, lambda piece, key: (OPTIMIZER, "state", piece.sharding.name, key))


def _read_windows(
    shard: Shard,
    source: Source,
    wanted: Mapping[tuple[int, str], Described],
    path_of: Callable[[Piece, str], TensorPath],
) -> None:
    """Read states of a shard's windows, by (window, key), from where ``path_of`` says."""
    targets = {
        (window, key): shard.states.memory_for(window, key, saved.dtype, tuple(saved.shape))
        for (window, key), saved in wanted.items()
    }
    request: dict[TensorPath, GlobalTensor] = {}
    for piece in shard.pieces():
        for (window, key), target in targets.items():
            path = path_of(piece, key)
            if window == piece.window and path in source.saved:
                shape = tuple(target.shape)
                requested = request.setdefault(path, GlobalTensor(piece.whole_shape(shape), target.dtype))
                requested.parts += held_parts(piece, lambda target=target: target, shape)  # type: ignore[misc]
    source.fill(request)
    for (window, key), target in targets.items():
        shard.states.filled(window, key, target)


# --- states that are one number


def _scalar_keys(saved: StatesByName, optimizer: Stepped) -> set[str]:
    # The states of a 0-dim parameter have shape [] too, so other parameters tell.
    dims = {sharding.name: len(sharding.box.full) for sharding in optimizer.shardings.values()}
    return {"step"} | {
        key for name, states in saved.items() for key, tensor in states.items() if not tensor.shape and dims.get(name)
    }


class _WindowNumber:
    """A number that the parameters of one window share from now on: the largest of theirs."""

    def __init__(self, value: Tensor) -> None:
        self.value, self.differs = value, False

    def join(self, value: Tensor) -> None:
        """Another parameter of the window comes with this one."""
        self.differs = self.differs or not torch.equal(self.value, value)
        self.value = torch.maximum(self.value, value)


def _load_scalars(optimizer: Stepped, states: OptimizerStates, saved: StatesByName, scalars: set[str]) -> None:
    numbers = _read_scalars(optimizer, states.source, saved, scalars)
    differing: set[str] = set()
    for shard in optimizer.shards:
        shared: dict[tuple[int, str], _WindowNumber] = {}
        for piece in shard.pieces():
            for key in scalars & saved.get(piece.sharding.name, {}).keys():
                number = numbers[OPTIMIZER, "state", piece.sharding.name, key]
                shared.setdefault((piece.window, key), _WindowNumber(number)).join(number)
        device = _scalar_device(shard)
        for (window, key), scalar in shared.items():
            plain = key in states.number_keys
            shard.states.set_number(window, key, scalar.value.item() if plain else scalar.value.to(device, copy=True))
        differing |= {key for (_, key), scalar in shared.items() if scalar.differs}
    if differing:
        rank_zero_warn(
            f"The optimizer's {', '.join(sorted(differing))} differs between parameters in this checkpoint, as after "
            "steps in which some had no gradient; parameters that are updated together go on with the largest"
        )


def _read_scalars(
    optimizer: Stepped, source: Source, saved: StatesByName, scalars: set[str]
) -> dict[TensorPath, Tensor]:
    """The numbers of this rank's parameters. [] each"""
    numbers: dict[TensorPath, Tensor] = {
        (OPTIMIZER, "state", piece.sharding.name, key): torch.zeros((), dtype=tensor.dtype)
        for piece in optimizer.pieces()
        for key, tensor in saved.get(piece.sharding.name, {}).items()
        if key in scalars
    }
    source.fill({path: GlobalTensor.whole(number) for path, number in numbers.items()})
    return numbers


def _scalar_device(shard: Shard) -> torch.device:
    """Where torch keeps a step count: beside the parameter only where the kernel reads it there."""
    options = shard.options
    on_device = options.get("fused") or options.get("capturable")
    return shard.buffer.parameters.device if on_device else torch.device("cpu")


# --- masters


def masters_from(source: Source) -> Finish:
    """What :func:`load_masters` does, once there are optimizers."""

    def finish(run: ShardedRun) -> Mapping[str, Tensor]:
        if run.optimizer is not None:
            load_masters(run.optimizer, source)
        return {}

    return finish


@torch.no_grad()
def load_masters(optimizer: Stepped, source: Source) -> None:
    """Read the fp32 values behind the parameters, after :func:`model_state.load_model`.

    They are the saved masters or, from a checkpoint of higher precision, the weights themselves. A master is read into
    a parameter of higher precision as well.
    """
    for shard in optimizer.shards:
        wanted: dict[tuple[int, str], Described] = {}
        low = shard.buffer.parameters.dtype in LOW_PRECISION
        for piece in shard.pieces():
            master, weight = _master_paths(piece)
            if (master in source.saved and not low) or (shard.states.has_master and weight in source.saved):
                wanted[piece.window, MASTER] = GlobalTensor(piece.sharding.box.full, torch.float32)

        def path_of(piece: Piece, key: str) -> TensorPath:
            master, weight = _master_paths(piece)
            return master if master in source.saved else weight

        _read_windows(shard, source, wanted, path_of)
    optimizer.keep_states()


def _master_paths(piece: Piece) -> tuple[TensorPath, TensorPath]:
    name = piece.sharding.name
    return (OPTIMIZER, "state", name, MASTER), (MODEL, name)
