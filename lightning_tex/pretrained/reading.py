"""Reading pretrained weights into a sharded model: of each file just the elements that this rank holds."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch

from lightning_tex.parallel.errors import UserValueError
from lightning_tex.pretrained.folder import PretrainedFolder, listed
from lightning_tex.pretrained.rules import Bindings, Piece, Shapes
from lightning_tex.pretrained.tensor_file import TensorFiles, slabs
from lightning_tex.saving.global_tensor import GlobalTensor, Part
from lightning_tex.saving.model_state import MODEL, Described, TensorPath, require_same_shape


class _Parameter(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype


class PretrainedWeights:
    """The weights of a folder; a :class:`lightning_tex.saving.model_state.Source`.

    Args:
        folder: where they are.
        bindings: what of the files is what of the model.
        shapes: of the model's whole parameters, by name.
        prefix: that the parameters' names have besides.
        ignored: names in files that are no weights.

    Raises:
        ValueError: a tensor is missing, left over or of another shape, all of them named.
    """

    def __init__(
        self,
        folder: PretrainedFolder,
        bindings: Bindings,
        shapes: Shapes,
        prefix: str = "",
        ignored: Collection[str] = (),
    ) -> None:
        self.folder, self._bindings, self._prefix = folder, bindings, prefix
        self.read_bytes = 0
        require_fitting(folder, bindings, ignored)
        self.saved: Mapping[TensorPath, Described] = {
            (MODEL, prefix + name): _Parameter(shape, folder.tensors[bindings.pieces[name][0].stored].dtype)
            for name, shape in shapes.items()
        }

    def fill(self, request: Mapping[TensorPath, GlobalTensor]) -> None:
        """Read the parts of each requested parameter into their place, on this rank alone.

        Besides their memory it takes that of one slab of a tensor.

        Raises:
            ValueError: a parameter has another shape, a file has been cut short, or a copy differs from its original.
        """
        with TensorFiles() as files:
            for path, wanted in request.items():
                require_same_shape(path, self.saved[path], wanted)
                name = path[1].removeprefix(self._prefix)
                for part in wanted.parts:
                    count = sum(self._fill(files, piece, part) for piece in self._bindings.pieces[name])
                    assert count == part.extent.numel, path
                    for piece in self._bindings.copies.get(name, ()):
                        self._compare(files, piece, part)
            self.read_bytes += files.moved_bytes

    def _fill(self, files: TensorFiles, piece: Piece, part: Part) -> int:
        """Read what a piece has of a part; how many elements that is."""
        common, stored = part.extent.intersect(piece.target), self.folder.tensors[piece.stored]
        if common.numel:
            target = part.read()
            for slab in slabs(common, stored.dtype.itemsize):
                elements = piece.taken(stored.read(files, piece.source(slab)), slab)
                target[slab.within(part.extent).slices].copy_(elements)
        return common.numel

    def _compare(self, files: TensorFiles, copy: Piece, part: Part) -> None:
        for piece in self._bindings.pieces[copy.parameter]:
            common = part.extent.intersect(piece.target).intersect(copy.target)
            stored, repeated = (self.folder.tensors[one.stored] for one in (piece, copy))
            for slab in slabs(common, stored.dtype.itemsize) if common.numel else ():
                first = piece.taken(stored.read(files, piece.source(slab)), slab)
                if not torch.equal(first, copy.taken(repeated.read(files, copy.source(slab)), slab)):
                    raise UserValueError(
                        f"the pretrained weights in {self.folder.path} are refused: {copy.stored} differs from "
                        f"{piece.stored}, and its configuration says that both are one"
                    )


def require_fitting(folder: PretrainedFolder, bindings: Bindings, ignored: Collection[str]) -> None:
    """Raise ``ValueError`` unless every tensor of the files is used, every parameter filled, and sizes are equal."""
    found, wanted = folder.tensors, bindings.stored
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [
        f"{name} of shape {list(found[name].shape)} is no part of the model" for name in found
        if name not in wanted and name not in ignored
    ]  # fmt: skip
    problems += [
        f"{name} has shape {list(found[name].shape)}, by {folder.path.name}/config.json and the options it is "
        f"{list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name].shape != shape
    ]
    if problems:
        raise UserValueError(f"the pretrained weights in {folder.path} are refused: {listed(problems)}")
