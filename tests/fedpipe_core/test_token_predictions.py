import math

import numpy as np
import pytest

from fedpipe_core.config import GenerationSpec, ReleaseSpec
from fedpipe_core.errors import IntegrityError
from fedpipe_core.gate import decide
from fedpipe_core.predictions import Predictions, improvement_interval, metric_interval
from fedpipe_core.text_metrics import text_counts
from fedpipe_core.token_predictions import TokenPredictions, read_answers


def answers(loss: float = 1.0, examples: int = 60, texts: str = "right") -> TokenPredictions:
    tokens = np.arange(examples) % 7 + 1
    losses = tokens * (loss + 0.1 * np.sin(np.arange(examples)))
    written = [texts if number % 2 else "right" for number in range(examples)]
    spec = GenerationSpec(metrics=("bleu", "exact_match"))
    counts = text_counts(spec, [f"{text} here and now" for text in written], [("right here and now",)] * examples)
    return TokenPredictions("a" * 64, tokens, tokens // 2, losses, counts)


def test_loss_is_the_mean_over_tokens_not_over_examples():
    found = TokenPredictions("a" * 64, np.array([1, 9]), np.array([1, 0]), np.array([1.0, 27.0]))
    assert found.metric("loss") == pytest.approx(2.8)
    assert found.metric("perplexity") == pytest.approx(math.exp(2.8))
    assert found.metric("token_accuracy") == pytest.approx(0.1)
    assert found.losses.tolist() == [1.0, 3.0]


def test_metrics_of_text_rest_on_the_prompts_that_were_continued():
    found = TokenPredictions(
        "a" * 64, np.ones(5, int), np.ones(5, int), np.ones(5), {"exact_match": np.array([[1, 1]])}
    )
    assert found.examples_of("exact_match") == 1
    assert found.examples_of("loss") == 5
    assert found.metric("exact_match") == 1.0


def test_json_keeps_every_digit():
    found = answers()
    again = read_answers(found.to_json())
    assert isinstance(again, TokenPredictions)
    assert again.to_json() == found.to_json()
    assert {name: again.metric(name) for name in again.metrics} == {name: found.metric(name) for name in found.metrics}


def test_a_classifier_s_answers_are_read_as_such():
    found = Predictions("a" * 64, np.array([0, 1]), np.array([0, 0]), np.array([0.1, 2.5]))
    assert isinstance(read_answers(found.to_json()), Predictions)


def test_damaged_answers_are_refused():
    with pytest.raises(IntegrityError, match="cannot be read"):
        read_answers('{"total_losses": [1]}')
    with pytest.raises(IntegrityError, match="hold arrays of shapes"):
        TokenPredictions("a" * 64, np.ones(2, int), np.ones(3, int), np.ones(3))


@pytest.mark.parametrize("metric", ["loss", "perplexity", "token_accuracy", "bleu", "exact_match"])
def test_interval_holds_the_metric(metric):
    found = answers(texts="wrong")
    interval = metric_interval(found, metric, 0.95)
    assert interval.low <= found.metric(metric) <= interval.high


@pytest.mark.parametrize("metric", ["loss", "perplexity"])
def test_a_lower_loss_is_an_improvement(metric):
    gain = improvement_interval(answers(1.0), answers(1.2), metric, 0.95)
    assert gain.low > 0
    assert gain.estimate == pytest.approx(answers(1.2).metric(metric) - answers(1.0).metric(metric))


@pytest.mark.parametrize("metric", [None, "loss", "perplexity", "bleu", "exact_match"])
def test_gate_promotes_by_every_metric_and_by_loss_where_none_is_named(metric):
    better, worse = answers(1.0), answers(1.2, texts="wrong")
    spec = ReleaseSpec(metric=metric)
    assert decide(better, worse, spec).promoted
    verdict = decide(worse, better, spec)
    assert not verdict.promoted
    assert verdict.reasons[0].startswith(metric or "loss")


def test_gate_compares_token_accuracy_slice_by_slice():
    before = answers()
    right = np.where(np.arange(60) < 30, 0, before.tokens)
    after = TokenPredictions(before.evaluation_sha256, before.tokens, right, before.total_losses * 0.5)
    decision = decide(after, before, ReleaseSpec(metric="loss"), ["first"] * 30 + ["second"] * 30)
    assert not decision.promoted
    assert "1 of 2 slices: first" in decision.reasons[0]
