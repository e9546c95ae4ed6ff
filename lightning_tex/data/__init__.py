"""Text for language models: corpus, tokenizer, packed blocks, and the order in which samples are read.

Importing this needs neither ``datasets`` nor ``tokenizers``.
"""

from lightning_tex.data.module import TextDataModule
from lightning_tex.data.token_ids import require_token_ids

__all__ = ["TextDataModule", "require_token_ids"]
