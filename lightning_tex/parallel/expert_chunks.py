"""In how many chunks a MoE layer's tokens travel: what a user asks for, and what comes of it on a layout."""

from __future__ import annotations

from typing import Literal

from lightning_tex.parallel.errors import UserValueError
from lightning_tex.parallel.layout import Layout

# Values of the strategy's option of this name.
ExpertChunks = int | Literal["auto"]

# Of "auto", where links are slow. Each chunk more hides less of them than the one before, and makes products smaller.
SEVERAL = 2


def require_legal_chunks(chunks: ExpertChunks) -> None:
    """Refuse what is no number of chunks.

    Raises:
        ValueError: naming the option and what is legal.
    """
    if chunks != "auto" and (not isinstance(chunks, int) or isinstance(chunks, bool) or chunks < 1):
        raise UserValueError(f"expert_chunks={chunks!r}; legal: a whole number of at least 1, or 'auto'")


def chunks_on(layout: Layout, chunks: ExpertChunks, ranks_per_node: int) -> int:
    """The number of chunks on a layout; ``"auto"``: several where the expert axis leaves nodes."""
    if chunks != "auto":
        return chunks
    return SEVERAL if layout.leaves_nodes("expert", ranks_per_node) else 1
