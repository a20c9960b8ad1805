"""Several examples in one row of a batch, none of which sees another.

Positions start at 0 with every example, and no attention mask is given: from the positions `transformers` makes a mask
that is block-diagonal and causal, unless it keeps a cache. What is left of a row starts at position 1, so that it
belongs to no example.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedpipe_core.tokenizing import IGNORED, TokenizedExamples


def pack_batch(tokenized: TokenizedExamples, indices: Sequence[int], width: int) -> dict[str, Tensor]:
    """The rows at `indices` of a language model, as many in a row of at most `width` tokens as fit, the longest first.

    Tensors: input_ids, position_ids and labels, (packed rows, tokens). An example's first token is learned by nobody,
    for the token before it is another example's.
    """
    rows = _first_fit([(index, len(tokenized.token_ids[index])) for index in indices], width)
    used = max(sum(len(tokenized.token_ids[index]) for index in row) for row in rows)
    packed = [_packed(tokenized, row, used) for row in rows]
    names = ("input_ids", "position_ids", "labels")
    return {name: torch.tensor([row[name] for row in packed]) for name in names}


def count_examples(batch: Mapping[str, Tensor]) -> int:
    """How many examples a batch holds, packed or not."""
    positions = batch.get("position_ids")
    return len(batch["labels"]) if positions is None else int((positions == 0).sum())


def _first_fit(lengths: list[tuple[int, int]], width: int) -> list[list[int]]:
    """First-fit decreasing: at most 11/9 of the fewest rows possible, and 6/9 more (Johnson 1973)."""
    rows: list[list[int]] = []
    room: list[int] = []
    for index, length in sorted(lengths, key=lambda item: -item[1]):
        fitting = next((k for k, left in enumerate(room) if left >= length), len(rows))
        if fitting == len(rows):
            rows.append([])
            room.append(max(width, length))
        rows[fitting].append(index)
        room[fitting] -= length
    return rows


def _packed(tokenized: TokenizedExamples, indices: list[int], width: int) -> dict[str, list[int]]:
    row: dict[str, list[int]] = {"input_ids": [], "position_ids": [], "labels": []}
    for index in indices:
        ids, labels = tokenized.token_ids[index], tokenized.labels[index]
        row["input_ids"] += ids
        row["position_ids"] += range(len(ids))
        row["labels"] += [IGNORED] * len(ids) if isinstance(labels, int) else [IGNORED, *labels[1:]]
    rest = width - len(row["input_ids"])
    row["input_ids"] += [tokenized.pad_token_id] * rest
    row["position_ids"] += range(1, rest + 1)
    row["labels"] += [IGNORED] * rest
    return row
