"""Reads rows from JSONL, CSV and Parquet files, gzipped or not.

Decides by suffix what a row is and where it lies in its file; leaves to `fedpipe_core.data` what its columns mean.
A message tells the place of a fault and not the row, since an edge's messages may travel to the coordinator.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from fedpipe_core.errors import DataError

Places = Sequence[str]  # file and line of every row; empty where rows come from no file


class Row(NamedTuple):
    """One row: `place` says where it lies ("line 12", "row 12" in Parquet), `values` what each column holds.

    `fault` tells why a line could not be read, where that was tolerated.
    """

    place: str
    values: dict[str, Any]
    fault: str = ""


def places_at(places: Places, indices: Sequence[int]) -> Places:
    """The places of the rows at `indices`, where places are known."""
    return [places[index] for index in indices] if places else ()


def place_of(index: int, places: Places) -> str:
    """Where a row lies, or its number where that is not known."""
    return places[index] if places else f"row {index + 1}"


def read_rows(path: str | Path, tolerant: bool = False) -> Iterator[Row]:
    """Yield the rows of a .jsonl, .csv or .parquet file, each also with .gz behind it; blank lines are no rows.

    CSV has a header and holds only strings; in the other formats a value has the type the file gives it.
    Text is UTF-8, with or without a byte-order mark. If `tolerant`, a line of JSONL that is not UTF-8 or no JSON object
    is yielded with its fault.

    Raises DataError, with the place, for a file that is missing, of another suffix, unreadable, damaged or empty.
    """
    _require_file(path)
    path = Path(path)
    read, count = _reader_of(path), 0
    try:
        for count, row in enumerate(read(path, tolerant), start=1):  # noqa: B007  (the count outlives the loop)
            yield row
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} is not an intact gzip file ({error}, after {count} rows); "
            "compress it again, or take .gz off its name if it is not compressed"
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read after {count} rows: {error}; check the file and its rights") from None
    if count == 0:
        raise DataError(f"{path} holds no rows, needed at least one; check that the file was written completely")


def _reader_of(path: Path) -> Callable[[Path, bool], Iterator[Row]]:
    *_, inner, last = ["", "", *(suffix.lower() for suffix in path.suffixes)]
    suffix = inner if last == ".gz" else last
    if suffix not in _READERS:
        found = f"the suffix {''.join([suffix, last] if last == '.gz' else [last])!r}" if last else "no suffix"
        raise DataError(
            f"{path} has {found}, needed .jsonl, .csv or .parquet, with or without .gz behind it; "
            "convert the file, or give it the suffix of its format"
        )
    return _READERS[suffix]


def _require_file(path: str | Path) -> None:
    if Path(path).is_file():
        return
    what = "is an address" if "://" in str(path) else "is a folder" if Path(path).is_dir() else "does not exist"
    raise DataError(f"{path} {what}, needed a local file of rows; correct the path in the config's `data` section")


def _is_packed(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if _is_packed(path) else path.open("rb")


def _lines(path: Path) -> Iterator[str]:
    # Decoded line by line, because only so the line of a wrong byte is known.
    with _open(path) as stream:
        for number, line in enumerate(stream, start=1):
            yield _decoded(line, number, path)


def _decoded(line: bytes, number: int, path: Path) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} line {number} is not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1}); "
            "save the file as UTF-8"
        ) from None


def _read_jsonl(path: Path, tolerant: bool) -> Iterator[Row]:
    with _open(path) as stream:
        for number, line in enumerate(stream, start=1):
            try:
                text = _decoded(line, number, path)
                if text.strip():
                    yield Row(f"line {number}", _parse_object(text, f"{path} line {number}"))
            except DataError as error:
                if not tolerant:
                    raise
                yield Row(f"line {number}", {}, str(error))


def _parse_object(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where} is not JSON ({error.msg} at column {error.colno}); a .jsonl file holds one JSON object per line"
        ) from None
    except (ValueError, RecursionError):  # a number of thousands of digits, brackets nested without end
        raise DataError(f"{where} is not JSON that can be read; a .jsonl file holds one JSON object per line") from None
    if not isinstance(value, dict):
        raise DataError(
            f"{where} holds a JSON {_json_type(value)}, needed an object of column names and values; "
            "a .jsonl file holds one JSON object per line"
        )
    return value


def _json_type(value: object) -> str:
    names = {list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _read_csv(path: Path, tolerant: bool) -> Iterator[Row]:
    reader = csv.reader(_lines(path), strict=True)
    header: list[str] = []
    line = 1
    try:
        for fields in reader:
            if fields and not header:
                header = _checked_header(fields, path)
            elif fields:
                _require_fields(fields, header, f"{path} line {line}")
                yield Row(f"line {line}", dict(zip(header, fields, strict=True)))
            line = reader.line_num + 1  # a quoted field may hold line breaks, so a row starts where the last one ended
    except csv.Error as error:
        raise DataError(f"{path} line {line} is not CSV ({error}); correct its quotes, or use .jsonl") from None


def _checked_header(fields: list[str], path: Path) -> list[str]:
    repeated = sorted({name for name in fields if fields.count(name) > 1})
    if repeated:
        raise DataError(f"{path} names the column {repeated[0]!r} more than once; give every column its own name")
    return fields


def _require_fields(fields: list[str], header: list[str], where: str) -> None:
    if len(fields) != len(header):
        raise DataError(
            f"{where} has {len(fields)} fields, needed {len(header)} as in the header; "
            "put fields that hold commas, quotes or line breaks in double quotes"
        )


def _read_parquet(path: Path, tolerant: bool) -> Iterator[Row]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        # Parquet is read from its end, which is slow in a gzip stream: that is unpacked into memory first.
        with _open(path) as stream, ParquetFile(io.BytesIO(stream.read()) if _is_packed(path) else path) as file:
            rows = (values for batch in file.iter_batches() for values in batch.to_pylist())
            for number, values in enumerate(rows, start=1):
                yield Row(f"row {number}", values)
    except pyarrow.ArrowException as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} is not Parquet ({reason}); write it again, or give it its format's suffix") from None


_READERS: dict[str, Callable[[Path, bool], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
