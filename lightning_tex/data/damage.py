"""Documents that cannot be read: which file is to blame, in which line or row, and what to do."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_tex.data.forms import FORMS, innermost
from lightning_tex.data.local_files import named_files
from lightning_tex.parallel.errors import UserError, UserFileError, UserValueError

_TEXTS = "legal: strings in every row (leave such rows out, or name another text_column)"


class NoTextError(UserValueError):
    """A document that is no text; :func:`reading` looks for its file."""


@contextmanager
def reading(what: str, builder: str, data_files: Any, column: str) -> Iterator[None]:
    """Reading documents, whose errors name the file that is to blame where it is a local one.

    Args:
        what: is read, in the user's words.
        builder: its form, as in ``datasets.load_dataset``.
        data_files: its files, as there.
        column: that holds the texts.

    Raises:
        ValueError: they cannot be read.
        FileNotFoundError: there are none.
    """
    from datasets.exceptions import DatasetsError

    try:
        yield
    except NoTextError as error:
        place = no_text(builder, named_files(data_files), column)
        raise error if place is None else UserValueError(f"cannot read {what}: {place}; {_TEXTS}") from None
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserFileError(f"cannot read {what}: {error}") from error
    except (DatasetsError, ValueError, StopIteration, OSError, TypeError, KeyError) as error:
        files = named_files(data_files)
        reason = damage(builder, files) or mixed_columns(builder, files)
        if reason is None and isinstance(error, (OSError, TypeError, KeyError)):  # of something else than the files
            raise
        raise UserValueError(f"cannot read {what}: {reason or innermost(error)}") from error


def damage(builder: str, files: Iterable[Path]) -> str | None:
    """What is wrong with the first file that is not whole, and the remedy; None if all are."""
    if builder not in FORMS:
        return None
    for file in files:
        reason = FORMS[builder].damage(file)
        if reason is not None:
            return f"{file} {reason}"
    return None


def mixed_columns(builder: str, files: Sequence[Path]) -> str | None:
    """Which file has other columns than the first, or of other types, where files are whole; None if none has."""
    first: dict[str, str] = {}
    if builder not in FORMS:
        return None
    for file in files:
        columns = FORMS[builder].columns(file)
        first = first or columns
        if columns and columns != first:
            return (
                f"{file} has the columns {_named(columns)}, and {files[0]} has {_named(first)}; legal: the same "
                "ones in all files, or data_files that name those of one kind"
            )
    return None


def no_text(builder: str, files: Iterable[Path], column: str) -> str | None:
    """Which file has something else than a text first, in which of its rows, and what; None if none has."""
    if builder not in FORMS:
        return None
    form = FORMS[builder]
    for file in files:
        for number, value in form.values(file, column):
            if not isinstance(value, str):
                return f"{file}, {form.counts} {number}: {column!r} is {value!r} and no text"
    return None


def _named(columns: dict[str, str]) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in columns.items())


def require_texts(texts: Iterable[Any], first_row: int = 0) -> None:
    """Refuse documents that are no text.

    Raises:
        NoTextError: naming the row.
    """
    for row, text in enumerate(texts, start=first_row):
        if not isinstance(text, str):
            raise NoTextError(
                f"document {row}, counted without those that are held out, is {text!r} and no text; {_TEXTS}"
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
