"""The cache of prepared data: written by one process of a node, opened by all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning_tex.data.corpus import Documents, Source, fingerprint
from lightning_tex.data.documents import TextEncoder, TextRows
from lightning_tex.data.fitted import fit, fit_key, open_fitted
from lightning_tex.data.local_files import CACHE_TAG
from lightning_tex.data.packing import Blocks, Samples, stream_fingerprint
from lightning_tex.data.tokenizer import TextTokenizer, quiet_forks, texts_of, tokenizer_file, train_bpe
from lightning_tex.data.tokens import Tokens
from lightning_tex.data.tokens.foreign import foreign_files, open_foreign, sampled_fingerprint
from lightning_tex.data.tokens.store import open_shards
from lightning_tex.data.tokens.writing import write_tokens

_FORMAT = "1"  # of tokenizers; raise it when the same settings no longer give the same files
_TOKENS = "2"  # the same, of tokens


Packing = Literal["cut", "fit"]


def default_cache_dir() -> Path:
    """``$LIGHTNING_TEX_CACHE``, else ``lightning_tex`` in ``$XDG_CACHE_HOME`` or in ``~/.cache``."""
    own = os.environ.get("LIGHTNING_TEX_CACHE")
    parent = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(own if own else Path(parent) / "lightning_tex").expanduser()


def mark_as_cache(folder: Path) -> None:
    """One that lies among the data must not be taken for more of it."""
    tag = folder / CACHE_TAG
    if not tag.exists():
        folder.mkdir(parents=True, exist_ok=True)
        tag.write_text("Signature: 8a477f597d28d172789f06886806bc55\n")


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Lets ``build`` fill a folder unless it exists; it appears complete, also if several processes build it."""
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        build(draft)
        draft.chmod(0o755)
        _rename(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _rename(draft: Path, folder: Path) -> None:
    try:
        draft.rename(folder)
    except OSError:
        if not folder.exists():  # else another process was faster, with the same content
            raise


class Prepared(ABC):
    """Data that is ready to be read.

    Attributes:
        tokenizer: whose tokens they are.
        fingerprint: of the training data: depends on what it is, and not on where it lies.
        train, validation, test: samples; None: there are none, or only while they are streamed.
    """

    tokenizer: TextTokenizer
    fingerprint: str
    train: Samples | None = None
    validation: Samples | None = None
    test: Samples | None = None

    def describe(self) -> list[str]:
        """What there is of each part, in words."""
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        return [f"{name}: {samples}" for name, samples in parts.items() if samples is not None]


class Preparing(ABC):
    """How data is prepared: the seam between a data module and where its samples come from.

    Attributes:
        tokenizer: its file, folder or repository; None: one is trained.
    """

    tokenizer: str | None

    @abstractmethod
    def run(self, cache_dir: Path, hub_cache_dir: Path | None, processes: int | None) -> Prepared:
        """Make what the cache lacks, with others that do so at the same time, and note there what answers this.

        Args:
            cache_dir: of prepared data.
            hub_cache_dir: where downloads are kept; None: as ``datasets`` has it.
            processes: of this machine; None: as many as it has processors for this process.
        """

    @abstractmethod
    def open(self, cache_dir: Path) -> Prepared | None:
        """What :meth:`run` last made; None if it never did."""


class Notes:
    """Which folders of a cache answer which settings.

    Args:
        cache_dir: of prepared data.
        settings: all that decides what is prepared.
    """

    def __init__(self, cache_dir: Path, settings: Any) -> None:
        self.file = cache_dir / "notes" / f"{fingerprint([_TOKENS, json.dumps(settings, sort_keys=True)])}.json"

    def read(self) -> dict[str, Any] | None:
        """The last one; None: there is none that is whole."""
        try:
            note: dict[str, Any] = json.loads(self.file.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return note

    def write(self, note: dict[str, Any]) -> None:
        """Put a new one in its place."""
        write_whole(self.file, json.dumps(note))


def write_whole(file: Path, text: str) -> None:
    """A file that appears complete."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as draft:
        draft.write(text)
    os.replace(draft.name, file)


@dataclass(frozen=True)
class Preparation(Preparing):
    """All that decides what the prepared data is.

    Args:
        source: what to read.
        tokenizer: file or folder of a tokenizer; None: train one on the training documents.
        vocab_size: of the tokenizer to be trained.
        end_of_document: the token of that name, see :class:`~lightning_tex.data.tokenizer.TextTokenizer`.
        sequence_length: S.
        packing: "cut" documents at the borders of blocks, or "fit" whole ones into rows.
    """

    source: Source
    tokenizer: str | None
    vocab_size: int
    end_of_document: str | None
    sequence_length: int
    packing: Packing = field(default="cut", repr=False)  # a stream's fingerprint is of the rest

    def run(self, cache_dir: Path, hub_cache_dir: Path | None, processes: int | None = None) -> PreparedText:
        mark_as_cache(cache_dir)
        documents = self.source.load(cache_dir / "sources", hub_cache_dir)
        with self.source.reading():
            tokenizer_dir = self._tokenizer_dir(documents, cache_dir)
        note = {"tokenizer": str(tokenizer_dir)}
        if not self.source.streaming:
            with self.source.reading():
                folder = self._write(documents, tokenizer_dir, cache_dir, processes)
            note |= {"tokens": str(folder), "fingerprint": self._fingerprint(folder)}
        quiet_forks()
        self._notes(cache_dir).write(note)
        return PreparedText(self, note, cache_dir)

    def open(self, cache_dir: Path) -> PreparedText | None:
        note = self._notes(cache_dir).read()
        return None if note is None else PreparedText(self, note, cache_dir)

    def _tokenizer_dir(self, documents: Documents, cache_dir: Path) -> Path:
        if self.tokenizer is not None:
            return tokenizer_file(self.tokenizer).resolve()

        def build(folder: Path) -> None:
            train_bpe(texts_of(documents.train), self.vocab_size).save(str(folder / "tokenizer.json"))

        key = fingerprint([_FORMAT, documents.key, str(self.vocab_size), repr(self.source)])
        return build_once(cache_dir / "tokenizers" / key, build)

    def _write(self, documents: Documents, tokenizer_dir: Path, cache_dir: Path, processes: int | None) -> Path:
        tokenizer = TextTokenizer.from_file(tokenizer_dir, self.end_of_document)
        parts = {"train": documents.train, "validation": documents.validation, "test": documents.test}
        rows = {name: TextRows(part) for name, part in parts.items() if part is not None}
        key = fingerprint([_TOKENS, documents.key, tokenizer.fingerprint, repr(self.source)])
        return write_tokens(cache_dir / "tokens" / key, rows, TextEncoder(tokenizer), processes)

    def _fingerprint(self, folder: Path) -> str:
        """Of the training tokens and S, which is computed once."""
        file = folder / f"fingerprint-{self.sequence_length}"
        if not file.exists():
            write_whole(file, stream_fingerprint(_opened(folder, "train"), self.sequence_length))
        return file.read_text()

    def _notes(self, cache_dir: Path) -> Notes:
        return Notes(cache_dir, asdict(self))


class PreparedText(Prepared):
    """Text in the cache: blocks, unless it is streamed.

    The fingerprint is that of the training tokens and S (of the settings where the data is streamed).
    """

    def __init__(self, preparation: Preparation, note: dict[str, Any], cache_dir: Path) -> None:
        self.tokenizer = TextTokenizer.from_file(note["tokenizer"], preparation.end_of_document)
        self.fingerprint = note.get("fingerprint") or fingerprint([repr(preparation), self.tokenizer.fingerprint])
        if "tokens" in note:
            folder = Path(note["tokens"])
            parts = {
                name: _opened(folder, name) for name in ("train", "validation", "test") if (folder / name).exists()
            }
            self._take(parts, preparation, cache_dir)

    def _take(self, parts: dict[str, Tokens], preparation: Preparation, cache_dir: Path) -> None:
        """Samples of streams of tokens, by the names of their parts."""
        length, end, size = preparation.sequence_length, self.tokenizer.end_of_document_id, self.tokenizer.size
        if preparation.packing == "cut":
            for name, stream in parts.items():
                setattr(self, name, Blocks(stream, length, end, size, keep_tail=name != "train"))
            return
        self.fingerprint = fingerprint([self.fingerprint, preparation.packing])
        for name, stream in parts.items():
            folder = build_once(cache_dir / "fits" / fit_key(stream, length), partial(fit, stream, length))
            setattr(self, name, open_fitted(stream, folder, length, size, end))


class TokenizedPreparation(Preparation):
    """Of files whose tokens others have made, which are read as they lie: there is nothing to prepare.

    Validation is on the last documents, ``validation_fraction`` of them.
    """

    def run(self, cache_dir: Path, hub_cache_dir: Path | None, processes: int | None = None) -> PreparedText:
        prepared = self.open(cache_dir)
        assert prepared is not None
        return prepared

    def open(self, cache_dir: Path) -> PreparedText | None:
        assert self.tokenizer is not None
        return PreparedTokens(self, {"tokenizer": str(tokenizer_file(self.tokenizer).resolve())}, cache_dir)


class PreparedTokens(PreparedText):
    """Blocks of tokens that others have made; the fingerprint is of samples of them."""

    def __init__(self, preparation: Preparation, note: dict[str, Any], cache_dir: Path) -> None:
        super().__init__(preparation, note, cache_dir)
        source, length = preparation.source, preparation.sequence_length
        stream = open_foreign(foreign_files(Path(str(source.path)).expanduser()))
        held_out = max(1, round(stream.documents * source.validation_fraction))
        train, validation = stream.divided(stream.documents - held_out)
        self.fingerprint = sampled_fingerprint(train, length)
        self._take({"train": train, "validation": validation}, preparation, cache_dir)


def _opened(folder: Path, part: str) -> Tokens:
    return open_shards(folder / part, f"delete the folder {folder}, and the data is prepared again")
