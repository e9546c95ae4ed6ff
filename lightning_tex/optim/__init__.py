"""The sharded, tiled optimizer."""

from lightning_tex.optim.state_config import OptimizerStateConfig
from lightning_tex.optim.tiled import TiledOptimizer

__all__ = ["OptimizerStateConfig", "TiledOptimizer"]
