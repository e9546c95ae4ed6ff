"""The tokenizer: a ``tokenizers`` file, or a byte-level BPE trained on the corpus."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_tex.data.corpus import fingerprint
from lightning_tex.data.damage import require_texts
from lightning_tex.parallel.errors import UserFileError, UserValueError

if TYPE_CHECKING:
    import tokenizers

END_OF_DOCUMENT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # every byte and the end of a document
TRAINING_BYTES = 50_000_000  # a vocabulary does not get better by more text than this
_KNOWN_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[SEP]", "<|im_end|>")


class TextTokenizer:
    """A ``tokenizers.Tokenizer`` with an end-of-document token.

    Args:
        tokenizer: the tokenizer itself.
        end_of_document: its token that ends a document; None: the first it has of the usual ones.

    Raises:
        ValueError: the tokenizer has no such token.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, end_of_document: str | None = None) -> None:
        # A document that spells out a special token must not be able to end itself.
        tokenizer.encode_special_tokens = True
        self.tokenizer = tokenizer
        self.end_of_document_id = _end_id(tokenizer, end_of_document)
        self.size: int = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.fingerprint = fingerprint([tokenizer.to_str(), str(self.end_of_document_id)])

    @classmethod
    def load(cls, name: str | Path, end_of_document: str | None = None) -> TextTokenizer:
        """That of a file or folder or, if there is none of this name, of a repository of the Hugging Face hub."""
        return cls.from_file(tokenizer_file(name), end_of_document)

    @classmethod
    def from_file(cls, path: str | Path, end_of_document: str | None = None) -> TextTokenizer:
        """Reads a ``tokenizers`` JSON file, or ``tokenizer.json`` in a folder."""
        return cls(_read(path), end_of_document)

    def encode(self, text: str) -> list[int]:
        """The tokens of one text, without an end of document. Safe in a forked worker."""
        with self.encoding():
            return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_documents(self, texts: list[str]) -> list[list[int]]:
        """The tokens of each text, followed by the end of document; uses all cores."""
        with self.encoding():
            encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [[*encoding.ids, self.end_of_document_id] for encoding in encodings]

    @contextmanager
    def encoding(self) -> Iterator[None]:
        """Around what encodes: a text that the tokenizer has no tokens for is told by name."""
        try:
            yield
        except Exception as error:  # tokenizers has no class for it
            raise UserValueError(
                f"the tokenizer has no tokens for this text ({error}); give one that is made for it, or none, and a "
                "byte-level BPE is trained"
            ) from error

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some tokens, end-of-document tokens spelled out; padding (negative ids) is left out."""
        return self.tokenizer.decode([int(i) for i in ids if int(i) >= 0], skip_special_tokens=False)


def _read(path: str | Path) -> tokenizers.Tokenizer:
    import tokenizers

    file = Path(path).expanduser()
    file = file / "tokenizer.json" if file.is_dir() else file
    if not file.is_file():
        raise UserFileError(
            f"tokenizer={str(path)!r} is neither a tokenizers JSON file nor a folder with tokenizer.json"
        )
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers has no class for it
        raise UserValueError(
            f"{file} is no tokenizers JSON file ({error}); fetch it again. One in the cache of prepared data is "
            f"made again when its folder is deleted: {file.parent}"
        ) from error


def vocabulary(path: str | Path) -> dict[str, int]:
    """Every token of a ``tokenizers`` JSON file with its number."""
    return dict(_read(path).get_vocab(with_added_tokens=True))


def is_hub_name(name: str | Path) -> bool:
    """Whether a tokenizer's name is that of a repository: no such file or folder, and of the form ``owner/name``."""
    parts = str(name).split("/")
    return not Path(name).expanduser().exists() and len(parts) == 2 and all(parts) and not str(name).endswith(".json")


def tokenizer_file(name: str | Path) -> Path:
    """Where a tokenizer's file lies; one of the hub is downloaded once, to where the hub's client keeps its files.

    Raises:
        FileNotFoundError: the hub cannot be reached, or has no such repository or no ``tokenizer.json`` in it.
    """
    if not is_hub_name(name):
        return Path(name).expanduser()
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(str(name), "tokenizer.json"))
    except Exception as error:  # the client has no common class for them
        reason = str(error).strip().partition("\n")[0]
        raise UserFileError(
            f"tokenizer={str(name)!r} is no file or folder here, and the Hugging Face hub gives no tokenizer.json of "
            f"that name ({type(error).__name__}: {reason})"
        ) from error


def _end_id(tokenizer: tokenizers.Tokenizer, wanted: str | None) -> int:
    candidates = (wanted,) if wanted else _KNOWN_ENDS
    ids = [tokenizer.token_to_id(token) for token in candidates]
    found = [i for i in ids if i is not None]
    if not found:
        special = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
        raise UserValueError(
            f"the tokenizer has no end-of-document token {' or '.join(candidates)}; "
            f"set end_of_document to one of its tokens, e.g. one of its special tokens: {', '.join(special) or 'none'}"
        )
    return found[0]


def train_bpe(texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = ()) -> tokenizers.Tokenizer:
    """A byte-level BPE of at most ``vocab_size`` tokens, from the first ``TRAINING_BYTES`` of the texts.

    Args:
        texts: to train on.
        vocab_size: with the special tokens.
        special_tokens: besides the end of a document.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT, *special_tokens],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_first_bytes(texts, TRAINING_BYTES), trainer)
    return tokenizer


def _first_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    for text in texts:
        if limit <= 0:
            return
        limit -= len(text.encode("utf-8", "replace"))
        yield text


def texts_of(documents: Any) -> Iterator[str]:
    """The texts of a ``datasets`` object, one by one.

    Raises:
        ValueError: a row holds no text.
    """
    row = 0
    for batch in documents.iter(batch_size=256):
        require_texts(batch["text"], row)
        yield from batch["text"]
        row += len(batch["text"])


def quiet_forks() -> None:
    # tokenizers prints a warning in every process forked after it has used its threads, unless this is set.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
