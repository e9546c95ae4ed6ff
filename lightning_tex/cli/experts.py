"""``lightning-tex experts``: which tokens and documents go to which experts; or a model with more or fewer."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_tex.cli import grow


def main(words: Sequence[str]) -> None:
    """Run it.

    Args:
        words: what follows ``experts`` on the command line.
    """
    grow.COMMAND(words)
