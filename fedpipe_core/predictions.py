"""One model's answers on one frozen evaluation set, example by example, and what they are worth beyond chance.

Kept with every released version, so that a later challenger is compared example by example without loading the old
model. `Predictions` are a classifier's; a language model's are `token_predictions`. How two versions are compared is
the gate's matter; where the file lies is the tracker's.
"""

import json
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from fedpipe_core.errors import IntegrityError

REPLICATES = 2000
LOWER_IS_BETTER = ("loss", "perplexity")
_DRAWS_AT_ONCE = 2_000_000


class Answers(Protocol):
    """What the gate needs to know of a model's answers, whatever its task; `losses` is in nats, (examples,)."""

    @property
    def evaluation_sha256(self) -> str:
        """Name of the evaluation set: answers are comparable only where it is equal."""

    @property
    def losses(self) -> NDArray[np.float64]:
        """Loss of every example."""

    @property
    def correct(self) -> NDArray[np.float64]:
        """How right every example's answer is, from 0 to 1."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what was measured, the most telling first."""

    def truth(self) -> NDArray[Any]:
        """What two models' answers to the same examples share."""

    def examples_of(self, metric: str) -> int:
        """How many examples a metric rests on."""

    def weight_of(self, metric: str) -> int:
        """What a metric is a mean over: its weight beside answers to other examples."""

    def metric_of_draws(self, metric: str, draws: NDArray[np.int64]) -> NDArray[np.float64]:
        """The metric of each row of `draws`, which holds indices of its examples; shape (rows,)."""

    def to_json(self) -> str:
        """The canonical JSON form."""


def metric_of(answers: Answers, name: str) -> float:
    """A metric over all its examples."""
    return float(answers.metric_of_draws(name, np.arange(answers.examples_of(name))[None, :])[0])


