"""Reading a checkpoint directory: all of it is checked first, and what was checked is what is read."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path as FilePath
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_tex.errors import UserValueError
from lightning_tex.parallel.topology import Axis
from lightning_tex.saving import places
from lightning_tex.saving.archive import read_elements
from lightning_tex.saving.boxes import Extent
from lightning_tex.saving.manifest import (
    INDEX,
    BoxRecord,
    CorruptCheckpointError,
    FileRecord,
    Manifest,
    TensorRecord,
    difference,
    digest,
    file_record,
    index_from_bytes,
)
from lightning_tex.saving.rest import REST, restricted_load
from lightning_tex.saving.sharded import GlobalTensor, Part
from lightning_tex.saving.state import Path, Saved


class Directory:
    """A complete checkpoint directory; a :class:`lightning_tex.saving.state.Source`.

    Args:
        path: the directory.
        manifest: its manifest.

    Raises:
        CorruptCheckpointError: the table of tensors is not what was written.
    """

    def __init__(self, path: FilePath, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        tensors = index_from_bytes(self._checked_bytes(INDEX), manifest.files)
        self._tensors = {tensor.path: tensor for tensor in tensors}
        self.saved: dict[Path, Saved] = {path: Saved(t.shape, t.dtype) for path, t in self._tensors.items()}

    @classmethod
    def verified(cls, path: FilePath, world: Axis | None = None) -> Directory:
        """Open a checkpoint after every file's digest was compared. Files are spread over ranks; collective.

        Raises:
            CorruptCheckpointError: on all ranks, naming every file that any rank found to be something else.
        """
        world = world or Axis("world")
        problems: list[str] = []
        directory = None
        try:
            manifest = places.manifest_of(path)
            problems += damages(path, manifest, world)
            directory = cls(path, manifest)
        except (CorruptCheckpointError, OSError) as error:
            problems.append(str(error))
        problems = _agreed(problems, world)
        if problems:
            raise CorruptCheckpointError(_refusal(path, problems))
        assert directory is not None
        return directory

    def rest(self, weights_only: bool | None = None) -> dict[str, Any]:
        """Everything but tensors of the model and the optimizer; nothing is run, unless ``weights_only=False``."""
        return restricted_load(io.BytesIO(self._checked_bytes(REST)), self.path / REST, weights_only)

    def _checked_bytes(self, name: str) -> bytes:
        if name not in self.manifest.files:
            raise CorruptCheckpointError(f"{self.path} has no {name} in its manifest")
        content = (self.path / name).read_bytes()
        actual = FileRecord(len(content), digest(content))
        if problem := difference(self.path / name, self.manifest.files[name], actual):
            raise CorruptCheckpointError(problem)
        return content

    # --- tensors

    def fill(self, request: Mapping[Path, GlobalTensor]) -> None:
        """Read the boxes of each requested tensor into their place, on this rank alone.

        Raises:
            CorruptCheckpointError: elements have changed since they were checked, or are in no box.
            ValueError: a tensor has another shape.
        """
        for path, wanted in request.items():
            saved = self._tensors[path]
            if saved.shape != tuple(wanted.shape):
                raise UserValueError(
                    f"{'.'.join(path)} has shape {list(saved.shape)} in the checkpoint, not {list(wanted.shape)}"
                )
            for part in wanted.parts:
                self._fill_part(saved, part)

    def _fill_part(self, saved: TensorRecord, part: Part) -> None:
        target, count = part.read(), 0
        for box in saved.boxes:
            common = _common(part, box)
            if common is None:
                continue
            offsets, sizes = common
            within = tuple(slice(at - o, at - o + n) for at, o, n in zip(offsets, part.offsets, sizes, strict=True))
            target[within].copy_(self._read(saved, box, offsets, sizes))
            count += prod(sizes)
        if count != prod(part.sizes):
            raise CorruptCheckpointError(
                f"{self.path}: {'.'.join(saved.path)} has {count} of {prod(part.sizes)} elements at {part.offsets}"
            )

    def _read(self, saved: TensorRecord, box: BoxRecord, offsets: Extent, sizes: Extent) -> Tensor:
        strides = [prod(box.sizes[dim + 1 :]) for dim in range(len(box.sizes))]
        first = sum((at - o) * s for at, o, s in zip(offsets, box.offsets, strides, strict=True))
        last = first + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True)) + 1
        elements = read_elements(self.path / box.file, box, saved.dtype, first, last)
        return elements.as_strided(sizes, strides)

    def whole(self, paths: Callable[[Path], bool] = lambda path: True) -> Iterator[tuple[Path, Tensor]]:
        """Whole tensors, one after another, as one process holds them."""
        for path, record in self._tensors.items():
            if paths(path):
                tensor = torch.empty(record.shape, dtype=record.dtype)
                whole = Part.of((0,) * len(record.shape), tensor)
                self.fill({path: GlobalTensor(record.shape, record.dtype, [whole])})
                yield path, tensor


def _common(part: Part, box: BoxRecord) -> tuple[Extent, Extent] | None:
    starts = tuple(map(max, part.offsets, box.offsets))
    ends = (min(a + n, b + m) for a, n, b, m in zip(part.offsets, part.sizes, box.offsets, box.sizes, strict=True))
    sizes = tuple(end - start for start, end in zip(starts, ends, strict=True))
    return (starts, sizes) if all(size > 0 for size in sizes) else None


def damages(path: FilePath, manifest: Manifest, world: Axis) -> list[str]:
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


def _agreed(problems: list[str], world: Axis) -> list[str]:
    if world.size == 1:
        return problems
    every: list[list[str]] = [[]] * world.size
    dist.all_gather_object(every, problems, group=world.group)
    return list(dict.fromkeys(problem for own in every for problem in own))


def _refusal(path: FilePath, problems: list[str], most: int = 8) -> str:
    more = f"\n  and {len(problems) - most} more" if len(problems) > most else ""
    other = places.latest(path) or places.latest(path.parent)
    hint = f"\nThe newest complete checkpoint there is {other}" if other and other.resolve() != path.resolve() else ""
    listed = "".join(f"\n  {problem}" for problem in problems[:most])
    return f"the checkpoint {path} is refused, and nothing of it was loaded:{listed}{more}{hint}"
