"""Documents that cannot be read: which file is to blame, in which line or row, and what to do."""

from __future__ import annotations

import csv
import glob
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_tex.parallel.errors import UserError, UserFileError, UserValueError


@contextmanager
def reading(what: str, builder: str, data_files: Any) -> Iterator[None]:
    """Reading documents, whose errors name the file that is to blame where it is a local one.

    Args:
        what: is read, in the user's words.
        builder: its form, as in ``datasets.load_dataset``.
        data_files: its files, as there.

    Raises:
        ValueError: they cannot be read.
        FileNotFoundError: there are none.
    """
    from datasets.exceptions import DatasetsError

    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserFileError(f"cannot read {what}: {error}") from error
    except (DatasetsError, ValueError, StopIteration) as error:
        reason = damage(builder, named_files(data_files)) or _innermost(error)
        raise UserValueError(f"cannot read {what}: {reason}") from error


def named_files(data_files: Any) -> list[Path]:
    """The local files that ``data_files`` names, outright or by patterns."""
    if isinstance(data_files, dict):
        return [file for files in data_files.values() for file in named_files(files)]
    names: Iterable[str] = [data_files] if isinstance(data_files, str) else data_files or []
    return [path for name in names for path in map(Path, sorted(glob.glob(name, recursive=True))) if path.is_file()]


def damage(builder: str, files: Iterable[Path]) -> str | None:
    """What is wrong with the first file that is not whole, and the remedy; None if all are."""
    check = _CHECKS.get(builder)
    if check is None:
        return None
    for file in files:
        reason = check(file)
        if reason is not None:
            return f"{file} {reason}"
    return None


def require_texts(texts: Iterable[Any], first_row: int = 0) -> None:
    """Refuse documents that are no text.

    Raises:
        ValueError: naming the row.
    """
    for row, text in enumerate(texts, start=first_row):
        if not isinstance(text, str):
            raise UserValueError(
                f"document {row}, counted without those that are held out, is {text!r} and no text; legal: strings in "
                "every row (leave such rows out, or name another text_column)"
            )


def json_object(line: bytes, place: str, offset: int) -> dict[str, Any]:
    """The object of a line of a file.

    Args:
        line: its bytes.
        place: the line in the user's words.
        offset: of the line in its file, bytes.

    Raises:
        ValueError: it is none.
    """
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserValueError(
            f"{place} is not UTF-8: byte 0x{line[error.start]:02x} at offset {offset + error.start}; convert the "
            "file (iconv -f latin1 -t utf-8), or leave the line out"
        ) from error
    except json.JSONDecodeError as error:
        raise UserValueError(f"{place} is no JSON: {error}; legal: one object a line (was it cut short?)") from error
    if not isinstance(row, dict):
        raise UserValueError(f"{place} is {type(row).__name__}; legal: an object")
    return row


def _innermost(error: BaseException) -> str:
    if isinstance(error, StopIteration):
        return "it holds no documents; legal: at least one"
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().partition("\n")[0]


def _bad_encoding(file: Path) -> str | None:
    with file.open("rb") as lines:
        start = 0
        for number, line in enumerate(lines, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return (
                    f"is not UTF-8: byte 0x{line[error.start]:02x} at offset {start + error.start}, line {number}; "
                    "convert it (iconv -f latin1 -t utf-8), or leave it out"
                )
            start += len(line)
    return None


def _bad_json(file: Path) -> str | None:
    if (encoding := _bad_encoding(file)) is not None:
        return encoding
    if file.stat().st_size == 0:
        return "is empty; leave it out"
    whole = _parse_error(file.read_text("utf-8")) if file.suffix == ".json" else None
    if file.suffix == ".json" and whole is None:
        return None
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip() and (error := _parse_error(line)) is not None:
                return f"is no JSON in line {number}: {error}; legal: one object a line (was it cut short?)"
    return None


def _parse_error(text: str) -> str | None:
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return str(error)
    return None


def _bad_parquet(file: Path) -> str | None:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        for _ in ParquetFile(file).iter_batches():
            pass
    except (pyarrow.ArrowException, OSError) as error:
        return f"is no whole parquet file: {_innermost(error)} (was it cut short? fetch it again, or leave it out)"
    return None


def _bad_csv(file: Path) -> str | None:
    if (encoding := _bad_encoding(file)) is not None:
        return encoding
    with file.open(encoding="utf-8", newline="") as lines:
        rows = csv.reader(lines)
        width = len(next(rows, []))
        for row in rows:
            if len(row) > width:
                return f"has {len(row)} columns in line {rows.line_num}, and {width} in its first; quote the text"
    return "is empty; leave it out" if width == 0 else None


_CHECKS: dict[str, Callable[[Path], str | None]] = {
    "text": _bad_encoding,
    "json": _bad_json,
    "csv": _bad_csv,
    "parquet": _bad_parquet,
}
