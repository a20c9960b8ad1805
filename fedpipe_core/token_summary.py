"""How long an edge's rows are in tokens, what did not fit, and which tokens of one row are learned.

For the edge's own eyes: a rendered row is its text, and never leaves it.
"""

import itertools
from typing import Any

import numpy as np

from fedpipe_core.profiling import EdgeData
from fedpipe_core.tokenizing import IGNORED, TokenizedExamples

PERCENTILES = (50, 90, 99, 100)
LEARNED = "⟦{}⟧"  # what stands around tokens that are learned


def summarize_tokens(data: EdgeData, tokenizer: Any) -> dict[str, Any]:
    """Percentiles of the rows' lengths in tokens, the shares that were cut and left out, and a rendered row."""
    parts = (data.train, data.validation)
    lengths = [len(ids) for part in parts for ids in part.token_ids]
    cut, dropped = (sum(getattr(part, name) for part in parts) for name in ("cut", "dropped"))
    rows = len(lengths) + dropped
    return {
        "length_percentiles": {str(q): int(np.percentile(lengths, q, method="higher")) for q in PERCENTILES},
        "cut_share": cut / rows,
        "dropped_share": dropped / rows,
        "example": render_row(data.train, 0, tokenizer),
    }


def render_row(rows: TokenizedExamples, index: int, tokenizer: Any) -> str:
    """A row as the model reads it, with ⟦⟧ around what is learned; a classifier's row with its label behind."""
    ids, labels = rows.token_ids[index], rows.labels[index]
    if isinstance(labels, int):
        return f"{tokenizer.decode(ids)} → {LEARNED.format(labels)}"
    groups = itertools.groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != IGNORED)
    texts = [(learned, tokenizer.decode([token for token, _ in group])) for learned, group in groups]
    return "".join(LEARNED.format(text) if learned else text for learned, text in texts)
