"""Names of checkpoints: which are hidden, which version belongs to which name, and which directories are complete.

A checkpoint directory is written under a hidden name, so its name never stands for half of one. How a name comes to
stand for it is the store's (:mod:`.store`).
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from lightning_tex.saving.manifest import MANIFEST, CorruptCheckpointError, Manifest
from lightning_tex.saving.remote_path import Location, RemotePath

_Place = TypeVar("_Place", Path, RemotePath, Location)

# Of letters, as Lightning numbers SLURM's checkpoints by all digits of a name in their folder; once they had digits.
TOKEN = "[0-9a-p]{8}"
_LETTERS = str.maketrans("0123456789", "ghijklmnop")
# Being written, perhaps by another run in the same folder; and given up, whosever it was.
PARTIAL, REMOVED = ".partial", ".removed"


def hidden(path: _Place, ending: str = "") -> _Place:
    """A new name beside ``path``, for a version of it."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4).translate(_LETTERS)}{ending}")


def partial_name(path: _Place) -> _Place:
    """A new name for what is to become ``path`` and is not complete yet."""
    return hidden(path, PARTIAL)


def is_partial(path: Location) -> bool:
    """Whether this is the name of what is being written, or was given up."""
    return path.name.endswith((PARTIAL, REMOVED))


def stands_for(version: _Place) -> _Place | None:
    """The name that a hidden version was, or was to be, the content of; ``None``: it is no hidden version."""
    match = re.fullmatch(rf"\.(.+)\.{TOKEN}", version.name)
    return version.with_name(match[1]) if match else None


def is_version(entry: Location, path: Location) -> bool:
    """Whether ``entry`` is the name of a hidden version of ``path``, perhaps a partial one."""
    pattern = rf"\.{re.escape(path.name)}\.{TOKEN}({re.escape(PARTIAL)})?"
    return re.fullmatch(pattern, entry.name) is not None


def versions(path: _Place) -> list[_Place]:
    """Hidden versions of what ``path`` stands for, partial ones too."""
    with suppress(FileNotFoundError, NotADirectoryError):
        return [entry for entry in path.parent.iterdir() if is_version(entry, path)]
    return []


def entries(folder: Location) -> list[Location]:
    """What lies in a folder, by name."""
    found: list[Location] = list(folder.iterdir())
    return sorted(found, key=str)


def is_taken(path: Location) -> bool:
    """Whether something has this name, be it a link to nothing."""
    return path.exists() if isinstance(path, RemotePath) else os.path.lexists(path)


def require_replaceable(path: Location) -> None:
    """Raise ``IsADirectoryError`` if a directory of somebody's is at ``path``, and not a checkpoint."""
    is_link = isinstance(path, Path) and path.is_symlink()
    if not is_link and path.is_dir() and not has_manifest(path) and any(path.iterdir()):
        raise IsADirectoryError(f"{path} is a directory, and not a checkpoint that could be replaced")


# --- which are complete


def behind(path: Location) -> Location:
    """Where the files of a checkpoint lie: a pointer leads there; links of a mounted file system lead there by itself.

    Raises:
        CorruptCheckpointError: ``path`` is a link to nothing.
    """
    if isinstance(path, RemotePath):
        return path.resolve()
    if path.is_symlink() and not path.exists():
        raise CorruptCheckpointError(f"{path} is a link to {os.readlink(path)}, where there is nothing")
    return path


def size(path: Location) -> int:
    """Of a file that is there, in bytes."""
    return (path.size() or 0) if isinstance(path, RemotePath) else path.stat().st_size


def modified(path: Location) -> float:
    """When a file was written, in seconds since 1970."""
    return path.modified() if isinstance(path, RemotePath) else path.stat().st_mtime


def has_manifest(path: Location) -> bool:
    """Whether a directory was, at least once, a complete checkpoint."""
    return ((path.resolve() if isinstance(path, RemotePath) else path) / MANIFEST).is_file()


def is_directory(path: Location) -> bool:
    """Whether what lies there, behind links and pointers, is a directory; web servers only know of those with files."""
    return (path.resolve() if isinstance(path, RemotePath) else path).is_dir() or has_manifest(path)


def read_manifest(path: Location) -> Manifest:
    """The manifest of a checkpoint directory, whose files are not looked at.

    Raises:
        CorruptCheckpointError: there is none, or it is damaged.
    """
    file = behind(path) / MANIFEST
    try:
        return Manifest.from_bytes(file.read_bytes(), file)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CorruptCheckpointError(f"{file}: expected the manifest of a complete checkpoint, found none") from error


def manifest_of(path: Location) -> Manifest:
    """The manifest of a checkpoint directory that is complete by it.

    Raises:
        CorruptCheckpointError: there is none, or it is damaged, or a file is missing or of another size.
    """
    manifest, folder = read_manifest(path), behind(path)
    sizes = _sizes(folder, manifest.files)
    for name, record in manifest.files.items():
        if sizes[name] != record.bytes:
            found = "none" if sizes[name] is None else f"{sizes[name]}"
            raise CorruptCheckpointError(f"{folder / name}: expected {record.bytes} bytes, found {found}")
    return manifest


def _sizes(folder: Location, names: Mapping[str, object]) -> Mapping[str, int | None]:
    if isinstance(folder, RemotePath):
        return folder.sizes(names.keys())
    files = {name: folder / name for name in names}
    return {name: file.stat().st_size if file.is_file() else None for name, file in files.items()}
