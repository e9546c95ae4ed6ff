"""What Lightning calls: the strategy, its processes and mesh, the order of a train step, precision, checkpoints."""

from lightning_tex.strategy.tex_moe import TexMoEStrategy

__all__ = ["TexMoEStrategy"]
