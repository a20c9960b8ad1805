import csv
import gzip
import json

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from fedpipe_core.errors import DataError
from fedpipe_core.rows import Row, read_rows

FORMATS = [".jsonl", ".csv", ".parquet"]
ANY_FORMAT = [*FORMATS, *(suffix + ".gz" for suffix in FORMATS)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_csv(path, rows):
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path, rows):
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)


def write_rows(folder, suffix, rows):
    """Write `rows` in the format of `suffix`, which may end in .gz."""
    inner = suffix.removesuffix(".gz")
    path = folder / f"rows{inner}"
    {".jsonl": write_jsonl, ".csv": write_csv, ".parquet": write_parquet}[inner](path, rows)
    if inner != suffix:
        packed = folder / f"rows{suffix}"
        packed.write_bytes(gzip.compress(path.read_bytes()))
        return packed
    return path


def file_of(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# CSV cannot tell an empty string from nothing in a row's only field, so there are always two columns.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
ROWS = st.lists(st.fixed_dictionaries({"text": TEXT, "label": st.integers(0, 99)}), min_size=1, max_size=12)


@pytest.mark.parametrize("suffix", ANY_FORMAT)
@settings(deadline=None, max_examples=25)
@given(rows=ROWS)
def test_rows_of_every_format_come_back_as_written(tmp_path_factory, suffix, rows):
    path = write_rows(tmp_path_factory.mktemp("rows"), suffix, rows)
    expected = [{**row, "label": str(row["label"])} for row in rows] if ".csv" in suffix else rows
    assert [row.values for row in read_rows(path)] == expected


def test_the_place_of_a_row_is_its_line_and_blank_lines_count(tmp_path):
    path = file_of(tmp_path, "a.jsonl", '{"a": 1}\n\n{"a": 2}')
    assert list(read_rows(path)) == [Row("line 1", {"a": 1}), Row("line 3", {"a": 2})]


def test_the_place_of_a_csv_row_is_the_line_it_starts_on(tmp_path):
    path = file_of(tmp_path, "a.csv", 'text,label\r\n"two\r\nlines",1\r\n\r\nlast,2\r\n')
    assert list(read_rows(path)) == [
        Row("line 2", {"text": "two\r\nlines", "label": "1"}),
        Row("line 5", {"text": "last", "label": "2"}),
    ]


def test_the_place_of_a_parquet_row_is_its_number_across_row_groups(tmp_path):
    path = write_rows(tmp_path, ".parquet", [{"a": i} for i in range(7)])
    assert [row.place for row in read_rows(path)] == [f"row {i}" for i in range(1, 8)]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_a_byte_order_mark_is_not_part_of_the_first_column(tmp_path, name):
    content = "text,label\na,1\n" if name == "a.csv" else '{"text": "a", "label": "1"}\n'
    path = file_of(tmp_path, name, b"\xef\xbb\xbf" + content.encode())
    assert [row.values for row in read_rows(path)] == [{"text": "a", "label": "1"}]


def test_suffixes_are_known_in_capitals_too(tmp_path):
    path = file_of(tmp_path, "A.JSONL.GZ", gzip.compress(b'{"a": 1}\n'))
    assert [row.values for row in read_rows(path)] == [{"a": 1}]


@pytest.mark.parametrize(
    ("name", "found"),
    [("a.json", "suffix '.json'"), ("a.txt.gz", "suffix '.txt.gz'"), ("a", "no suffix"), ("a.gz", "suffix '.gz'")],
)
def test_another_suffix_is_refused_with_the_formats_that_are_known(tmp_path, name, found):
    with pytest.raises(DataError, match=rf"{found}, needed \.jsonl, \.csv or \.parquet, with or without \.gz"):
        next(read_rows(file_of(tmp_path, name, "{}")))


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl does not exist, needed a local file"):
        next(read_rows(tmp_path / "none.jsonl"))
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match=r"folder\.jsonl is a folder, needed a local file"):
        next(read_rows(tmp_path / "folder.jsonl"))


