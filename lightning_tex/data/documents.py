"""Documents as rows to be encoded: the text of each, followed by the end of document."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lightning_tex.data.damage import require_texts
from lightning_tex.data.tokenizer import TextTokenizer
from lightning_tex.data.tokens.store import token_dtype
from lightning_tex.data.tokens.writing import Encoded

if TYPE_CHECKING:
    import datasets


class TextRows:
    """The column ``text`` of a ``datasets`` object that lies on disk.

    Args:
        documents: with that column.
    """

    def __init__(self, documents: datasets.Dataset) -> None:
        self.documents = documents
        whole = max(1, documents.data.num_rows)  # more than these rows, where they are a selection
        self.size = documents.data.nbytes * len(documents) // whole

    def __len__(self) -> int:
        return len(self.documents)

    def read(self, start: int, stop: int) -> list[str]:
        texts: list[str] = self.documents[start:stop]["text"]
        return texts


class TextEncoder:
    """Texts to tokens.

    Args:
        tokenizer: encodes them, each followed by its end-of-document token.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer
        self.dtype = token_dtype(tokenizer.size)

    def encode(self, rows: list[str], first: int) -> Encoded:
        require_texts(rows, first)
        return Encoded([np.array(ids, self.dtype) for ids in self.tokenizer.encode_documents(rows)])
