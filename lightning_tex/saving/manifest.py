"""What a checkpoint directory consists of: files with sizes and digests, tensors with the places of their elements.

Both are JSON, so reading them runs nothing. Digests (XXH3, 128 bits) detect corruption. They do not stop an attacker,
who can compute them; against one stands that no file is ever unpickled.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import xxhash

from lightning_tex.parallel.errors import UserValueError
from lightning_tex.parallel.extent import Extent

if TYPE_CHECKING:
    from lightning_tex.saving.remote_path import Location

MANIFEST = "manifest.json"
INDEX = "tensors.json"
# The version of a directory: of the manifest, the table of tensors, the rank files and our entry of meta.pt.
FORMAT = 1

# Elements are digested by the chunk, so that a rank which needs some of them reads and checks only these.
CHUNK_BYTES = 1 << 22
_READ_BYTES = 1 << 22


class CorruptCheckpointError(UserValueError):
    """A checkpoint is incomplete, or not what was written: which file, what was expected and what is there."""


class RefusedCheckpointError(CorruptCheckpointError):
    """Damage that all ranks heard of before anything was loaded.

    Args:
        message: for the user.
        problems: what is wrong, file by file.
    """

    def __init__(self, message: str, problems: list[str]) -> None:
        super().__init__(message)
        self.problems = problems


class FileRecord(NamedTuple):
    """What a file must be."""

    bytes: int
    xxh3_128: str


class StoredExtent(NamedTuple):
    """Where some elements of a tensor lie.

    Args:
        extent: which of the global tensor.
        file: name in the directory.
        start: byte of the first element; the others follow in row-major order.
        archive: first byte and length of the ``torch.save`` archive around them, as torch.distributed.checkpoint reads.
        chunks: digests of the elements, by :data:`CHUNK_BYTES`.
    """

    extent: Extent
    file: str
    start: int
    archive: tuple[int, int]
    chunks: tuple[str, ...]


@dataclass
class TensorRecord:
    """A saved tensor: its path of names, global shape, dtype, and the extents that make it up."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    extents: list[StoredExtent] = field(default_factory=list)


@dataclass(frozen=True)
class Manifest:
    """The file that is written last: a directory with one is complete.

    Args:
        step: optimizer steps done.
        epoch: epochs begun before this one.
        layout: sizes of the world and of its axes.
        versions: of what wrote it.
        written: when, in seconds since 1970.
        files: all others, by name.
    """

    step: int
    epoch: int
    layout: dict[str, int]
    versions: dict[str, str]
    written: float
    files: dict[str, FileRecord]

    def to_bytes(self) -> bytes:
        """As the file holds it, its own digest included."""
        body = {"format": FORMAT, **asdict(self), "files": {n: f._asdict() for n, f in self.files.items()}}
        return _text({**body, "xxh3_128": digest(_text(body))})

    @classmethod
    def from_bytes(cls, text: bytes, path: Location) -> Manifest:
        """Read what :meth:`to_bytes` gave.

        Args:
            path: for messages.

        Raises:
            CorruptCheckpointError: it is anything else.
        """
        try:
            body = json.loads(text)
            own = body.pop("xxh3_128")
            actual = digest(_text(body))
            if own != actual or text != _text({**body, "xxh3_128": own}):
                raise CorruptCheckpointError(f"{path}: expected xxh3_128 {own}, found {actual} or another spelling")
            version = body.pop("format")
            if version != FORMAT:
                raise CorruptCheckpointError(f"{path}: expected format {FORMAT}, found {version}")
            files = {_plain_name(name): FileRecord(**record) for name, record in body.pop("files").items()}
            return cls(**body, files=files)
        except CorruptCheckpointError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CorruptCheckpointError(
                f"{path}: expected a manifest, found {error or type(error).__name__}"
            ) from error


def digest(data: Any) -> str:
    """XXH3-128 of some bytes, in hexadecimal."""
    return xxhash.xxh3_128(data).hexdigest()


def file_record(path: Location) -> FileRecord:
    """Size and digest of a file as it is where it lies."""
    hasher, size = xxhash.xxh3_128(), 0
    with path.open("rb", buffering=0) as file:
        while data := file.read(_READ_BYTES):
            hasher.update(data)
            size += len(data)
    return FileRecord(size, hasher.hexdigest())


def difference(path: Location, expected: FileRecord, actual: FileRecord) -> str | None:
    """What is wrong with a file, or ``None``."""
    if expected.bytes != actual.bytes:
        return f"{path}: expected {expected.bytes} bytes, found {actual.bytes}"
    if expected != actual:
        return f"{path}: expected xxh3_128 {expected.xxh3_128}, found {actual.xxh3_128}"
    return None


def index_to_bytes(tensors: list[TensorRecord]) -> bytes:
    """The table of all tensors, as :data:`INDEX` holds it."""
    dtypes = {dtype: name for name, dtype in DTYPES.items()}
    return _text(
        [
            {
                "path": tensor.path,
                "shape": tensor.shape,
                "dtype": dtypes[tensor.dtype],
                "boxes": [[s.extent.offsets, s.extent.sizes, *s[1:]] for s in tensor.extents],
            }
            for tensor in tensors
        ]
    )


def index_from_bytes(text: bytes, files: dict[str, FileRecord]) -> list[TensorRecord]:
    """Read what :func:`index_to_bytes` gave; every place must lie in one of ``files``.

    Raises:
        CorruptCheckpointError: it says anything else.
    """
    try:
        return [_tensor(entry, files) for entry in json.loads(text)]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CorruptCheckpointError(f"{INDEX}: expected a table of tensors, found {error}") from error


def _tensor(entry: dict[str, Any], files: dict[str, FileRecord]) -> TensorRecord:
    dtype = DTYPES[entry["dtype"]]
    extents = []
    for offsets, sizes, file, start, archive, chunks in entry["boxes"]:
        extent = Extent(_numbers(offsets), _numbers(sizes))
        length = dtype.itemsize * extent.numel
        if not 0 <= start <= start + length <= files[file].bytes or len(chunks) != -(-length // CHUNK_BYTES):
            raise UserValueError(f"{entry['path']} lies outside {file}")
        extents.append(StoredExtent(extent, file, start, (archive[0], archive[1]), tuple(chunks)))
    return TensorRecord(tuple(map(str, entry["path"])), _numbers(entry["shape"]), dtype, extents)


def _numbers(values: list[Any]) -> tuple[int, ...]:
    if any(type(value) is not int or value < 0 for value in values):
        raise UserValueError(f"{values} are not sizes")
    return tuple(values)


def _plain_name(name: str) -> str:
    if PurePath(name).name != name or name in ("", ".", ".."):
        raise UserValueError(f"{name!r} is not the name of a file in the directory")
    return name


def _text(content: Any) -> bytes:
    return json.dumps(content, separators=(",", ":"), allow_nan=False).encode() + b"\n"


DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
        *(torch.complex64, torch.complex128),
    )
}
