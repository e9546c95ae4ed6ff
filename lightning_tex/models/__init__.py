"""Models built of TEX layers."""

from lightning_tex.models.decoder import Block, Decoder, DecoderConfig

__all__ = ["Block", "Decoder", "DecoderConfig"]
