"""Writing a checkpoint directory: a copy of the states now, the files then or later, the name last.

A save has two halves. :func:`begin` runs where training stands and ends when this rank's elements are copied.
:meth:`Save.finish` needs nothing of the run but the copies, and so may run beside it.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from lightning_tex.parallel.errors import UserRuntimeError
from lightning_tex.parallel.layout import Layout
from lightning_tex.parallel.topology import Axis
from lightning_tex.saving.archive import write_file, write_tensors
from lightning_tex.saving.global_tensor import GlobalTensor, Part
from lightning_tex.saving.manifest import INDEX, MANIFEST, FileRecord, Manifest, TensorRecord, index_to_bytes
from lightning_tex.saving.model_state import TensorPath
from lightning_tex.saving.parts import in_files
from lightning_tex.saving.remote_path import Location, at
from lightning_tex.saving.side_group import SideGroup
from lightning_tex.saving.stores import store_of
from lightning_tex.saving.trainer_state import TRAINER_STATE, serialised

Broadcast = Callable[[Any], Any]

# For others' tools; never read here, because it is a pickle.
_DCP_METADATA = ".metadata"
_PACKAGES = ("lightning-tex", "torch", "lightning")


def begin(
    path: Location,
    linked: bool,
    tensors: Mapping[str, Any],
    trainer_state: Mapping[str, Any],
    layout: Layout,
    world: Axis,
    broadcast: Broadcast,
) -> Save:
    """Copy what this rank writes to host memory; collective.

    Args:
        path: the same on all ranks.
        linked: as for :meth:`lightning_tex.saving.store.Store.install`.
        tensors: nested dicts of :class:`GlobalTensor`.
        trainer_state: everything else; rank 0's is written.
        layout: of the run.
        world: all ranks.
        broadcast: sends rank 0's object to all ranks.

    Raises:
        RuntimeError: on all ranks, when rank 0 cannot make the directory.
    """
    store = store_of(path)
    unfinished = at(broadcast(str(store.unfinished(path))))

    def prepare() -> bytes:
        store.prepare(path, unfinished)
        return serialised(trainer_state)

    content = on_first_rank(prepare, world, broadcast)
    step, epoch = int(trainer_state.get("global_step", 0)), int(trainer_state.get("epoch", 0))
    return Save(path, unfinished, linked, world.rank, dict(_copies(tensors)), content, step, epoch, asdict(layout))


def on_first_rank(act: Callable[[], Any], world: Axis, broadcast: Broadcast) -> Any:
    """``act()`` on rank 0, ``None`` on the others, which wait. If it fails, raise on all ranks."""
    result, failure = None, None
    if world.rank == 0:
        try:
            result = act()
        except Exception as error:
            failure = error
    message = broadcast(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    if message is not None:
        raise UserRuntimeError(f"rank 0 could not write the checkpoint: {message}")
    return result


def _copies(tensors: Mapping[str, Any], path: TensorPath = ()) -> Iterator[tuple[TensorPath, GlobalTensor]]:
    for name, value in tensors.items():
        inner = (*path, str(name))
        if not isinstance(value, GlobalTensor):
            yield from _copies(value, inner)
        elif value.writes and value.parts:
            yield inner, GlobalTensor(value.shape, value.dtype, map(_copy, value.parts))


def _copy(part: Part) -> Part:
    elements = part.read().detach()
    copy = torch.empty(part.extent.sizes, dtype=elements.dtype)
    return Part.of(part.extent.offsets, copy.copy_(elements))


class _Written(NamedTuple):
    """A file of a rank's elements."""

    name: str
    record: FileRecord
    tensors: list[TensorRecord]


def _bytes(tensors: Mapping[TensorPath, GlobalTensor]) -> int:
    return sum(part.extent.numel * tensor.dtype.itemsize for tensor in tensors.values() for part in tensor.parts)


@dataclass
class Save:
    """A save under way: copies in host memory, and where they go."""

    path: Location
    unfinished: Location
    linked: bool
    rank: int
    tensors: dict[TensorPath, GlobalTensor]
    trainer_state: bytes | None
    step: int
    epoch: int
    layout: dict[str, int]

    def finish(self, group: SideGroup) -> None:
        """Write the files; once all ranks have, give the directory its name. Collective.

        Raises:
            RuntimeError: on all ranks alike, when one of them cannot; what was written is removed.
        """
        written = group.gather(self._attempt(self._write_own))
        failure = None
        if written is not None:
            failed = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(written) if error]
            _, error = (None, "; ".join(failed)) if failed else self._attempt(self._complete, [w for w, _ in written])
            failure = error
        failure = group.broadcast(failure)
        if failure:
            if self.rank == 0:
                store_of(self.path).remove(self.unfinished)
            raise UserRuntimeError(f"saving the checkpoint {self.path} (step {self.step}) failed: {failure}")

    def _attempt(self, act: Callable[..., Any], *args: Any) -> tuple[Any, str | None]:
        try:
            return act(*args), None
        except Exception as error:
            return None, f"{type(error).__name__}: {error}"

    def _write_own(self) -> list[_Written]:
        store, written = store_of(self.path), []
        for number, tensors in enumerate(in_files(self.tensors, store.part_bytes)):
            path = self.unfinished / f"__{self.rank}_{number}.distcp"
            written.append(_Written(path.name, *write_tensors(store.new_file(path, _bytes(tensors)), tensors)))
        self.tensors = {}
        return written

    def _complete(self, of_ranks: list[list[_Written]]) -> None:
        parts = [part for written in of_ranks for part in written]
        files = {name: record for name, record, _ in parts}
        tensors = _joined([tensors for _, _, tensors in parts])
        assert self.trainer_state is not None
        for name, content in (
            (TRAINER_STATE, self.trainer_state),
            (_DCP_METADATA, pickle.dumps(_dcp_metadata(tensors))),
            (INDEX, index_to_bytes(tensors)),
        ):
            files[name] = self._put(name, content)
        versions = {name: _version(name) for name in _PACKAGES}
        manifest = Manifest(self.step, self.epoch, self.layout, versions, time.time(), files)
        self._put(MANIFEST, manifest.to_bytes())
        store_of(self.path).install(self.unfinished, self.path, self.linked)

    def _put(self, name: str, content: bytes) -> FileRecord:
        return write_file(store_of(self.path).new_file(self.unfinished / name, len(content)), content)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from its sources
        return "unknown"


def _joined(parts: list[list[TensorRecord]]) -> list[TensorRecord]:
    tensors: dict[tuple[str, ...], TensorRecord] = {}
    for records in parts:
        for record in records:
            whole = tensors.setdefault(record.path, TensorRecord(record.path, record.shape, record.dtype))
            whole.extents += record.extents
    return list(tensors.values())


def _dcp_metadata(tensors: list[TensorRecord]) -> Metadata:
    names = {".".join(tensor.path): tensor for tensor in tensors}
    return Metadata(
        state_dict_metadata={
            name: TensorStorageMetadata(
                TensorProperties(dtype=tensor.dtype),
                torch.Size(tensor.shape),
                [
                    ChunkStorageMetadata(torch.Size(stored.extent.offsets), torch.Size(stored.extent.sizes))
                    for stored in tensor.extents
                ],
            )
            for name, tensor in names.items()
        },
        planner_data={name: tensor.path for name, tensor in names.items()},
        storage_data={
            MetadataIndex(name, stored.extent.offsets): _StorageInfo(stored.file, *stored.archive)
            for name, tensor in names.items()
            for stored in tensor.extents
        },
    )
