"""Files of the forms that are read: what is wrong with one, its columns, and the values of one of them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Form:
    """How files of a form are looked into.

    Args:
        damage: what is wrong with one, and the remedy; None: it is whole.
        columns: of one, with their types; none where they are not known.
        values: of a column of one, each with the number of its row or line.
        counts: what these numbers are of.
    """

    damage: Callable[[Path], str | None]
    columns: Callable[[Path], dict[str, str]] = lambda _: {}
    values: Callable[[Path, str], Iterable[tuple[int, Any]]] = lambda *_: ()
    counts: str = "line"


def innermost(error: BaseException) -> str:
    """What an error says that others were made of."""
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
        opened = ParquetFile(file)
        if opened.metadata.num_rows == 0:
            return "has no rows; leave it out"
        return _bad_batches(opened.iter_batches())
    except (pyarrow.ArrowException, OSError) as error:
        return _not_whole("parquet", error)


def _bad_arrow(file: Path) -> str | None:
    import pyarrow

    try:
        return _bad_batches(_arrow_batches(file))
    except (pyarrow.ArrowException, OSError) as error:
        return _not_whole("arrow", error)


def _not_whole(kind: str, error: BaseException) -> str:
    return f"is no whole {kind} file: {innermost(error)} (was it cut short? fetch it again, or leave it out)"


def _bad_batches(batches: Iterable[Any]) -> str | None:
    import pyarrow

    row = 0
    for batch in batches:
        try:
            batch.validate(full=True)
        except pyarrow.ArrowInvalid as error:
            return (
                f"has what is no text in rows {row} to {row + len(batch) - 1}: {error}; leave it out, or write it anew"
            )
        row += len(batch)
    return None


def _arrow_batches(file: Path) -> Iterator[Any]:
    """Of either form, with places at its end or without."""
    import pyarrow

    with pyarrow.memory_map(str(file)) as source:
        try:
            opened = pyarrow.ipc.open_file(source)
        except pyarrow.ArrowInvalid:
            source.seek(0)
            yield from pyarrow.ipc.open_stream(source)
            return
        yield from (opened.get_batch(number) for number in range(opened.num_record_batches))


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


def _json_columns(file: Path) -> dict[str, str]:
    with file.open(encoding="utf-8") as lines:
        row = next((json.loads(line) for line in lines if line.strip()), None) if file.suffix == ".jsonl" else None
    return {name: type(value).__name__ for name, value in row.items()} if isinstance(row, dict) else {}


def _parquet_columns(file: Path) -> dict[str, str]:
    from pyarrow.parquet import read_schema

    return _types(read_schema(file))


def _arrow_columns(file: Path) -> dict[str, str]:
    first = next(_arrow_batches(file), None)
    return {} if first is None else _types(first.schema)


def _types(schema: Any) -> dict[str, str]:
    return {field.name: str(field.type) for field in schema}


def _csv_columns(file: Path) -> dict[str, str]:
    with file.open(encoding="utf-8", newline="") as lines:
        return dict.fromkeys(next(csv.reader(lines), []), "of text")


def _json_values(file: Path, column: str) -> Iterator[tuple[int, Any]]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip() and file.suffix == ".jsonl":
                row = json.loads(line)
                yield number, row.get(column) if isinstance(row, dict) else row


def _parquet_values(file: Path, column: str) -> Iterator[tuple[int, Any]]:
    from pyarrow.parquet import ParquetFile

    return _values(ParquetFile(file).iter_batches(columns=[column]), column)


def _arrow_values(file: Path, column: str) -> Iterator[tuple[int, Any]]:
    return _values(_arrow_batches(file), column)


def _values(batches: Iterable[Any], column: str) -> Iterator[tuple[int, Any]]:
    yield from enumerate(value for batch in batches for value in batch.column(column).to_pylist())


FORMS = {
    "text": Form(_bad_encoding),
    "json": Form(_bad_json, _json_columns, _json_values),
    "csv": Form(_bad_csv, _csv_columns),
    "parquet": Form(_bad_parquet, _parquet_columns, _parquet_values, "row"),
    "arrow": Form(_bad_arrow, _arrow_columns, _arrow_values, "row"),
}