def test_a_remote_address_is_refused_as_such():
    with pytest.raises(DataError, match=r"s3://bucket/train\.jsonl is an address, needed a local file"):
        next(read_rows("s3://bucket/train.jsonl"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_text_that_is_not_utf8_is_refused_with_its_line_and_byte(tmp_path, name):
    rows = b'{"a": "x"}\n{"a": "\xe9"}\n' if name == "a.jsonl" else b"a\n\xe9\n"
    with pytest.raises(DataError, match=rf"{name} line 2 is not UTF-8 \(byte 0xe9 at column \d"):
        list(read_rows(file_of(tmp_path, name, rows)))


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"text": "private", label: 1}', r"is not JSON \(.* at column 21\)"),
        ('["private"]', "holds a JSON array, needed an object"),
        ('"private"', "holds a JSON string"),
        ("17", "holds a JSON number"),
        ("null", "holds a JSON null"),
        ("true", "holds a JSON boolean"),
        ('{"a": ' + "9" * 5000 + "}", "is not JSON that can be read"),
        ("[" * 100_000, "is not JSON that can be read"),
    ],
)
def test_a_line_that_is_no_json_object_is_refused_without_repeating_it(tmp_path, line, fault):
    path = file_of(tmp_path, "a.jsonl", '{"text": "a", "label": 1}\n' + line)
    with pytest.raises(DataError, match=rf"a\.jsonl line 2 {fault}") as caught:
        list(read_rows(path))
    assert "private" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("text,label\na,b,1\n", "line 2 has 3 fields, needed 2 as in the header"),
        ("text,label\nok,1\na\n", "line 3 has 1 fields, needed 2"),
        ("text,text\na,b\n", "names the column 'text' more than once"),
        ('text,label\n"never closed,1\nx,2\n', r"line 2 is not CSV \(unexpected end of data\)"),
        ("text,label\n" + "x" * 200_000 + ",1\n", r"line 2 is not CSV \(field larger than field limit"),
    ],
)
def test_csv_that_does_not_hold_together_is_refused_with_its_line(tmp_path, content, fault):
    with pytest.raises(DataError, match=rf"a\.csv {fault}"):
        list(read_rows(file_of(tmp_path, "a.csv", content)))


@pytest.mark.parametrize("content", [b"not parquet", b"PAR1" + b"\0" * 40 + b"PAR1"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_damaged_parquet_file_is_refused(tmp_path, content, packed):
    name = "a.parquet.gz" if packed else "a.parquet"
    with pytest.raises(DataError, match=rf"{name} (is not Parquet|cannot be read)"):
        list(read_rows(file_of(tmp_path, name, gzip.compress(content) if packed else content)))


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_gzip_file_that_was_cut_off_is_refused(tmp_path, suffix):
    path = write_rows(tmp_path, suffix + ".gz", [{"text": f"row {i * i}", "label": i} for i in range(500)])
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match="is not an intact gzip file"):
        list(read_rows(path))


def test_a_gzip_file_with_a_flipped_byte_is_refused(tmp_path):
    path = write_rows(tmp_path, ".jsonl.gz", [{"text": f"row {i * i}", "label": i} for i in range(500)])
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"is not an intact gzip file|is not JSON|is not UTF-8"):
        list(read_rows(path))


def test_a_plain_file_that_is_named_gz_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(DataError, match=r"is not an intact gzip file .*take \.gz off its name"):
        list(read_rows(file_of(tmp_path, "a.jsonl.gz", '{"a": 1}')))


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", ""), ("a.jsonl", "\n\n"), ("a.csv", ""), ("a.csv", "text,label\n")]
)
def test_a_file_without_rows_is_refused(tmp_path, name, content):
    with pytest.raises(DataError, match=rf"{name} holds no rows, needed at least one"):
        list(read_rows(file_of(tmp_path, name, content)))


def test_a_parquet_file_without_rows_is_refused(tmp_path):
    parquet.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="holds no rows"):
        list(read_rows(tmp_path / "a.parquet"))
