"""Turns an edge's examples into batches of tensors.

Decides the order of training rows, which follows from the seed, the round and the edge alone, and how rows are padded:
rows of like length share a batch, for padding is computed like any token. Leaves to `fedpipe_core.training` how many
steps are made and to `fedpipe_core.evaluation` what is measured.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpipe_core.errors import DataError
from fedpipe_core.packing import pack_batch
from fedpipe_core.seeding import random_generator
from fedpipe_core.tokenizing import IGNORED, TokenizedExamples

Batch = dict[str, Tensor]

WINDOW_BATCHES = 16  # rows are grouped by length among this many batches; more would pad less and shuffle less
FORESEEN_BATCHES = 64  # fewest batches that `tokens_per_example` averages


def training_batches(
    tokenized: TokenizedExamples,
    batch_size: int,
    steps: int,
    seed_parts: Sequence[int | str],
    packed_width: int | None = None,
) -> Iterator[Batch]:
    """Yield `steps` batches of exactly `batch_size` rows, an epoch in a new order behind the other.

    An epoch is shuffled, then sorted by length within windows of 16 batches, whose order is shuffled again. Within an
    epoch every row comes once; a batch may span two epochs. `seed_parts`, such as (seed, round, edge_id), fixes the
    order. Tensors: input_ids and attention_mask (batch, tokens), labels (batch,) or (batch, tokens), all int64; with
    `packed_width`, in tokens, those of `packing.pack_batch`.
    Raises DataError if there are no rows.
    """
    order = _epochs(_lengths(tokenized), batch_size, random_generator("training_batches", *seed_parts))
    for _ in range(steps):
        indices = list(itertools.islice(order, batch_size))
        yield pack_batch(tokenized, indices, packed_width) if packed_width else pad_batch(tokenized, indices)


def evaluation_batches(
    tokenized: TokenizedExamples, batch_size: int, pad_to_multiple_of: int = 1
) -> Iterator[tuple[list[int], Batch]]:
    """Yield every row once, with the rows' indices, longest first.

    Rows of like length share a batch, so little is padded; the longest come first, so memory runs out at once or never.
    """
    order = sorted(range(len(tokenized)), key=lambda index: -len(tokenized.token_ids[index]))
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        yield indices, pad_batch(tokenized, indices, pad_to_multiple_of)


def tokens_per_example(tokenized: TokenizedExamples, batch_size: int, pad_to_multiple_of: int = 1) -> float:
    """Mean padded length of an example in `training_batches`, in tokens: the mean width of a batch.

    It is read off one epoch (of 64 batches at least) in an order of its own; other orders differ by chance alone.
    Raises DataError if there are no rows.
    """
    lengths = _lengths(tokenized)
    order = _epochs(lengths, batch_size, random_generator("tokens_per_example"))
    batches = max(FORESEEN_BATCHES, math.ceil(len(lengths) / batch_size))
    longest = lengths[list(itertools.islice(order, batches * batch_size))].reshape(batches, batch_size).max(axis=1)
    return float(np.mean([_padded_length(int(length), pad_to_multiple_of) for length in longest]))


def longest_example_tokens(tokenized: TokenizedExamples, pad_to_multiple_of: int = 1) -> int:
    """Width of the widest batch these rows can give, in tokens: what the peak memory follows from."""
    return _padded_length(max(len(ids) for ids in tokenized.token_ids), pad_to_multiple_of)


def pad_batch(tokenized: TokenizedExamples, indices: Sequence[int], pad_to_multiple_of: int = 1) -> Batch:
    """The rows at `indices` as tensors, padded on the right to the longest of them, rounded up to the multiple."""
    rows = [tokenized.token_ids[index] for index in indices]
    width = _padded_length(max(map(len, rows)), pad_to_multiple_of)
    lengths = torch.tensor([len(row) for row in rows])
    return {
        "input_ids": torch.tensor([_padded(row, width, tokenized.pad_token_id) for row in rows]),
        "attention_mask": (torch.arange(width) < lengths[:, None]).long(),
        "labels": torch.tensor([_padded(tokenized.labels[index], width, IGNORED) for index in indices]),
    }


def _padded(row: int | list[int], width: int, filling: int) -> int | list[int]:
    """A row of one value per token at full width; a single label is left as it is."""
    return row if isinstance(row, int) else row + [filling] * (width - len(row))


def _padded_length(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _lengths(tokenized: TokenizedExamples) -> NDArray[np.int64]:
    if not len(tokenized):
        raise DataError("there are 0 rows to train on, needed at least one; give the edge data or leave it out")
    return np.array([len(ids) for ids in tokenized.token_ids], dtype=np.int64)


def _epochs(lengths: NDArray[np.int64], batch_size: int, generator: np.random.Generator) -> Iterator[int]:
    """Row indices without end; every `batch_size` of them are a batch."""
    window, begun = WINDOW_BATCHES * batch_size, 0
    while True:
        order = generator.permutation(len(lengths))
        missing = min(len(order), -begun % batch_size)  # rows that complete the batch which the last epoch began
        yield from order[:missing].tolist()
        for start in range(missing, len(order), window):
            yield from _grouped(order[start : start + window], lengths, batch_size, generator)
        begun += len(order)


def _grouped(
    rows: NDArray[np.int64], lengths: NDArray[np.int64], batch_size: int, generator: np.random.Generator
) -> list[int]:
    """The rows with those of like length in one batch, whole batches in random order, an incomplete one last."""
    ordered = rows[np.argsort(lengths[rows], kind="stable")]
    whole = len(rows) // batch_size * batch_size
    batches = generator.permutation(ordered[:whole].reshape(-1, batch_size))
    return [*batches.ravel().tolist(), *ordered[whole:].tolist()]
