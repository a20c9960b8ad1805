"""What the rows of a data file mean: texts with labels.

Decides which rows can be used, what a data set's fingerprint is and which rows an edge keeps for validation; leaves
reading files to `fedpipe_core.rows` and the choice of an edge's rows to `fedpipe_core.partition`. A row's own text
never enters a message, since an edge's messages may travel to the coordinator; a wrong label does, shortened.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from fedpipe_core.config import DataSpec
from fedpipe_core.errors import DataError
from fedpipe_core.rows import Row, read_rows

FAULTS_SHOWN = 3


@dataclass(frozen=True)
class Examples:
    """Texts and their labels, row by row. Shared between readers: not to be changed in place."""

    texts: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, indices: Iterable[int]) -> "Examples":
        """The rows at `indices`, in that order."""
        chosen = list(indices)
        return Examples([self.texts[i] for i in chosen], [self.labels[i] for i in chosen])


def load_examples(path: str | Path, spec: DataSpec) -> Examples:
    """Read and check the examples of one file; other columns are ignored.

    A text is a string that is not blank. A label is an integer from 0 to labels - 1, or its decimal digits.
    Raises DataError for a file or column that is missing, and for unusable rows: their count and the first few.
    """
    return _load(path, spec, extra_column=None)[0]


def load_examples_and_column(path: str | Path, spec: DataSpec, column: str) -> tuple[Examples, list[Any]]:
    """Like `load_examples`, with the values of one more column, row by row. Raises DataError likewise."""
    return _load(path, spec, extra_column=column)


def label_names(path: str | Path, spec: DataSpec) -> list[str] | None:
    """The name of every label, by label, from the column `spec.label_name_column`; None if no column is configured.

    Raises DataError unless every label from 0 to labels - 1 has exactly one name, different from all others.
    """
    if spec.label_name_column is None:
        return None
    examples, values = load_examples_and_column(path, spec, spec.label_name_column)
    names: dict[int, set[str]] = defaultdict(set)
    for label, value in zip(examples.labels, values, strict=True):
        names[label].add("" if value is None else str(value).strip())
    faults = _name_faults(names, spec.labels)
    if faults:
        raise DataError(
            f"{path} column {spec.label_name_column!r} does not name the labels one to one: {_first(faults)}; "
            "correct the file, or leave out data.label_name_column"
        )
    return [min(names[label]) for label in range(spec.labels)]


def fingerprint(examples: Examples, salt: str) -> str:
    """Salted SHA-256 of the rows, whatever their order: tells whether the data changed, not what it is."""
    return hashlib.sha256(b"".join(sorted(row_digests(examples, salt)))).hexdigest()


def row_digests(examples: Examples, salt: str) -> list[bytes]:
    """Salted SHA-256 of every row; to sort by it is a shuffle that does not depend on the rows' order in the file."""
    key = hashlib.sha256(salt.encode()).digest()
    rows = zip(examples.texts, examples.labels, strict=True)
    return [hashlib.sha256(key + f"{label}:{text}".encode()).digest() for text, label in rows]


def split_validation(examples: Examples, fraction: float, seed: int) -> tuple[Examples, Examples]:
    """Split into training and validation rows, both in their old order.

    Systematic sampling: the r-th of a label's c rows, shuffled, stands at (r + 1/2) / c, and the rows that stand lowest
    go to validation. Every label so gives about its share, and a label's only row stays in training where it can.
    The number of validation rows is round(fraction · rows), at least one if fraction > 0, and leaves a row to train on.
    The choice depends on the rows and the seed, not on the rows' order.
    """
    digests = row_digests(examples, f"validation:{seed}")
    count = min(max(round(fraction * len(examples)), int(fraction > 0)), max(len(examples) - 1, 0))
    position = _positions_within_label(examples.labels, digests)
    by_position = sorted(range(len(examples)), key=lambda i: (position[i], digests[i]))
    held_out = set(by_position[:count])
    training = [i for i in range(len(examples)) if i not in held_out]
    return examples.select(training), examples.select(sorted(held_out))


