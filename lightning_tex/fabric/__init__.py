"""The strategy for ``lightning.fabric.Fabric``: a training loop of one's own over the same sharded model and step."""

from lightning_tex.fabric.tex_moe import TexMoEStrategy

__all__ = ["TexMoEStrategy"]
