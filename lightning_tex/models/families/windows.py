"""Windows on attention in some blocks, as the Qwen families configure them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_tex.models.config import DecoderConfig
from lightning_tex.parallel.errors import UserValueError


def read_windows(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of :class:`DecoderConfig`.

    Raises:
        ValueError: windows, and nothing that says in which blocks.
    """
    if not theirs.get("use_sliding_window"):
        return {}
    if theirs.get("sliding_window") is None or not theirs.get("layer_types"):
        raise UserValueError("a config.json with use_sliding_window needs sliding_window and layer_types")
    return {"sliding_window": theirs["sliding_window"], "layer_types": list(theirs["layer_types"])}


def write_windows(config: DecoderConfig) -> dict[str, Any]:
    """What :func:`read_windows` reads."""
    windows = [config.window(layer) for layer in range(config.num_layers)]
    if not any(windows):
        return {"use_sliding_window": False, "sliding_window": None, "layer_types": ["full_attention"] * len(windows)}
    kinds = ["sliding_attention" if window else "full_attention" for window in windows]
    return {"use_sliding_window": True, "sliding_window": config.sliding_window, "layer_types": kinds}
