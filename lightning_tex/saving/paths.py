"""Where checkpoints lie: names, what replaces what by one rename, and which directories are complete.

A checkpoint directory is written under a hidden name and renamed when it is complete, so its name never stands for half
of one. A name that is written again and again (``last.ckpt``) is a link to the newest, swapped by a rename.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

from lightning_tex.saving.manifest import MANIFEST, CorruptCheckpointError, Manifest

# Being written, perhaps by another run in the same folder; and given up, whosever it was.
_PARTIAL, _REMOVED = ".partial", ".removed"


def hidden(path: Path, ending: str = "") -> Path:
    """A new name beside ``path``, for a version of it."""
    return path.parent / f".{path.name}.{secrets.token_hex(4)}{ending}"


def partial_name(path: Path) -> Path:
    """A new name for what is to become ``path`` and is not complete yet."""
    return hidden(path, _PARTIAL)


def is_partial(path: Path) -> bool:
    """Whether this is the name of what is being written, or was given up."""
    return path.name.endswith((_PARTIAL, _REMOVED))


def stands_for(version: Path) -> Path | None:
    """The name that a hidden version was, or was to be, the content of; ``None``: it is no hidden version."""
    match = re.fullmatch(r"\.(.+)\.[0-9a-f]{8}", version.name)
    return version.parent / match[1] if match else None


def _is_version(entry: Path, path: Path) -> bool:
    pattern = rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}({re.escape(_PARTIAL)})?"
    return re.fullmatch(pattern, entry.name) is not None


def require_replaceable(path: Path) -> None:
    """Raise ``IsADirectoryError`` if a directory of somebody's is at ``path``, and not a checkpoint."""
    if path.is_dir() and not path.is_symlink() and not has_manifest(path) and any(path.iterdir()):
        raise IsADirectoryError(f"{path} is a directory, and not a checkpoint that could be replaced")


def versions(path: Path) -> list[Path]:
    """Hidden versions of what ``path`` stands for, partial ones too."""
    with suppress(FileNotFoundError, NotADirectoryError):
        return [entry for entry in path.parent.iterdir() if _is_version(entry, path)]
    return []


def remove_leftovers(path: Path) -> None:
    """Remove what was cut off: saves to ``path``, versions of it that no name leads to, removals in its folder."""
    current = path.resolve()
    for gone in path.parent.glob(f".*{_REMOVED}"):
        if re.search(rf"\.[0-9a-f]{{8}}{re.escape(_REMOVED)}$", gone.name):
            shutil.rmtree(gone, ignore_errors=True)
    for version in versions(path):
        if version.name.endswith(_PARTIAL) or (os.path.lexists(path) and version.resolve() != current):
            remove(version)


def install(new: Path, path: Path, linked: bool) -> None:
    """Let ``path`` stand for what ``new`` holds, by one rename; then remove what it stood for.

    Args:
        new: a complete checkpoint directory on the same file system.
        linked: make ``path`` a link from the start, since it will be written again. A name that exists becomes one.
    """
    if not linked and not os.path.lexists(path):
        os.rename(new, path)
        sync(path.parent)
        return
    version = hidden(path)
    os.rename(new, version)
    before = path.resolve()
    if path.is_dir() and not path.is_symlink():
        # A directory with content cannot be replaced: for a moment only its hidden versions exist.
        os.rename(path, before := hidden(path))
    swap_link(version.name, path)
    if _is_version(before, path):
        remove(before)


def replace_by_file(new: Path, path: Path) -> None:
    """Let ``path`` be the file ``new`` by one rename, and remove what a link or directory there stood for."""
    before = path.resolve() if path.is_symlink() else None
    if path.is_dir() and not path.is_symlink():
        os.rename(path, before := hidden(path))
    with new.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(new, path)
    sync(path.parent)
    if before is not None and _is_version(before, path):
        remove(before)


def link(target: Path, path: Path) -> None:
    """Let ``path`` lead to the checkpoint ``target``, and remove what it stood for alone."""
    require_replaceable(path)
    before = path.resolve()
    if path.is_dir() and not path.is_symlink():
        os.rename(path, before := hidden(path))
    swap_link(os.path.relpath(target.absolute(), path.parent.absolute()), path)
    if _is_version(before, path):
        remove(before)


def swap_link(target: str, link: Path) -> None:
    """Make ``link`` lead to ``target``, relative to its folder, by one rename."""
    new = hidden(link, _PARTIAL)
    os.symlink(target, new)
    os.replace(new, link)
    sync(link.parent)


def sync(folder: Path) -> None:
    """Bring a folder's names to disk, where its file system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, a directory, or a link with the version behind it, if there is one.

    A directory loses its name first, so that it is never seen in part.
    """
    if path.is_symlink():
        behind = path.resolve()
        path.unlink()
        if behind.parent == path.parent.resolve() and _is_version(behind, path):
            remove(behind)
    elif path.is_dir():
        gone = hidden(path, _REMOVED)
        os.rename(path, gone)
        shutil.rmtree(gone, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# --- which are complete


def has_manifest(path: Path) -> bool:
    """Whether a directory was, at least once, a complete checkpoint."""
    return (path / MANIFEST).is_file()


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint directory, whose files are not looked at.

    Raises:
        CorruptCheckpointError: there is none, or it is damaged.
    """
    try:
        return Manifest.from_bytes((path / MANIFEST).read_bytes(), path / MANIFEST)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CorruptCheckpointError(
            f"{path / MANIFEST}: expected the manifest of a complete checkpoint, found none"
        ) from error


def manifest_of(path: Path) -> Manifest:
    """The manifest of a checkpoint directory that is complete by it.

    Raises:
        CorruptCheckpointError: there is none, or it is damaged, or a file is missing or of another size.
    """
    manifest = read_manifest(path)
    for name, record in manifest.files.items():
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        if size != record.bytes:
            found = "none" if size is None else f"{size}"
            raise CorruptCheckpointError(f"{file}: expected {record.bytes} bytes, found {found}")
    return manifest
