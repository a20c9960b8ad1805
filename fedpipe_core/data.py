"""What the rows of a data file mean: texts with labels, or dialogues.

Decides which rows can be used, what a data set's fingerprint is and which rows an edge keeps for validation; leaves
reading files to `fedpipe_core.rows`, dialogues to `fedpipe_core.dialogues` and the choice of an edge's rows to
`fedpipe_core.partition`. A row's own text never enters a message, since an edge's messages may travel to the
coordinator; a wrong label does, shortened.
"""

import hashlib
import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

from fedpipe_core.config import DataSpec
from fedpipe_core.dialogues import DIALOGUE_FORMATS, Dialogues, Values, collect_dialogues, dialogue_fault
from fedpipe_core.errors import DataError
from fedpipe_core.row_faults import first_faults, quoted, shorten, text_fault
from fedpipe_core.rows import Places, Row, places_at, read_rows

_log = logging.getLogger(__name__)


class ExampleSet(Protocol):
    """Rows of any format. `strata` holds the group of each row that a split keeps in proportion, the label if any."""

    def __len__(self) -> int: ...

    def select(self, indices: Iterable[int]) -> Self:
        """The rows at `indices`, in that order."""

    @property
    def strata(self) -> Sequence[int]:
        """The group of every row."""

    def row_keys(self) -> list[str]:
        """Each row as one text; equal for equal rows only."""


AnyExamples = TypeVar("AnyExamples", bound=ExampleSet)


@dataclass(frozen=True)
class Examples:
    """Texts and their labels, row by row, and where each lies. Shared between readers: not to be changed in place."""

    texts: list[str]
    labels: list[int]
    places: Places = field(default=(), compare=False)

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, indices: Iterable[int]) -> "Examples":
        """The rows at `indices`, in that order."""
        chosen = list(indices)
        labels, places = [self.labels[i] for i in chosen], places_at(self.places, chosen)
        return Examples([self.texts[i] for i in chosen], labels, places)

    @property
    def strata(self) -> Sequence[int]:
        """The labels."""
        return self.labels

    def row_keys(self) -> list[str]:
        """Each row as one text."""
        return [f"{label}:{text}" for text, label in zip(self.texts, self.labels, strict=True)]


def load_examples(path: str | Path, spec: DataSpec) -> Examples | Dialogues:
    """Read and check the examples of one file in the configured format; other columns are ignored.

    A text is a string that is not blank. A label is an integer from 0 to labels - 1, or its decimal digits.
    Raises DataError for a file or column that is missing, and for unusable rows: their count and the first few.
    """
    return load_examples_and_column(path, spec, None)[0]


def load_examples_and_column(
    path: str | Path, spec: DataSpec, column: str | None
) -> tuple[Examples | Dialogues, list[Any]]:
    """Like `load_examples`, with the values of one more column, row by row. Raises DataError likewise."""
    rows = _usable_rows(path, spec, [column] if column else [])
    values, places = [row.values for row in rows], [f"{path} {row.place}" for row in rows]
    extra = [found[column] for found in values] if column else []
    collect = _collect_labelled if spec.format == "label" else collect_dialogues
    return collect(values, spec, places), extra


def label_names(path: str | Path, spec: DataSpec) -> list[str] | None:
    """The name of every label, by label, from the column `spec.label_name_column`; None if no column is configured.

    Raises DataError unless every label from 0 to labels - 1 has exactly one name, different from all others.
    """
    if spec.label_name_column is None:
        return None
    names: dict[int, set[str]] = defaultdict(set)
    for row in _usable_rows(path, spec, [spec.label_name_column]):
        values = row.values
        name = values[spec.label_name_column]
        names[_as_integer(values[spec.label_column])].add("" if name is None else str(name).strip())
    labels = spec.labels or 0
    faults = _name_faults(names, labels)
    if faults:
        raise DataError(
            f"{path} column {spec.label_name_column!r} does not name the labels one to one: {first_faults(faults)}; "
            "correct the file, or leave out data.label_name_column"
        )
    return [min(names[label]) for label in range(labels)]


def fingerprint(examples: Sequence[ExampleSet], salt: str) -> str:
    """Salted SHA-256 of all rows, whatever their order: tells whether the data changed, not what it is."""
    digests = [digest for part in examples for digest in row_digests(part, salt)]
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def row_digests(examples: ExampleSet, salt: str) -> list[bytes]:
    """Salted SHA-256 of every row; to sort by it is a shuffle that does not depend on the rows' order in the file."""
    key = hashlib.sha256(salt.encode()).digest()
    return [hashlib.sha256(key + row.encode()).digest() for row in examples.row_keys()]


