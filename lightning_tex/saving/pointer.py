"""The small file that a name is where there are no links: it leads to the directory that the name stands for."""

from __future__ import annotations

import json
from pathlib import PurePosixPath

from lightning_tex.saving.manifest import digest

_LEADS_TO, _DIGEST = "lightning_tex_leads_to", "xxh3_128"

# A file of more bytes is no pointer.
MOST_BYTES = 4096


def to_bytes(target: str) -> bytes:
    """The file that leads to ``target``, a name beside it."""
    return json.dumps({_LEADS_TO: target, _DIGEST: digest(target.encode())}).encode() + b"\n"


def target_of(text: bytes) -> str | None:
    """The name that a file leads to; ``None``: it is no pointer, or not what was written."""
    try:
        body = json.loads(text)
        target = body[_LEADS_TO]
        whole = text == to_bytes(target) and PurePosixPath(target).name == target
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return target if whole else None
