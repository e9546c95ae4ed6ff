"""The cache of prepared data: written by one process of a node, opened by all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_tex.data.corpus import CACHE_TAG, Documents, Source, fingerprint
from lightning_tex.data.packing import Blocks, write_blocks
from lightning_tex.data.tokenizer import TextTokenizer, quiet_forks, texts_of, tokenizer_file, train_bpe
from lightning_tex.parallel.errors import UserFileError, UserValueError

_FORMAT = "1"  # raise it when the same settings no longer give the same files


def default_cache_dir() -> Path:
    """``$LIGHTNING_TEX_CACHE``, else ``lightning_tex`` in ``$XDG_CACHE_HOME`` or in ``~/.cache``."""
    own = os.environ.get("LIGHTNING_TEX_CACHE")
    parent = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(own if own else Path(parent) / "lightning_tex").expanduser()


def _mark_as_cache(folder: Path) -> None:
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


@dataclass(frozen=True)
class Preparation:
    """All that decides what the prepared data is.

    Args:
        source: what to read.
        tokenizer: file or folder of a tokenizer; None: train one on the training documents.
        vocab_size: of the tokenizer to be trained.
        end_of_document: the token of that name, see :class:`~lightning_tex.data.tokenizer.TextTokenizer`.
        sequence_length: S.
    """

    source: Source
    tokenizer: str | None
    vocab_size: int
    end_of_document: str | None
    sequence_length: int

    def run(self, cache_dir: Path, hub_cache_dir: Path | None) -> Prepared:
        """Reads, tokenises and packs what the cache lacks, and notes there which files answer these settings."""
        _mark_as_cache(cache_dir)
        documents = self.source.load(cache_dir / "sources", hub_cache_dir)
        with self.source.reading():
            tokenizer_dir = self._tokenizer_dir(documents, cache_dir)
        note = {"tokenizer": str(tokenizer_dir)}
        if not self.source.streaming:
            note["blocks"] = str(self._write(documents, tokenizer_dir, cache_dir))
        quiet_forks()
        self._note(cache_dir, note)
        return Prepared(self, note)

    def open(self, cache_dir: Path) -> Prepared | None:
        """What :meth:`run` last prepared for these settings; None if it never did."""
        try:
            return Prepared(self, json.loads(self._note_file(cache_dir).read_text()))
        except (FileNotFoundError, json.JSONDecodeError):
            return None

    def _tokenizer_dir(self, documents: Documents, cache_dir: Path) -> Path:
        if self.tokenizer is not None:
            return tokenizer_file(self.tokenizer).resolve()

        def build(folder: Path) -> None:
            train_bpe(texts_of(documents.train), self.vocab_size).save(str(folder / "tokenizer.json"))

        key = fingerprint([_FORMAT, documents.key, str(self.vocab_size), repr(self.source)])
        return build_once(cache_dir / "tokenizers" / key, build)

    def _write(self, documents: Documents, tokenizer_dir: Path, cache_dir: Path) -> Path:
        tokenizer = TextTokenizer.from_file(tokenizer_dir, self.end_of_document)
        parts = {"train": documents.train, "validation": documents.validation, "test": documents.test}

        def build(folder: Path) -> None:
            prints = {
                name: write_blocks(part, tokenizer, self.sequence_length, folder / f"{name}.arrow", name != "train")
                for name, part in parts.items()
                if part is not None
            }
            sizes = {name: (folder / f"{name}.arrow").stat().st_size for name in prints}
            (folder / "fingerprints.json").write_text(json.dumps({**prints, "bytes": sizes}))

        key = fingerprint([_FORMAT, documents.key, tokenizer.fingerprint, str(self.sequence_length), repr(self.source)])
        return build_once(cache_dir / "blocks" / key, build)

    def _note_file(self, cache_dir: Path) -> Path:
        return cache_dir / "notes" / f"{fingerprint([_FORMAT, json.dumps(asdict(self), sort_keys=True)])}.json"

    def _note(self, cache_dir: Path, note: dict[str, str]) -> None:
        file = self._note_file(cache_dir)
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as draft:
            json.dump(note, draft)
        os.replace(draft.name, file)


class Prepared:
    """Prepared data in the cache: ``tokenizer``, and unless streaming ``train``, ``validation`` and ``test`` blocks.

    ``fingerprint`` is that of the training tokens and S (of the settings where the data is streamed): it depends on
    what the data is, not on where it lies.
    """

    def __init__(self, preparation: Preparation, note: dict[str, Any]) -> None:
        self.tokenizer = TextTokenizer.from_file(note["tokenizer"], preparation.end_of_document)
        self.fingerprint = fingerprint([repr(preparation), self.tokenizer.fingerprint])
        self.train = self.validation = self.test = None
        if "blocks" in note:
            folder = Path(note["blocks"])
            prints = _fingerprints(folder)
            self.fingerprint = prints["train"]
            self.train, self.validation = (self._blocks(folder, prints, part) for part in ("train", "validation"))
            self.test = self._blocks(folder, prints, "test") if "test" in prints else None

    def _blocks(self, folder: Path, prints: dict[str, Any], part: str) -> Blocks:
        file_bytes = prints.get("bytes", {}).get(part)  # earlier versions did not write it down
        return Blocks(folder / f"{part}.arrow", self.tokenizer.end_of_document_id, self.tokenizer.size, file_bytes)


def _fingerprints(folder: Path) -> dict[str, Any]:
    file = folder / "fingerprints.json"
    try:
        return json.loads(file.read_text())
    except (FileNotFoundError, json.JSONDecodeError) as error:
        kind = UserFileError if isinstance(error, FileNotFoundError) else UserValueError
        remedy = f"delete the folder {folder}, and the data is prepared again"
        raise kind(f"{file} of the prepared data is gone or damaged; {remedy}") from error
