"""Which local files a path names, and in which form they are."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning_tex.parallel.errors import UserFileError, UserValueError

BUILDERS = {
    "text": {".txt", ".md", ".rst", ".text"},
    "json": {".jsonl", ".json"},
    "csv": {".csv"},
    "parquet": {".parquet"},
    "arrow": {".arrow"},
}
_OPTIONS: dict[str, dict[str, Any]] = {
    "text": {"sample_by": "document"},
    "csv": {"keep_default_na": False},  # "null" and nothing are texts
}
# Marks a folder as a cache, for us as for programs that back up (bford.info/cachedir).
CACHE_TAG = "CACHEDIR.TAG"
_KNOWN_SUFFIXES = ", ".join(sorted(suffix for suffixes in BUILDERS.values() for suffix in suffixes))
# What ``datasets`` writes by ``save_to_disk``, beside the files of a data set, and of one with several splits.
_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"


def builder_of(path: str, data_files: Any) -> tuple[str, Any, dict[str, Any]]:
    """The path, data files and options for ``load_dataset``; what a local path holds is told by the names of files.

    Args:
        path: of the user.
        data_files: of the user; None: all of the path.

    Raises:
        ValueError: files of several kinds.
        FileNotFoundError: an empty folder.
    """
    local = Path(path).expanduser()
    if data_files is None and local.exists():
        path, data_files = _saved(local) or _local_files(local)
    return path, data_files, dict(_OPTIONS.get(path, {}))


def _saved(path: Path) -> tuple[str, Any] | None:
    """The files of a data set that was saved by ``datasets``; None: it is none."""
    if (path / _SAVED).is_file():
        return "arrow", sorted(str(file) for file in path.glob("*.arrow"))
    if not (path / _SAVED_SPLITS).is_file():
        return None
    splits = sorted(state.parent for state in path.glob(f"*/{_SAVED}"))
    return "arrow", {split.name: sorted(str(file) for file in split.glob("*.arrow")) for split in splits}


def _local_files(path: Path) -> tuple[str, list[str] | None]:
    files = sorted(_files_below(path)) if path.is_dir() else [path]
    if not files:
        raise UserFileError(f"the folder path={str(path)!r} is empty; legal: a folder with {_KNOWN_SUFFIXES} files")
    found = {kind: [str(f) for f in files if f.suffix.lower() in suffixes] for kind, suffixes in BUILDERS.items()}
    found = {kind: names for kind, names in found.items() if names}
    if not found:
        return str(path), None  # a data set in a form of its own, which load_dataset may know
    if len(found) > 1:
        counts = ", ".join(f"{len(names)} {kind}" for kind, names in found.items())
        raise UserValueError(
            f"{path} holds {counts} files; name one kind, e.g. path='text', data_files='{path}/**/*.txt'"
        )
    return next(iter(found.items()))


def _files_below(folder: Path) -> Iterator[Path]:
    """All but hidden ones and what caches hold, which is nobody's data."""
    for place, folders, names in os.walk(folder):
        if CACHE_TAG in names and Path(place) != folder:
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(place, name) for name in names if not name.startswith("."))


def named_files(data_files: Any) -> list[Path]:
    """The local files that ``data_files`` names, outright or by patterns."""
    if isinstance(data_files, dict):
        return [file for files in data_files.values() for file in named_files(files)]
    names: Iterable[str] = [data_files] if isinstance(data_files, str) else data_files or []
    return [path for name in names for path in map(Path, sorted(glob.glob(name, recursive=True))) if path.is_file()]


def file_stamps(data_files: Any) -> list[str]:
    """Name, size and time of every local file that ``data_files`` names outright, to notice that one was rewritten."""
    if isinstance(data_files, dict):
        return [stamp for files in data_files.values() for stamp in file_stamps(files)]
    names: Iterable[str] = [data_files] if isinstance(data_files, str) else data_files or []
    paths: Sequence[Path] = [path for path in map(Path, names) if path.is_file()]
    return [f"{path}:{path.stat().st_size}:{path.stat().st_mtime_ns}" for path in paths]
