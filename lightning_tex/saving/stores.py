"""Which store a checkpoint lies in."""

from __future__ import annotations

from pathlib import Path
from typing import Any, overload

from lightning_tex.saving.local_store import LocalStore
from lightning_tex.saving.remote_path import Location, RemotePath
from lightning_tex.saving.remote_store import RemoteStore
from lightning_tex.saving.store import Store


@overload
def store_of(path: Path) -> LocalStore: ...
@overload
def store_of(path: RemotePath) -> RemoteStore: ...
@overload
def store_of(path: Location) -> Store[Any]: ...
def store_of(path: Location) -> Store[Any]:
    """The store that knows this kind of name."""
    return RemoteStore() if isinstance(path, RemotePath) else LocalStore()
