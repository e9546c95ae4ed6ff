"""The rotary embedding in configurations of transformers: all in ``rope_parameters`` since version 5, apart before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_tex.models.config import DecoderConfig

# Ways of stretching that need to know how long sequences were before.
_FROM_A_LENGTH = ("dynamic", "llama3", "yarn", "longrope")
_ORIGINAL = "original_max_position_embeddings"


def read_rope(theirs: Mapping[str, Any], base: float, partial: float = 1.0) -> dict[str, Any]:
    """The arguments of :class:`DecoderConfig`.

    Args:
        theirs: ``config.json``.
        base, partial: of a file that does not say them: of what the angles are powers, and the part that turns.
    """
    rope = dict(theirs.get("rope_parameters") or theirs.get("rope_scaling") or {})
    kind = rope.pop("type", "default")
    kind = rope.pop("rope_type", kind)
    partial = rope.pop("partial_rotary_factor", None) or theirs.get("partial_rotary_factor") or partial
    base = rope.pop("rope_theta", None) or theirs.get("rope_theta") or base
    scaling = None
    if kind != "default":
        scaling = {"rope_type": kind, **{name: value for name, value in rope.items() if value is not None}}
        if kind in _FROM_A_LENGTH:
            scaling.setdefault(_ORIGINAL, theirs.get(_ORIGINAL) or theirs.get("max_position_embeddings"))
    return {"rope_base": float(base), "partial_rotary_factor": float(partial), "rope_scaling": scaling}


def write_rope(config: DecoderConfig, partial: float = 1.0) -> dict[str, Any]:
    """Keys that :func:`read_rope` reads: for version 5, and the base for those before; ``partial`` needs no word."""
    rope = {"rope_type": "default", **(config.rope_scaling or {}), "rope_theta": config.rope_base}
    if config.partial_rotary_factor != partial:
        rope["partial_rotary_factor"] = config.partial_rotary_factor
    return {"rope_parameters": rope, "rope_theta": config.rope_base}
