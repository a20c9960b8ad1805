"""The edges' metrics as one: each a mean weighted by what it counts, so that edges are as many rows, not as one vote.

For metrics that are means (loss, accuracy, token accuracy, exact match, ROUGE) the result is the metric of all edges'
rows together, and perplexity follows from the loss. Macro-F1, BLEU and chrF are no means of rows: of these it is the
weighted mean of the edges' values, which needs no row and no text to leave an edge. Imports no torch.
"""

import math
from collections.abc import Mapping

from fedpipe_core.evaluation_schemas import EdgeEvaluation


def combined_metrics(evaluations: Mapping[str, EdgeEvaluation]) -> dict[str, float]:
    """Every metric that any edge measured, combined over the edges that did, in the first edge's order.

    Exact however edges are split or ordered; perplexity is the exponential of the mean loss (a geometric mean).
    """
    names = list(dict.fromkeys(name for found in evaluations.values() for name in found.metrics))
    return {name: _combined(name, [e for e in evaluations.values() if name in e.metrics]) for name in names}


def _combined(name: str, evaluations: list[EdgeEvaluation]) -> float:
    pairs = [(found.counted[name], found.metrics[name]) for found in evaluations]
    total = sum(count for count, _ in pairs)
    if name == "perplexity":
        return math.exp(math.fsum(count * math.log(value) for count, value in pairs) / total)
    return math.fsum(count * value for count, value in pairs) / total
