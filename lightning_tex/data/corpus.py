"""Where documents come from: the standard library's sources, a folder of text, or whatever ``load_dataset`` reads."""

from __future__ import annotations

import hashlib
import math
import sysconfig
import tokenize
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_tex.data import damage
from lightning_tex.data.local_files import BUILDERS, builder_of, file_stamps
from lightning_tex.parallel.errors import UserValueError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

# Tests, other people's packages, and tables that are no text anyone wrote.
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_LEFT_OUT |= {"encodings", "pydoc_data", "_bundled"}
_LARGEST_SHARE = 20  # no file may be more than 1/20 of the corpus


@dataclass(frozen=True)
class Source:
    """What to read, in the words of ``datasets.load_dataset``; see :class:`~lightning_tex.data.TextDataModule`."""

    path: str | None = None
    name: str | None = None
    data_files: Any = None
    split: str = "train"
    validation_split: str | None = None
    test_split: str | None = None
    validation_fraction: float = 0.05
    text_column: str = "text"
    streaming: bool = False
    max_bytes: int = 3_000_000

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction <= 0.5:
            raise UserValueError(f"validation_fraction={self.validation_fraction} is not in (0, 0.5]")
        if self.path is None and (self.streaming or self.name or self.data_files):
            raise UserValueError(
                "streaming, name and data_files need a path: a folder, a builder ('text', 'json', ...) or a data set"
            )

    def load(self, cache_dir: Path, hub_cache_dir: Path | None = None) -> Documents:
        """Reads the documents.

        Args:
            cache_dir: where local files are converted to Arrow.
            hub_cache_dir: where downloads are kept; None: as ``datasets`` has it.

        Raises:
            ValueError: a split or the text column does not exist, a file cannot be read, or there is nothing to hold
                out.
            FileNotFoundError: ``path`` or ``data_files`` name nothing that exists.
        """
        if self.path is None:
            return _standard_library(self)
        with self.reading():
            return _load_dataset(self, cache_dir, hub_cache_dir)

    def undivided(self, cache_dir: Path, hub_cache_dir: Path | None = None) -> tuple[Any, Any, Any]:
        """Training documents, with those that are held out; validation's and test's own, or None; raises as above."""
        with self.reading():
            train, validation, test, _ = _parts(self, cache_dir, hub_cache_dir)
            return train, validation, test

    def held_out_stride(self) -> int:
        """Every so many documents one is held out."""
        return _stride(self.validation_fraction)

    def select(self, documents: Any) -> Any:
        """Of the columns of a ``datasets`` object those that are wanted."""
        return _text_only(documents, self.text_column)

    def reading(self) -> AbstractContextManager[None]:
        """Around what reads the documents: its errors name the file that is to blame."""
        if self.path is None:
            return nullcontext()
        builder, data_files, _ = builder_of(str(self.path), self.data_files)
        name = f", name={self.name!r}" if self.name else ""
        what = f"path={self.path!r}{name}, split={self.split!r}"
        return damage.reading(what, builder, data_files, self.text_column)


@dataclass(frozen=True)
class Documents:
    """Training, validation and (or None) test documents, each a ``datasets`` object with one column ``text``.

    ``key`` changes whenever the documents do, without having read them.
    """

    train: Dataset | IterableDataset
    validation: Dataset | IterableDataset
    test: Dataset | IterableDataset | None
    key: str


