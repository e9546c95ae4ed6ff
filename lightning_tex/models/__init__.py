"""Models built of TEX layers."""

from lightning_tex.models.decoder import Block, Decoder, DecoderConfig
from lightning_tex.models.language_model import LanguageModel

__all__ = ["Block", "Decoder", "DecoderConfig", "LanguageModel"]
