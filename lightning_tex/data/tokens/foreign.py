"""Tokens that other programs have prepared, read as they lie: Megatron's ``.bin`` and ``.idx``, datatrove's ``.ds``.

Megatron-Core, ``core/datasets/indexed_dataset.py``: the index holds, all little-endian, 9 bytes of magic, a version
(uint64), the code of the tokens' type (uint8), the numbers of sequences and of document indices (uint64), the lengths
of the sequences (int32) and their offsets in bytes (int64), and the sequence at which each document begins and the last
one ends (int64). datatrove, ``pipeline/tokens/tokenizer.py``, of whose files nanotron trains: tokens of two bytes or
four; ``.ds.index`` has where each document ends (uint64, in tokens), ``.ds.loss`` a byte a token, ``.ds.metadata`` the
tokenizer's name, in later versions with the bytes of a token behind ``|``.
"""

from __future__ import annotations

import hashlib
import struct
from abc import abstractmethod
from pathlib import Path

import numpy as np

from lightning_tex.data.tokens.store import TokenFile, Tokens
from lightning_tex.parallel.errors import UserFileError, UserValueError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_SAMPLES, _SAMPLE_TOKENS = 256, 1024  # of the tokens, which tell streams apart
SUFFIXES = (".bin", ".ds")


def foreign_files(path: Path) -> list[Path]:
    """The files of tokens that a path names, or its folder has; none where it is something else."""
    if path.is_file():
        return [path] if path.suffix in SUFFIXES else []
    if not path.is_dir():
        return []
    found = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and not file.name.startswith("."))
    return [file for file in found if file.suffix == ".ds" or file.with_suffix(".idx").is_file()]


def open_foreign(paths: list[Path]) -> Tokens:
    """One stream of some files, which are mapped and not read.

    Raises:
        ValueError: a file that is not whole, or of types that differ.
        FileNotFoundError: an index that is not there.
    """
    files = [_MegatronFile.of(path) if path.suffix == ".bin" else _datatrove_file(path) for path in paths]
    types = {file.dtype for file in files}
    if len(types) > 1:
        named = ", ".join(sorted(f"{file.path.name}: {file.dtype}" for file in files)[:4])
        raise UserValueError(f"tokens of several types ({named}); legal: one, or train on a mixture of them")
    return Tokens(files)


def sampled_fingerprint(stream: Tokens, sequence_length: int) -> str:
    """Tells streams apart by their length and by tokens from all over them, without reading all."""
    digest = hashlib.blake2b(f"{len(stream)}/{sequence_length}".encode(), digest_size=16)
    for sample in range(_SAMPLES):
        start = sample * max(0, len(stream) - _SAMPLE_TOKENS) // max(1, _SAMPLES - 1)
        digest.update(stream.read(start, min(start + _SAMPLE_TOKENS, len(stream))).astype("<i4").data)
    return digest.hexdigest()


class _IndexedFile(TokenFile):
    """Tokens with an index of another's beside them, which may say what cannot be."""

    @property
    @abstractmethod
    def index(self) -> Path:
        """Where documents end is told there."""

    @abstractmethod
    def _ends(self, start: int, stop: int) -> np.ndarray:
        """Where documents ``[start, stop)`` end, as the index has it."""

    @property
    def ends(self) -> np.ndarray:
        return self._rising(self._ends(0, self.documents))

    def document_end(self, number: int) -> int:
        first = max(0, number - 1)
        return int(self._rising(self._ends(first, min(number + 2, self.documents)))[number - first])

    def _rising(self, ends: np.ndarray) -> np.ndarray:
        if len(ends) and (ends[0] < 0 or ends[-1] > self.tokens or (ends[1:] < ends[:-1]).any()):
            raise self._damaged()
        return ends

    def _damaged(self) -> UserValueError:
        return UserValueError(
            f"{self.index} is damaged: documents of {self.path.name}, of {self.tokens} tokens, end before they begin, "
            f"or beyond it; {self.remedy}"
        )


