"""The sharded, tiled optimizer."""

from lightning_tex.optim.storage import Storage
from lightning_tex.optim.tiled import TiledOptimizer

__all__ = ["Storage", "TiledOptimizer"]
