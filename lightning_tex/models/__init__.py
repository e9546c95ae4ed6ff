"""Models built of TEX layers."""

from lightning_tex.models.block import Block
from lightning_tex.models.config import DecoderConfig
from lightning_tex.models.decoder import Decoder
from lightning_tex.models.language_model import LanguageModel

__all__ = ["Block", "Decoder", "DecoderConfig", "LanguageModel"]
