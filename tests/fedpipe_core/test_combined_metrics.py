"""The edges' metrics as one: what the algebra promises, on answers that are split at random."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpipe_core.combined_metrics import combined_metrics
from fedpipe_core.config_inputs import GenerationSpec
from fedpipe_core.evaluation import metrics_of
from fedpipe_core.evaluation_schemas import EdgeEvaluation
from fedpipe_core.predictions import Answers, Predictions
from fedpipe_core.text_metrics import text_counts
from fedpipe_core.token_predictions import TokenPredictions

WORDS = ("a", "b", "c", "d")
METRICS = ("bleu", "chrf", "rouge1", "exact_match")
parts = st.lists(st.integers(1, 7), min_size=1, max_size=5)


def evaluation(answers: Answers) -> EdgeEvaluation:
    found = metrics_of(answers)
    counted = {name: answers.weight_of(name) for name in found}
    return EdgeEvaluation(rows=len(answers.losses), rows_sha256="a" * 64, metrics=found, counted=counted)


def classified(rows: int, generator: np.random.Generator) -> Predictions:
    labels, predicted = generator.integers(3, size=(2, rows))
    return Predictions("a" * 64, labels, predicted, generator.exponential(size=rows))


def written(rows: int, generator: np.random.Generator) -> TokenPredictions:
    tokens = generator.integers(1, 9, size=rows)
    right = generator.integers(0, tokens + 1)
    texts, answers = ([" ".join(generator.choice(WORDS, size=5)) for _ in range(rows)] for _ in range(2))
    counts = text_counts(GenerationSpec(metrics=METRICS), texts, [(answer,) for answer in answers])
    return TokenPredictions("a" * 64, tokens, right, tokens * generator.exponential(size=rows), counts)


def joined_labels(answers: list[Predictions]) -> Predictions:
    fields = ([getattr(a, name) for a in answers] for name in ("labels", "predicted", "losses"))
    return Predictions("a" * 64, *map(np.concatenate, fields))


def joined_texts(answers: list[TokenPredictions]) -> TokenPredictions:
    fields = ([getattr(a, name) for a in answers] for name in ("tokens", "right", "total_losses"))
    counts = {name: np.concatenate([a.written[name] for a in answers]) for name in METRICS}
    return TokenPredictions("a" * 64, *map(np.concatenate, fields), counts)


@settings(max_examples=60, deadline=None)
@given(parts, st.integers(0, 2**32 - 1))
def test_a_classifiers_means_are_those_of_all_rows_together(sizes: list[int], seed: int) -> None:
    generator = np.random.default_rng(seed)
    answers = [classified(size, generator) for size in sizes]
    found = combined_metrics({str(i): evaluation(a) for i, a in enumerate(answers)})
    together = metrics_of(joined_labels(answers))
    assert list(found) == ["accuracy", "macro_f1", "loss"]
    for name in ("accuracy", "loss"):
        assert found[name] == pytest.approx(together[name])


@settings(max_examples=40, deadline=None)
@given(parts, st.integers(0, 2**32 - 1))
def test_a_language_models_means_and_perplexity_are_those_of_all_rows_together(sizes: list[int], seed: int) -> None:
    generator = np.random.default_rng(seed)
    answers = [written(size, generator) for size in sizes]
    found = combined_metrics({str(i): evaluation(a) for i, a in enumerate(answers)})
    together = metrics_of(joined_texts(answers))
    for name in ("loss", "perplexity", "token_accuracy", "rouge1", "exact_match"):
        assert found[name] == pytest.approx(together[name])
    for name in ("bleu", "chrf"):  # corpus metrics: the mean of the edges' values, weighted by prompts
        values = [metrics_of(a)[name] for a in answers]
        assert found[name] == pytest.approx(np.average(values, weights=sizes))


@settings(max_examples=40, deadline=None)
@given(parts, st.integers(0, 2**32 - 1))
def test_neither_order_nor_grouping_of_edges_matters(sizes: list[int], seed: int) -> None:
    generator = np.random.default_rng(seed)
    edges = {str(i): evaluation(classified(size, generator)) for i, size in enumerate(sizes)}
    found = combined_metrics(edges)
    backward = combined_metrics(dict(reversed(edges.items())))
    first = dict(list(edges.items())[:1])
    rest = {name: edge for name, edge in edges.items() if name not in first}
    groups = [group for group in (first, rest) if group]
    as_one = [
        EdgeEvaluation(
            rows=sum(edge.rows for edge in group.values()),
            rows_sha256="a" * 64,
            metrics=combined_metrics(group),
            counted=dict.fromkeys(found, sum(edge.rows for edge in group.values())),
        )
        for group in groups
    ]
    assert backward == found  # to the last bit
    assert combined_metrics({str(i): group for i, group in enumerate(as_one)}) == pytest.approx(found)
    assert all(min(e.metrics[n] for e in edges.values()) - 1e-9 <= found[n] for n in found)
    assert all(found[n] <= max(e.metrics[n] for e in edges.values()) + 1e-9 for n in found)


def test_metric_that_one_edge_could_not_tell_is_combined_over_the_others() -> None:
    generator = np.random.default_rng(0)
    whole, other = (evaluation(written(size, generator)) for size in (3, 5))
    part = whole.model_copy(update={"metrics": {"loss": whole.metrics["loss"]}})
    found = combined_metrics({"a": part, "b": other})
    assert found["perplexity"] == pytest.approx(other.metrics["perplexity"])
    assert found["loss"] != other.metrics["loss"]
