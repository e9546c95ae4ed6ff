"""Data for language models: sources, tokenizer, tokens on disk, samples, and the order in which they are read.

Importing this needs neither ``datasets`` nor ``tokenizers``.
"""

from lightning_tex.data.finetuning import FineTuningDataModule
from lightning_tex.data.mixture import MixtureDataModule, TextSource
from lightning_tex.data.on_data_axis import on_data_axis
from lightning_tex.data.text import TextDataModule
from lightning_tex.data.token_data import TokenDataModule
from lightning_tex.data.token_ids import require_token_ids

__all__ = [
    "FineTuningDataModule",
    "MixtureDataModule",
    "TextDataModule",
    "TextSource",
    "TokenDataModule",
    "on_data_axis",
    "require_token_ids",
]
