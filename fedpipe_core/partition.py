"""Which rows an edge holds: its own file, or its shard of one file dealt to simulated edges.

Decides the dealing, a function of rows, edges and seed that does not depend on the rows' order in the file; leaves to
`fedpipe_core.data` what a row is. Every row is in at most one shard and no shard is empty.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from fedpipe_core.config import DataSpec, EdgeSpec, FederationConfig, PartitionSpec
from fedpipe_core.data import (
    Examples,
    ExampleSet,
    load_examples,
    load_examples_and_column,
    row_digests,
    split_validation,
)
from fedpipe_core.dialogues import Dialogues
from fedpipe_core.errors import ConfigError, DataError
from fedpipe_core.seeding import random_generator

VALUES_SHOWN = 12
Named = tuple[str, tuple[str | int, ...] | None]  # an edge's id and its values of the partition column
_reading = Lock()


@dataclass(frozen=True)
class Partition:
    """The shard of every edge by edge id, and how many rows no edge holds because none names their column value."""

    shards: dict[str, Examples | Dialogues]
    left_out: int


def load_edge_examples(config: FederationConfig, edge: EdgeSpec) -> Examples | Dialogues:
    """All rows of one edge, for training and validation together.

    Without `data.partition` they are the file `data.train` with {edge_id} replaced; with it, the edge's shard of that
    file, which a process reads and deals once for all edges.
    Raises DataError for a file that cannot be used, and for an edge left without rows.
    """
    if config.data.partition is None:
        return load_examples(config.data.train.replace("{edge_id}", edge.edge_id), config.data)
    return load_partition(config).shards[edge.edge_id]


def load_split_examples(config: FederationConfig, edge: EdgeSpec) -> tuple[Examples | Dialogues, Examples | Dialogues]:
    """An edge's rows for training and for validation: of a file of its own where one is named, else a share of all.

    Raises DataError as `load_edge_examples` does.
    """
    examples, data = load_edge_examples(config, edge), config.data
    if data.validation:
        return examples, load_examples(data.validation.replace("{edge_id}", edge.edge_id), data)
    return split_validation(examples, data.validation_fraction, config.seed)


def load_partition(config: FederationConfig) -> Partition:
    """Read `data.train` and deal it to the edges as `data.partition` says. Raises DataError as `deal_examples` does."""
    path = Path(config.data.train)
    status = path.stat() if path.exists() else None
    version = (status.st_size, status.st_mtime_ns) if status else (0, 0)
    edges = tuple((edge.edge_id, edge.values) for edge in config.local_edges)
    with _reading:  # edges that start together wait for one read instead of making one each
        return _read_partition(config.data, edges, config.seed, version)


@lru_cache(maxsize=1)
def _read_partition(data: DataSpec, named: tuple[Named, ...], seed: int, version: tuple[int, int]) -> Partition:
    # `version` is only a part of the cache's key, so that a file written anew is read anew.
    spec, edges = data.partition, [EdgeSpec(edge_id=edge_id, values=values) for edge_id, values in named]
    if spec is None:
        raise ConfigError(
            "data.partition is missing, needed to deal data.train to the edges; name how, or use {edge_id}"
        )
    if spec.column is None:
        return deal_examples(load_examples(data.train, data), None, spec, edges, seed)
    examples, values = load_examples_and_column(data.train, data, spec.column)
    return deal_examples(examples, values, spec, edges, seed)


def deal_examples(
    examples: Examples | Dialogues,
    column_values: Sequence[Any] | None,
    spec: PartitionSpec,
    edges: Sequence[EdgeSpec],
    seed: int,
) -> Partition:
    """Deal the rows to the edges; `column_values` are the values of `spec.column`, row by row.

    - `iid`: all rows at random, in shards whose sizes differ by one at most.
    - `column`: to each edge the rows whose value it names; rows whose value nobody names are left out.
    - `dirichlet`: per label, or value of the column where one is named, shares drawn from Dirichlet(alpha, …, alpha)
      over the edges (arXiv 1905.12022).

    A shard keeps the rows' old order. Raises ConfigError if two edges name one value, DataError if a named value is in
    no row or an edge gets no row.
    """
    order = _shuffled(examples, seed)
    if spec.by == "column":
        dealt = _deal_by_column(column_values or [], spec, edges)
    elif spec.by == "dirichlet":
        groups = examples.strata if column_values is None else [str(value) for value in column_values]
        dealt = _deal_by_group(order, groups, len(edges), spec.alpha, seed)
    else:
        dealt = [order[k :: len(edges)] for k in range(len(edges))]
    _require_rows(dealt, spec, edges, len(examples))
    shards = {edge.edge_id: examples.select(sorted(rows)) for edge, rows in zip(edges, dealt, strict=True)}
    return Partition(shards, left_out=len(examples) - sum(map(len, dealt)))


def _shuffled(examples: ExampleSet, seed: int) -> list[int]:
    digests = row_digests(examples, f"partition:{seed}")
    return sorted(range(len(examples)), key=lambda i: digests[i])


def _deal_by_group(
    order: Sequence[int], groups: Sequence[int] | Sequence[str], num_edges: int, alpha: float, seed: int
) -> list[list[int]]:
    rows_of: dict[int | str, list[int]] = defaultdict(list)
    for i in order:
        rows_of[groups[i]].append(i)
    dealt: list[list[int]] = [[] for _ in range(num_edges)]
    for group, rows in rows_of.items():
        shares = random_generator(seed, "dirichlet", group).dirichlet([alpha] * num_edges)
        # Cutting at rounded cumulative shares deals every row once and misses no share by more than one row.
        cuts = np.rint(np.cumsum(shares)[:-1] * len(rows)).astype(int)
        for shard, part in zip(dealt, np.split(np.array(rows), cuts), strict=True):
            shard.extend(part.tolist())
    return dealt


def _deal_by_column(values: Sequence[Any], spec: PartitionSpec, edges: Sequence[EdgeSpec]) -> list[list[int]]:
    # Compared as text: YAML reads 3 as a number, and the same column of a CSV file holds "3".
    owner = _owners(edges)
    _require_values(owner, Counter(map(str, values)), spec, edges)
    dealt: list[list[int]] = [[] for _ in edges]
    for i, value in enumerate(values):
        if str(value) in owner:
            dealt[owner[str(value)]].append(i)
    return dealt


def _owners(edges: Sequence[EdgeSpec]) -> dict[str, int]:
    owner: dict[str, int] = {}
    for k, edge in enumerate(edges):
        for value in map(str, edge.values or ()):
            if owner.setdefault(value, k) != k:
                raise ConfigError(
                    f"edges {edges[owner[value]].edge_id!r} and {edge.edge_id!r} both name the value {value!r} of the "
                    "partition column; give every value to one edge"
                )
    return owner


def _require_values(owner: dict[str, int], found: Counter[str], spec: PartitionSpec, edges: Sequence[EdgeSpec]) -> None:
    unknown = [value for value in owner if value not in found]
    if unknown:
        nearest = get_close_matches(unknown[0], found, n=1)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise DataError(
            f"edge {edges[owner[unknown[0]]].edge_id!r} names the value {unknown[0]!r} of column {spec.column!r}, "
            f"which no row of data.train has: found {_listed(sorted(found))}; {hint}correct the edge's `values`"
        )


def _require_rows(
    dealt: Sequence[Sequence[int]], spec: PartitionSpec, edges: Sequence[EdgeSpec], num_rows: int
) -> None:
    empty = [edge.edge_id for edge, rows in zip(edges, dealt, strict=True) if not rows]
    remedy = {
        "iid": "list fewer edges or give more rows",
        "column": "name values of the partition column in its `values`",
        "dirichlet": f"raise data.partition.alpha (now {spec.alpha:g}), list fewer edges, or change the seed",
    }
    if empty:
        which = f"edge {empty[0]!r} gets" if len(empty) == 1 else f"edges {_listed(empty)} get"
        raise DataError(f"{which} none of the {num_rows} rows of data.train, needed at least one; {remedy[spec.by]}")


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - VALUES_SHOWN
    return ", ".join(map(repr, names[:VALUES_SHOWN])) + (f" and {rest} more" if rest > 0 else "")
