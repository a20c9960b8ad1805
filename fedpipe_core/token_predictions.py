"""A language model's answers on one frozen evaluation set, example by example, and what they are worth.

Per example it keeps sums only, never a text: of a metric over a corpus (BLEU, chrF) the counts it is made of, so that
the metric of any resample follows without writing the text again.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fedpipe_core.errors import IntegrityError
from fedpipe_core.predictions import Answers, Predictions, metric_of
from fedpipe_core.text_metrics import corpus_score

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class TokenPredictions:
    """Per example: the learned tokens, how many were right, and their summed cross-entropy; each (examples,).

    `written` holds, for every metric of generated text, the counts of each continued prompt, (prompts, counts).
    """

    evaluation_sha256: str
    tokens: NDArray[np.int64]
    right: NDArray[np.int64]
    total_losses: Floats
    written: Mapping[str, Floats] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise IntegrityError when the arrays are empty or do not describe the same examples."""
        shapes = {self.tokens.shape, self.right.shape, self.total_losses.shape}
        if len(shapes) != 1 or self.tokens.ndim != 1 or not self.tokens.size:
            raise IntegrityError(
                f"predictions on evaluation set {self.evaluation_sha256[:12]} hold arrays of shapes {sorted(shapes)}; "
                "tokens, right and total_losses need one entry per example; evaluate the model again"
            )

    @property
    def losses(self) -> Floats:
        """Mean cross-entropy of every example's learned tokens, in nats."""
        return self.total_losses / self.tokens

    @property
    def correct(self) -> Floats:
        """Share of every example's learned tokens that are the most likely ones."""
        return self.right / self.tokens

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what was measured."""
        return ("loss", "perplexity", "token_accuracy", *self.written)

    def metric(self, name: str) -> float:
        """Loss in nats per token, its exponential, the share of right tokens, or a metric of generated text."""
        return metric_of(self, name)

    def truth(self) -> NDArray[np.int64]:
        """How many tokens each example teaches; which ones, `evaluation_sha256` vouches for."""
        return self.tokens

    def examples_of(self, metric: str) -> int:
        """The examples, or the prompts that were continued."""
        return len(self.written[metric]) if metric in self.written else self.tokens.size

    def weight_of(self, metric: str) -> int:
        """The prompts that were continued, or the learned tokens."""
        return len(self.written[metric]) if metric in self.written else int(self.tokens.sum())

    def metric_of_draws(self, metric: str, draws: NDArray[np.int64]) -> Floats:
        """The metric of each row of `draws`: from the sums over its examples, so long examples count for more."""
        if metric in self.written:
            return np.array([corpus_score(metric, counts) for counts in _sums(self.written[metric], draws)])
        per_example = np.stack([self.right if metric == "token_accuracy" else self.total_losses, self.tokens], axis=1)
        totals = _sums(per_example, draws)
        mean = totals[:, 0] / totals[:, 1]
        return np.exp(mean) if metric == "perplexity" else mean

    def to_json(self) -> str:
        """Return the canonical JSON form; floats survive the round trip exactly."""
        return json.dumps(
            {
                "evaluation_sha256": self.evaluation_sha256,
                "tokens": self.tokens.tolist(),
                "right": self.right.tolist(),
                "total_losses": self.total_losses.tolist(),
                "written": {name: counts.tolist() for name, counts in self.written.items()},
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote. Raises IntegrityError when the text is anything else."""
        try:
            document: dict[str, Any] = json.loads(text)
            return cls(
                evaluation_sha256=str(document["evaluation_sha256"]),
                tokens=np.array(document["tokens"], dtype=np.int64),
                right=np.array(document["right"], dtype=np.int64),
                total_losses=np.array(document["total_losses"], dtype=np.float64),
                written={name: np.array(rows, dtype=np.float64) for name, rows in document["written"].items()},
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise IntegrityError(
                f"stored predictions cannot be read ({error!r}); needed tokens, right and total_losses of one "
                "evaluation set; evaluate the model again"
            ) from None


def read_answers(text: str) -> Answers:
    """Answers of either task from their JSON form. Raises IntegrityError when the text is none of them."""
    kind = TokenPredictions if '"total_losses"' in text else Predictions
    return kind.from_json(text)


def _sums(per_example: NDArray[Any], draws: NDArray[np.int64]) -> Floats:
    """For each row of `draws`, the sum of its examples' counts: (rows, counts)."""
    rows, examples = len(draws), len(per_example)
    offsets = np.arange(rows)[:, None] * examples
    times = np.bincount((draws + offsets).ravel(), minlength=rows * examples).reshape(rows, examples)
    sums: Floats = times.astype(np.float64) @ per_example.astype(np.float64)
    return sums
