import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedpipe_core.errors import IntegrityError
from fedpipe_core.predictions import Predictions, improvement_interval, metric_interval

LABELS = arrays.arrays(np.int64, 30, elements=st.integers(0, 5))
LOSSES = arrays.arrays(np.float64, 30, elements=st.floats(0, 50))


def model(predicted: np.ndarray, labels: np.ndarray) -> Predictions:
    return Predictions("a" * 64, labels, predicted, np.where(labels == predicted, 0.1, 2.0))


def dense_macro_f1(labels: np.ndarray, predicted: np.ndarray) -> float:
    scores = []
    for label in sorted({*labels.tolist(), *predicted.tolist()}):
        hits = int(((labels == label) & (predicted == label)).sum())
        scores.append(2 * hits / (int((labels == label).sum()) + int((predicted == label).sum())))
    return float(np.mean(scores))


@settings(deadline=None, max_examples=50)
@given(labels=LABELS, predicted=LABELS)
def test_macro_f1_agrees_with_its_definition_label_by_label(labels: np.ndarray, predicted: np.ndarray) -> None:
    assert model(predicted, labels).metric("macro_f1") == pytest.approx(dense_macro_f1(labels, predicted))


@settings(deadline=None, max_examples=50)
@given(labels=LABELS, predicted=LABELS, losses=LOSSES)
def test_json_round_trip_is_exact(labels: np.ndarray, predicted: np.ndarray, losses: np.ndarray) -> None:
    written = Predictions("b" * 64, labels, predicted, losses)
    read = Predictions.from_json(written.to_json())
    assert read.evaluation_sha256 == written.evaluation_sha256
    for name in ("labels", "predicted", "losses"):
        assert np.array_equal(getattr(read, name), getattr(written, name))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"evaluation_sha256": "a", "labels": [1], "predicted": ["x"]}'])
def test_text_that_holds_no_predictions_is_refused(text: str) -> None:
    with pytest.raises(IntegrityError, match="evaluate the model again"):
        Predictions.from_json(text)


def test_arrays_of_different_lengths_are_refused() -> None:
    with pytest.raises(IntegrityError, match="one entry per example"):
        Predictions("a" * 64, np.zeros(3, dtype=np.int64), np.zeros(2, dtype=np.int64), np.zeros(3))


def test_interval_of_an_accuracy_covers_the_binomial_one() -> None:
    labels = np.zeros(1000, dtype=np.int64)
    interval = metric_interval(model((np.arange(1000) < 100).astype(np.int64), labels), "accuracy", 0.95)
    half_width = 1.96 * np.sqrt(0.9 * 0.1 / 1000)
    assert interval.estimate == pytest.approx(0.9)
    assert interval.low == pytest.approx(0.9 - half_width, abs=0.004)
    assert interval.high == pytest.approx(0.9 + half_width, abs=0.004)


def test_pairing_makes_the_interval_narrower_than_the_models_own() -> None:
    labels = np.zeros(1000, dtype=np.int64)
    champion = model((np.arange(1000) < 200).astype(np.int64), labels)
    challenger = model((np.arange(1000) < 180).astype(np.int64), labels)
    gain = improvement_interval(challenger, champion, "accuracy", 0.95)
    alone = metric_interval(challenger, "accuracy", 0.95)
    assert gain.estimate == pytest.approx(0.02)
    assert gain.high - gain.low < 0.5 * (alone.high - alone.low)
    assert gain.low > 0


def test_gain_in_loss_is_positive_when_the_loss_falls() -> None:
    labels = np.zeros(200, dtype=np.int64)
    champion = model((np.arange(200) < 80).astype(np.int64), labels)
    challenger = model((np.arange(200) < 20).astype(np.int64), labels)
    gain = improvement_interval(challenger, champion, "loss", 0.95)
    assert gain.low > 0
    assert gain.estimate == pytest.approx(champion.metric("loss") - challenger.metric("loss"))


def test_same_seed_gives_the_same_interval() -> None:
    labels = np.arange(300) % 7
    one, other = model(labels.copy(), labels), model((labels + (np.arange(300) % 5 == 0)) % 7, labels)
    first = improvement_interval(one, other, "macro_f1", 0.9, seed=3)
    assert first == improvement_interval(one, other, "macro_f1", 0.9, seed=3)
    assert first != improvement_interval(one, other, "macro_f1", 0.9, seed=4)
