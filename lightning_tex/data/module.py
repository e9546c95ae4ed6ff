"""Where 0.1 had ``TextDataModule``: configurations that it saved name this path. Import it from ``lightning_tex``."""

from lightning_tex.data.text import TextDataModule

__all__ = ["TextDataModule"]