def split_validation(examples: AnyExamples, fraction: float, seed: int) -> tuple[AnyExamples, AnyExamples]:
    """Split into training and validation rows, both in their old order.

    Systematic sampling: the r-th of a label's c rows, shuffled, stands at (r + 1/2) / c, and the rows that stand lowest
    go to validation. Every label so gives about its share, and a label's only row stays in training where it can.
    The number of validation rows is round(fraction · rows), at least one if fraction > 0, and leaves a row to train on.
    The choice depends on the rows and the seed, not on the rows' order.
    """
    digests = row_digests(examples, f"validation:{seed}")
    count = min(max(round(fraction * len(examples)), int(fraction > 0)), max(len(examples) - 1, 0))
    position = _positions_within_label(examples.strata, digests)
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


def _usable_rows(path: str | Path, spec: DataSpec, extra_columns: Sequence[str]) -> list[Row]:
    """Every row that can be used. Raises DataError when one cannot, unless the config skips such rows."""
    needed = _label_columns(spec) if spec.format == "label" else DIALOGUE_FORMATS[spec.format].columns(spec)
    columns, usable = [*needed, *extra_columns], list[Row]()
    faults: list[str] = []
    skips = spec.on_bad_row == "skip"
    for row in read_rows(path, tolerant=skips):
        if not usable and not faults:
            _require_columns(row, columns, path)
        fault = row.fault or _fault_of(row.values, columns, spec)
        if fault:
            faults.append(f"{row.place}: {fault}")
        else:
            usable.append(row)
    if faults:
        _report(path, faults, len(usable) if skips else 0)
    return usable


def _report(path: str | Path, faults: Sequence[str], usable: int) -> None:
    rows = "1 unusable row" if len(faults) == 1 else f"{len(faults)} unusable rows"
    if not usable:
        raise DataError(f"{path} has {rows}: {first_faults(faults)}; correct or remove them")
    _log.warning("%s has %s among %d, left out: %s", path, rows, usable + len(faults), first_faults(faults))


def _require_columns(row: Row, columns: Sequence[str], path: str | Path) -> None:
    missing = [column for column in columns if column not in row.values]
    if missing and not row.fault:
        found = [str(name) for name in row.values]
        nearest = get_close_matches(missing[0], found, n=1)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise DataError(
            f"{path} {row.place} has no column {quoted(missing)}: found {quoted(found)}, needed {quoted(columns)}; "
            f"{hint}correct the file or the column's name in the config's `data` section"
        )


def _fault_of(values: Values, columns: Sequence[str], spec: DataSpec) -> str | None:
    missing = [column for column in columns if column not in values]
    if missing:
        return f"no column {quoted(missing)}"
    return _label_fault(values, spec) if spec.format == "label" else dialogue_fault(values, spec)


def _label_columns(spec: DataSpec) -> list[str]:
    return [spec.text_column, spec.label_column]


def _label_fault(values: Values, spec: DataSpec) -> str | None:
    label, labels = values[spec.label_column], spec.labels or 0
    if _as_integer(label) not in range(labels):
        wrong = f"{spec.label_column!r} is {shorten(label)}, needed an integer from 0 to {labels - 1}"
        return text_fault(values, spec.text_column) or wrong
    return text_fault(values, spec.text_column)


def _collect_labelled(rows: Sequence[Values], spec: DataSpec, places: Places) -> Examples:
    labels = [_as_integer(values[spec.label_column]) for values in rows]
    return Examples([values[spec.text_column] for values in rows], labels, places)


def _as_integer(value: object) -> int:
    """The label as an integer, -1 if it is none; CSV knows no integers, so their digits count too."""
    if isinstance(value, str) and re.fullmatch(r"\s*[0-9]{1,7}\s*", value):
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else -1


def _name_faults(names: dict[int, set[str]], labels: int) -> list[str]:
    faults = [f"label {label} has no row" for label in range(labels) if label not in names]
    faults += [f"label {label} has an empty name" for label in sorted(names) if "" in names[label]]
    faults += [
        f"label {label} has the names {quoted(sorted(names[label]))}"
        for label in sorted(names)
        if len(names[label]) > 1
    ]
    owner: dict[str, int] = {}
    for label in sorted(names):
        for name in sorted(names[label]):
            if owner.setdefault(name, label) != label:
                faults.append(f"labels {owner[name]} and {label} are both named {name!r}")
    return faults