def _positions_within_label(labels: Sequence[int], digests: Sequence[bytes]) -> list[float]:
    rows_of: dict[int, list[int]] = defaultdict(list)
    for i in sorted(range(len(labels)), key=lambda i: digests[i]):
        rows_of[labels[i]].append(i)
    positions = [0.0] * len(labels)
    for rows in rows_of.values():
        for rank, i in enumerate(rows):
            positions[i] = (rank + 0.5) / len(rows)
    return positions


def _load(path: str | Path, spec: DataSpec, extra_column: str | None) -> tuple[Examples, list[Any]]:
    columns = [spec.text_column, spec.label_column, *([extra_column] if extra_column else [])]
    examples, extra, faults = Examples([], []), [], []
    for number, row in enumerate(read_rows(path)):
        if number == 0:
            _require_columns(row, columns, path)
        fault = _fault_of(row.values, columns, spec)
        if fault:
            faults.append(f"{row.place}: {fault}")
            continue
        examples.texts.append(row.values[spec.text_column])
        examples.labels.append(_as_integer(row.values[spec.label_column]))
        extra.append(row.values[columns[-1]])
    if faults:
        rows = "1 unusable row" if len(faults) == 1 else f"{len(faults)} unusable rows"
        raise DataError(f"{path} has {rows}: {_first(faults)}; correct or remove them")
    return examples, extra


def _require_columns(row: Row, columns: Sequence[str], path: str | Path) -> None:
    missing = [column for column in columns if column not in row.values]
    if missing:
        found = [str(name) for name in row.values]
        nearest = get_close_matches(missing[0], found, n=1)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise DataError(
            f"{path} {row.place} has no column {_quoted(missing)}: found {_quoted(found)}, needed {_quoted(columns)}; "
            f"{hint}correct the file or the column's name in the config's `data` section"
        )


def _fault_of(values: dict[str, Any], columns: Sequence[str], spec: DataSpec) -> str | None:
    missing = [column for column in columns if column not in values]
    if missing:
        return f"no column {_quoted(missing)}"
    text, label = values[spec.text_column], values[spec.label_column]
    if not isinstance(text, str):
        return f"{spec.text_column!r} is {type(text).__name__}, needed a string"
    if not text.strip():
        return f"{spec.text_column!r} is empty"
    if not _is_unicode(text):
        return f"{spec.text_column!r} holds half of a surrogate pair, which is no character"
    if _as_integer(label) not in range(spec.labels):
        return f"{spec.label_column!r} is {_shorten(label)}, needed an integer from 0 to {spec.labels - 1}"
    return None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _as_integer(value: object) -> int:
    """The label as an integer, -1 if it is none; CSV knows no integers, so their digits count too."""
    if isinstance(value, str) and re.fullmatch(r"\s*[0-9]{1,7}\s*", value):
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else -1


def _name_faults(names: dict[int, set[str]], labels: int) -> list[str]:
    faults = [f"label {label} has no row" for label in range(labels) if label not in names]
    faults += [f"label {label} has an empty name" for label in sorted(names) if "" in names[label]]
    faults += [
        f"label {label} has the names {_quoted(sorted(names[label]))}"
        for label in sorted(names)
        if len(names[label]) > 1
    ]
    owner: dict[str, int] = {}
    for label in sorted(names):
        for name in sorted(names[label]):
            if owner.setdefault(name, label) != label:
                faults.append(f"labels {owner[name]} and {label} are both named {name!r}")
    return faults


def _first(faults: Sequence[str]) -> str:
    rest = len(faults) - FAULTS_SHOWN
    return "; ".join(faults[:FAULTS_SHOWN]) + (f"; and {rest} more" if rest > 0 else "")


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _shorten(value: object, limit: int = 40) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
