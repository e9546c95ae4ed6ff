"""Checkpoints: a directory that every rank writes its part of, or one plain file; either loads on any layout.

Public is what this module offers: for users :func:`load_from_checkpoint`, :func:`latest`, :func:`consolidate`,
:func:`consolidated` and :class:`CorruptCheckpointError`; for a strategy the seam :class:`CheckpointFormat` with its two
forms, what saves beside training, the :class:`Search` for what to resume from, and where all that lies: names
(:func:`at`) and what is done with them (:func:`store_of`). All other modules are this room's
own.
"""

from lightning_tex.saving.background import Background
from lightning_tex.saving.checkpoint_format import CheckpointFormat, ShardedRun
from lightning_tex.saving.consolidate import consolidate, consolidated
from lightning_tex.saving.directory import DirectoryCheckpoint
from lightning_tex.saving.disk import require_writable
from lightning_tex.saving.loading import load_from_checkpoint, located, reading_format
from lightning_tex.saving.manifest import CorruptCheckpointError, RefusedCheckpointError
from lightning_tex.saving.newest import Place, SavedState, Search, exactly, find, latest
from lightning_tex.saving.plain import PlainCheckpoint
from lightning_tex.saving.remote_path import Location, RemotePath, at
from lightning_tex.saving.side_group import SideGroup
from lightning_tex.saving.stores import store_of

__all__ = [
    "Background",
    "CheckpointFormat",
    "CorruptCheckpointError",
    "DirectoryCheckpoint",
    "Location",
    "Place",
    "PlainCheckpoint",
    "RefusedCheckpointError",
    "RemotePath",
    "SavedState",
    "Search",
    "ShardedRun",
    "SideGroup",
    "at",
    "consolidate",
    "consolidated",
    "exactly",
    "find",
    "latest",
    "load_from_checkpoint",
    "located",
    "reading_format",
    "require_writable",
    "store_of",
]