@dataclass(frozen=True, eq=False)
class Predictions:
    """True labels, predicted labels and losses of the same examples, each of shape (examples,).

    `evaluation_sha256` names the evaluation set: predictions are comparable only where it is equal.
    """

    evaluation_sha256: str
    labels: NDArray[np.int64]
    predicted: NDArray[np.int64]
    losses: NDArray[np.float64]
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "macro_f1", "loss")

    def __post_init__(self) -> None:
        """Raise IntegrityError when the arrays are empty or do not describe the same examples."""
        shapes = {self.labels.shape, self.predicted.shape, self.losses.shape}
        if len(shapes) != 1 or self.labels.ndim != 1 or not self.labels.size:
            raise IntegrityError(
                f"predictions on evaluation set {self.evaluation_sha256[:12]} hold arrays of shapes {sorted(shapes)}; "
                "labels, predicted and losses need one entry per example; evaluate the model again"
            )

    @property
    def correct(self) -> NDArray[np.float64]:
        """1 where the prediction is right, else 0; shape (examples,)."""
        return np.where(self.labels == self.predicted, 1.0, 0.0)

    def metric(self, name: str) -> float:
        """Accuracy, macro-F1 over the labels that occur, or mean loss."""
        return metric_of(self, name)

    def truth(self) -> NDArray[np.int64]:
        """The true labels."""
        return self.labels

    def examples_of(self, metric: str) -> int:
        """All of them, whatever the metric."""
        return self.labels.size

    def weight_of(self, metric: str) -> int:
        """The examples."""
        return self.examples_of(metric)

    def metric_of_draws(self, metric: str, draws: NDArray[np.int64]) -> NDArray[np.float64]:
        """Accuracy, macro-F1 or mean loss of each row of `draws`; shape (rows,)."""
        if metric == "macro_f1":
            return _macro_f1(self.labels[draws], self.predicted[draws])
        mean: NDArray[np.float64] = {"accuracy": self.correct, "loss": self.losses}[metric][draws].mean(axis=1)
        return mean

    def to_json(self) -> str:
        """Return the canonical JSON form; floats survive the round trip exactly."""
        return json.dumps(
            {
                "evaluation_sha256": self.evaluation_sha256,
                "labels": self.labels.tolist(),
                "predicted": self.predicted.tolist(),
                "losses": self.losses.tolist(),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote. Raises IntegrityError when the text is anything else."""
        try:
            document = json.loads(text)
            return cls(
                evaluation_sha256=str(document["evaluation_sha256"]),
                labels=np.array(document["labels"], dtype=np.int64),
                predicted=np.array(document["predicted"], dtype=np.int64),
                losses=np.array(document["losses"], dtype=np.float64),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise IntegrityError(
                f"stored predictions cannot be read ({error!r}); needed labels, predicted and losses of one "
                "evaluation set; evaluate the model again"
            ) from None


@dataclass(frozen=True)
class Interval:
    """A measured value with its bootstrap confidence interval."""

    estimate: float
    low: float
    high: float
    confidence: float

    def __str__(self) -> str:
        return f"{self.estimate:.4f} ({self.confidence:.0%} interval {self.low:.4f} to {self.high:.4f})"


def metric_interval(predictions: Answers, metric: str, confidence: float, seed: int = 0) -> Interval:
    """Percentile bootstrap interval of one model's metric (Efron and Tibshirani 1993, chapter 13)."""
    replicates = _replicates((predictions,), metric, seed)[0]
    return _percentile_interval(metric_of(predictions, metric), replicates, confidence)


def improvement_interval(
    challenger: Answers, champion: Answers, metric: str, confidence: float, seed: int = 0
) -> Interval:
    """Paired bootstrap interval of the challenger's gain over the champion; positive is better, for loss too.

    Both models are scored on the same resampled examples, so what makes an example hard for both cancels.
    """
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    replicates = _replicates((challenger, champion), metric, seed)
    gain = metric_of(challenger, metric) - metric_of(champion, metric)
    return _percentile_interval(sign * gain, sign * (replicates[0] - replicates[1]), confidence)


def _percentile_interval(estimate: float, replicates: NDArray[np.float64], confidence: float) -> Interval:
    tail = (1 - confidence) / 2
    low, high = np.quantile(replicates, [tail, 1 - tail])
    return Interval(estimate, float(low), float(high), confidence)


def _replicates(models: tuple[Answers, ...], metric: str, seed: int) -> NDArray[np.float64]:
    """Metric of every model on the same resamples; shape (models, REPLICATES)."""
    rng = np.random.default_rng(seed)
    examples = models[0].examples_of(metric)
    at_once = max(1, _DRAWS_AT_ONCE // examples)  # bounds the memory, whatever the evaluation set's size
    parts = []
    for start in range(0, REPLICATES, at_once):
        draws = rng.integers(examples, size=(min(at_once, REPLICATES - start), examples))
        parts.append(np.stack([model.metric_of_draws(metric, draws) for model in models]))
    return np.concatenate(parts, axis=1)


def _macro_f1(labels: NDArray[np.int64], predicted: NDArray[np.int64]) -> NDArray[np.float64]:
    """Mean over occurring labels of 2·TP / (true + predicted), per row of (rows, examples) arrays."""
    rows, count = labels.shape[0], int(max(labels.max(), predicted.max())) + 1
    offsets = np.arange(rows)[:, None] * count  # one histogram per row, all counted in one pass

    def histogram(cells: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.bincount(cells, minlength=rows * count).reshape(rows, count)

    true, claimed = histogram((labels + offsets).ravel()), histogram((predicted + offsets).ravel())
    hits = histogram((labels + offsets)[labels == predicted])
    occurring = true + claimed > 0
    f1 = np.divide(2.0 * hits, true + claimed, out=np.zeros(true.shape), where=occurring)
    mean: NDArray[np.float64] = f1.sum(axis=1) / occurring.sum(axis=1)
    return mean