def held_out(count: int, fraction: float) -> list[int]:
    """Positions of about ``fraction`` of ``count`` documents, evenly spread and at least one."""
    stride = _stride(fraction)
    return list(range(stride // 2, count, stride)) or list(range(count // 2, count))[:1]


def _stride(fraction: float) -> int:
    return max(2, round(1 / fraction))


def standard_library_files(max_bytes: int) -> list[Path]:
    """Sources of the running Python's standard library, spread over it, about ``max_bytes`` in all, sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    sized = [(path, path.stat().st_size) for path in sorted(root.rglob("*.py")) if _is_source(path.relative_to(root))]
    # In the order of a hash of their names the files of every package are spread evenly.
    sized.sort(key=lambda item: hashlib.blake2b(item[0].relative_to(root).as_posix().encode()).digest())
    chosen, total = [], 0
    for path, size in sized:
        if 0 < size <= max_bytes // _LARGEST_SHARE and total + size <= max_bytes:
            chosen.append(path)
            total += size
    return sorted(chosen)


def _is_source(path: Path) -> bool:
    return not (_LEFT_OUT & set(path.parts) or path.name.startswith("_sysconfigdata"))


def _standard_library(source: Source) -> Documents:
    from datasets import Dataset

    texts = [_read(path) for path in standard_library_files(source.max_bytes)]
    if len(texts) < 2:
        raise UserValueError(
            f"max_bytes={source.max_bytes} holds {len(texts)} files of the standard library; at least 2 needed"
        )
    train, validation = _divide(Dataset.from_dict({"text": texts}), source)
    return Documents(train, validation, None, fingerprint(texts))


def _read(path: Path) -> str:
    try:
        with tokenize.open(path) as file:  # knows about coding cookies
            return file.read()
    except (SyntaxError, UnicodeDecodeError):
        return path.read_text(encoding="utf-8", errors="replace")


def _divide(documents: Dataset, source: Source) -> tuple[Dataset, Dataset]:
    """Holds out documents spread over the data set; a single document is cut at line ends first."""
    from datasets import Dataset

    if len(documents) == 1 and documents.column_names == ["text"]:
        text = documents[0]["text"]
        damage.require_texts([text])
        documents = Dataset.from_dict({"text": cut_at_lines(text, _stride(source.validation_fraction))})
    if len(documents) < 2:
        raise UserValueError(
            f"{len(documents)} documents in path={source.path!r} leave nothing to hold out for validation; give 2 (one "
            "of several lines is cut there), or a validation_split"
        )
    validation = held_out(len(documents), source.validation_fraction)
    kept = set(validation)
    return documents.select([i for i in range(len(documents)) if i not in kept]), documents.select(validation)


def cut_at_lines(text: str, pieces: int) -> list[str]:
    """Cuts a text at line ends into at most ``pieces`` consecutive parts of about equal length."""
    lines, size = text.splitlines(keepends=True), math.ceil(len(text) / pieces)
    parts, start, length = [], 0, 0
    for i, line in enumerate(lines, start=1):
        length += len(line)
        if length >= size or i == len(lines):
            parts.append("".join(lines[start:i]))
            start, length = i, 0
    return parts


def _load_dataset(source: Source, cache_dir: Path, hub_cache_dir: Path | None) -> Documents:
    train, validation, test, key = _parts(source, cache_dir, hub_cache_dir)
    if validation is not None:
        return Documents(train, validation, test, key)
    divide = _divide_stream if source.streaming else _divide
    return Documents(*divide(train, source), test, key)


def _parts(source: Source, cache_dir: Path, hub_cache_dir: Path | None) -> tuple[Any, Any, Any, str]:
    """Training, validation and test documents, None where there are none of their own, and the key."""
    path, data_files, options = builder_of(str(source.path), source.data_files)
    local = path in BUILDERS
    options |= {"streaming": source.streaming, "cache_dir": str(cache_dir if local else hub_cache_dir or "") or None}
    splits = _call(path, source.name, data_files, None, options)

    def split(wanted: str) -> Any:
        documents = splits[wanted] if wanted in splits else _call(path, source.name, data_files, wanted, options)
        return source.select(documents)

    train = split(source.split)
    key = fingerprint([str(getattr(train, "_fingerprint", "")), path, repr(data_files), *file_stamps(data_files)])
    test = split(source.test_split) if source.test_split else None
    validation_split = source.validation_split or ("validation" if "validation" in splits else None)
    return train, split(validation_split) if validation_split else None, test, key


def _call(path: str, name: str | None, data_files: Any, split: str | None, options: dict[str, Any]) -> Any:
    from datasets import load_dataset

    return load_dataset(path, name, data_files=data_files, split=split, **options)


def _text_only(documents: Any, column: str) -> Any:
    columns = documents.column_names
    if columns is None:  # a stream of unknown columns
        columns = list(next(iter(documents)))
        documents = documents.select_columns([column]) if column in columns else documents
    if column not in columns:
        raise UserValueError(f"text_column={column!r} is not a column of the data set; it has: {', '.join(columns)}")
    documents = documents.select_columns([column])
    return documents if column == "text" else documents.rename_column(column, "text")


def _divide_stream(documents: IterableDataset, source: Source) -> tuple[IterableDataset, IterableDataset]:
    stride = _stride(source.validation_fraction)

    def is_held_out(_: dict[str, Any], index: int) -> bool:
        return index % stride == stride // 2

    def is_kept(_: dict[str, Any], index: int) -> bool:
        return index % stride != stride // 2

    return documents.filter(is_kept, with_indices=True), documents.filter(is_held_out, with_indices=True)


def fingerprint(parts: Iterable[str]) -> str:
    """A digest of strings, 32 hexadecimal digits, that tells apart how they are divided."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
