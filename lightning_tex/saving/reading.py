"""Reading a checkpoint directory: all of it is checked first, and what was checked is what is read."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_tex.parallel.extent import Extent
from lightning_tex.parallel.flight_record import TRAINING
from lightning_tex.parallel.topology import Axis
from lightning_tex.saving import newest, paths
from lightning_tex.saving.archive import read_elements
from lightning_tex.saving.global_tensor import GlobalTensor, Part
from lightning_tex.saving.manifest import (
    INDEX,
    CorruptCheckpointError,
    FileRecord,
    Manifest,
    RefusedCheckpointError,
    StoredExtent,
    TensorRecord,
    difference,
    digest,
    file_record,
    index_from_bytes,
)
from lightning_tex.saving.model_state import TensorPath, require_same_shape
from lightning_tex.saving.remote_path import Location
from lightning_tex.saving.trainer_state import TRAINER_STATE, restricted_load


class Directory:
    """A complete checkpoint directory; a :class:`lightning_tex.saving.model_state.Source`.

    Args:
        path: the directory, or what leads there.
        manifest: its manifest.

    Raises:
        CorruptCheckpointError: the table of tensors is not what was written.
    """

    def __init__(self, path: Location, manifest: Manifest) -> None:
        self.path, self.manifest = paths.behind(path), manifest
        tensors = index_from_bytes(self._checked_bytes(INDEX), manifest.files)
        self.saved: Mapping[TensorPath, TensorRecord] = {tensor.path: tensor for tensor in tensors}

    @classmethod
    def verified(cls, path: Location, world: Axis | None = None) -> Directory:
        """Open a checkpoint after every file's digest was compared. Files are spread over ranks; collective.

        Raises:
            RefusedCheckpointError: on all ranks, naming every file that any rank found to be something else.
        """
        world = world or Axis("world")
        problems: list[str] = []
        directory = None
        try:
            place = paths.behind(path)
            manifest = paths.manifest_of(place)
            problems += damages(place, manifest, world)
            directory = cls(place, manifest)
        except (CorruptCheckpointError, OSError) as error:
            problems.append(str(error))
        problems = all_problems(problems, world)
        if problems:
            raise RefusedCheckpointError(_refusal(path, problems), problems)
        assert directory is not None
        return directory

    def trainer_state(self, weights_only: bool | None = None) -> dict[str, Any]:
        """Everything but tensors of the model and the optimizer; nothing is run, unless ``weights_only=False``."""
        return restricted_load(io.BytesIO(self._checked_bytes(TRAINER_STATE)), self.path / TRAINER_STATE, weights_only)

    def _checked_bytes(self, name: str) -> bytes:
        if name not in self.manifest.files:
            raise CorruptCheckpointError(f"{self.path} has no {name} in its manifest")
        content = (self.path / name).read_bytes()
        actual = FileRecord(len(content), digest(content))
        if problem := difference(self.path / name, self.manifest.files[name], actual):
            raise CorruptCheckpointError(problem)
        return content

    # --- tensors

    def fill(self, request: Mapping[TensorPath, GlobalTensor]) -> None:
        """Read the parts of each requested tensor into their place, on this rank alone.

        Raises:
            CorruptCheckpointError: elements have changed since they were checked, or lie nowhere.
            ValueError: a tensor has another shape.
        """
        for path, wanted in request.items():
            saved = self.saved[path]
            require_same_shape(path, saved, wanted)
            for part in wanted.parts:
                self._fill_part(saved, part)

    def _fill_part(self, saved: TensorRecord, part: Part) -> None:
        target, count = part.read(), 0
        for stored in saved.extents:
            common = part.extent.intersect(stored.extent)
            if common.numel:
                target[common.within(part.extent).slices].copy_(self._read(stored, common, saved.dtype))
                count += common.numel
        if count != part.extent.numel:
            raise CorruptCheckpointError(
                f"{self.path}: {'.'.join(saved.path)} has {count} of {part.extent.numel} elements at "
                f"{part.extent.offsets}"
            )

    def _read(self, stored: StoredExtent, wanted: Extent, dtype: torch.dtype) -> Tensor:
        """Elements within a stored extent, in the shape of ``wanted``."""
        inside, strides = wanted.within(stored.extent), stored.extent.strides
        first = sum(offset * stride for offset, stride in zip(inside.offsets, strides, strict=True))
        last = first + sum((size - 1) * stride for size, stride in zip(inside.sizes, strides, strict=True)) + 1
        elements = read_elements(self.path / stored.file, stored, dtype, first, last)
        return elements.as_strided(inside.sizes, strides)

    def whole(self, paths: Callable[[TensorPath], bool] = lambda path: True) -> Iterator[tuple[TensorPath, Tensor]]:
        """Whole tensors, one after another, as one process holds them."""
        for path, record in self.saved.items():
            if paths(path):
                tensor = torch.empty(record.shape, dtype=record.dtype)
                self.fill({path: GlobalTensor.whole(tensor)})
                yield path, tensor


def damages(path: Location, manifest: Manifest, world: Axis) -> list[str]:
    """Which of this rank's share of the files are not what was written, expected and found."""
    found = []
    # The largest first, each to the next rank: about the same bytes for all.
    names = sorted(manifest.files, key=lambda name: (-manifest.files[name].bytes, name))
    for name in names[world.rank :: world.size]:
        expected = manifest.files[name]
        try:
            problem = difference(path / name, expected, file_record(path / name))
        except OSError as error:
            problem = f"{path / name}: expected {expected.bytes} bytes, found {error.strerror}"
        if problem:
            found.append(problem)
    return found


def all_problems(problems: list[str], world: Axis) -> list[str]:
    """What any rank has to tell, on all ranks; collective."""
    if world.size == 1:
        return problems
    every: list[list[str]] = [[]] * world.size
    with TRAINING.inside("all_gather of an object", world):
        dist.all_gather_object(every, problems, group=world.group)
    return list(dict.fromkeys(problem for own in every for problem in own))


def _refusal(path: Location, problems: list[str], most: int = 8) -> str:
    more = f"\n  and {len(problems) - most} more" if len(problems) > most else ""
    other = newest.latest(path) or newest.latest(path.parent, without=path)
    hint = f"\nThe newest complete whole state there is {other}" if other else ""
    listed = "".join(f"\n  {problem}" for problem in problems[:most])
    return f"the checkpoint {path} is refused, and nothing of it was loaded:{listed}{more}{hint}"
