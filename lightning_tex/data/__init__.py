"""Text for language models: corpus, tokenizer, packed blocks, and the order in which samples are read.

Importing this needs neither ``datasets`` nor ``tokenizers``.
"""

from lightning_tex.data.module import TextDataModule

__all__ = ["TextDataModule"]
