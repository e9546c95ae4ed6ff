"""What Lightning calls: the strategy, its processes and mesh, the order of a train step, precision, checkpoints."""

from lightning_tex.resilience.spikes import SpikeRule
from lightning_tex.strategy.tex_moe import TexMoEStrategy

__all__ = ["SpikeRule", "TexMoEStrategy"]