class _MegatronFile(_IndexedFile):
    """A ``.bin`` with its ``.idx`` beside it."""

    def __init__(self, path: Path, dtype: np.dtype, tokens: int, sequences: int, indices: int) -> None:
        super().__init__(path, dtype, tokens, max(0, indices - 1), remedy="prepare it again")
        self.sequences = sequences

    @property
    def index(self) -> Path:
        return self.path.with_suffix(".idx")

    @classmethod
    def of(cls, path: Path) -> _MegatronFile:
        index = path.with_suffix(".idx")
        if not index.is_file():
            raise UserFileError(f"{index} is not there, and tells where documents of {path} end; legal: both")
        size = index.stat().st_size
        with index.open("rb") as opened:
            header = opened.read(_HEADER.size)
        if len(header) < _HEADER.size or not header.startswith(_MAGIC):
            raise UserValueError(f"{index} is no index of Megatron's (it begins with {header[:9]!r})")
        _, version, code, sequences, indices = _HEADER.unpack(header)
        if version != 1 or code not in _TYPES:
            raise UserValueError(f"{index} has version {version} and type {code}; legal: 1, and {sorted(_TYPES)}")
        least = _HEADER.size + 12 * sequences + 8 * indices
        if size not in (least, least + sequences):  # with a mode of each sequence
            raise UserValueError(f"{index} has {size} bytes, and {least} by its header: it is cut short or damaged")
        dtype = np.dtype(_TYPES[code])
        made = cls(path, dtype, path.stat().st_size // dtype.itemsize, sequences, indices)
        end = int(made._offsets[-1]) + int(made._lengths[-1]) * dtype.itemsize if sequences else 0
        if path.stat().st_size != end:
            raise UserValueError(f"{path} has {path.stat().st_size} bytes, and {end} by its index: it is cut short")
        return made

    @property
    def _lengths(self) -> np.ndarray:
        return self._part("<i4", self.sequences, 0)

    @property
    def _offsets(self) -> np.ndarray:
        return self._part("<i8", self.sequences, 4 * self.sequences)

    @property
    def _firsts(self) -> np.ndarray:
        """The sequence at which each document begins, and the end."""
        return self._part("<i8", self.documents + 1, 12 * self.sequences)

    def _part(self, dtype: str, count: int, offset: int) -> np.ndarray:
        return np.memmap(self.index, dtype, "r", _HEADER.size + offset, (count,))

    def _ends(self, start: int, stop: int) -> np.ndarray:
        following = self._firsts[start + 1 : stop + 1]
        if ((following < 0) | (following > self.sequences)).any():
            raise self._damaged()
        ends, inside = np.full(len(following), self.tokens), following < self.sequences
        ends[inside] = self._offsets[following[inside]] // self.dtype.itemsize
        return ends


class _DatatroveFile(_IndexedFile):
    """A ``.ds`` with its ``.ds.index`` beside it."""

    @property
    def index(self) -> Path:
        return _with(self.path, ".index")

    def _ends(self, start: int, stop: int) -> np.ndarray:
        return self._mapped(self.index, np.dtype("<u8"), self.documents).view("<i8")[start:stop]


def _datatrove_file(path: Path) -> _DatatroveFile:
    index, loss, metadata = (_with(path, suffix) for suffix in (".index", ".loss", ".metadata"))
    if not index.is_file():
        raise UserFileError(f"{index} is not there, and tells where documents of {path} end; legal: both")
    documents, rest = divmod(index.stat().st_size, 8)
    size = path.stat().st_size
    if rest:
        raise UserValueError(f"{index} has {8 * documents + rest} bytes, 8 for each document: it is cut short")
    tokens = int(np.memmap(index, "<u8", "r")[-1]) if documents else 0
    width = _width(metadata) or (size // tokens if tokens else 2)
    if width not in (2, 4) or size != tokens * width:
        raise UserValueError(f"{path} has {size} bytes for {tokens} tokens by its index: one of both is cut short")
    dtype = np.dtype("<u2" if width == 2 else "<u4")
    remedy = "prepare it again"
    return _DatatroveFile(path, dtype, tokens, documents, loss if loss.is_file() else None, remedy)


def _with(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _width(metadata: Path) -> int | None:
    """Bytes of a token, where the metadata says it."""
    if not metadata.is_file():
        return None
    _, bar, width = metadata.read_text("utf-8", "replace").partition("\n")[0].rpartition("|")
    return int(width) if bar and width.isdigit() else None
