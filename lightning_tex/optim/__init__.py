"""The sharded, tiled optimizer."""

from lightning_tex.optim.tiled import TiledOptimizer

__all__ = ["TiledOptimizer"]
