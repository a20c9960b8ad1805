import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpipe_core.config import ReleaseSpec
from fedpipe_core.errors import ReleaseError
from fedpipe_core.gate import agreement_check, conclude, decide, loss_check
from fedpipe_core.predictions import Predictions

EXAMPLES = 400


def predictions(right: int, examples: int = EXAMPLES, loss: float = 1.0, evaluation: str = "a" * 64) -> Predictions:
    """A model that is right on the first `right` examples of four labels, and off by one on the others."""
    labels = np.arange(examples) % 4
    predicted = np.where(np.arange(examples) < right, labels, (labels + 1) % 4)
    return Predictions(evaluation, labels, predicted, np.full(examples, loss))


def test_first_version_is_promoted_with_its_metric_as_the_reason() -> None:
    decision = decide(predictions(360), None, ReleaseSpec())
    assert decision.promoted
    assert "no champion yet; accuracy is 0.9000" in decision.reasons


def test_first_version_with_a_loss_that_is_not_a_number_is_refused() -> None:
    broken = predictions(360, loss=float("nan"))
    decision = decide(broken, None, ReleaseSpec())
    assert not decision.promoted
    assert decision.reasons == ("400 of 400 losses are not finite",)


def test_clearly_better_challenger_is_promoted_with_numbers() -> None:
    decision = decide(predictions(360), predictions(300), ReleaseSpec())
    assert decision.promoted
    assert any("0.9000 against the champion's 0.7500, an improvement of +0.1500" in r for r in decision.reasons)


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1", "loss"])
def test_worse_challenger_is_refused_on_every_metric(metric: str) -> None:
    worse, better = predictions(300, loss=1.2), predictions(360, loss=0.8)
    spec = ReleaseSpec.model_validate({"metric": metric})
    assert not decide(worse, better, spec).promoted
    assert decide(better, worse, spec).promoted


def test_equal_challenger_is_refused_because_nothing_improved() -> None:
    decision = decide(predictions(300), predictions(300), ReleaseSpec())
    assert not decision.promoted
    assert "improvement of +0.0000; needed more than 0" in decision.reasons[0]


def test_gain_within_chance_is_refused_unless_confidence_is_zero() -> None:
    rng = np.random.default_rng(0)
    champion, challenger = predictions(300), predictions(300)
    flips = rng.permutation(EXAMPLES)[:41]
    labels = challenger.labels
    champion.predicted[:] = np.where(rng.random(EXAMPLES) < 0.75, labels, (labels + 1) % 4)
    challenger.predicted[:] = champion.predicted
    for count, example in enumerate(flips):  # 21 examples are won and 20 lost
        won = count < 21
        champion.predicted[example] = (labels[example] + won) % 4
        challenger.predicted[example] = (labels[example] + (not won)) % 4
    refused = decide(challenger, champion, ReleaseSpec())
    assert not refused.promoted
    assert "does not lie above 0" in refused.reasons[0]
    assert decide(challenger, champion, ReleaseSpec(confidence=0)).promoted


def test_gain_of_exactly_the_minimum_is_enough() -> None:
    challenger, champion = predictions(57, examples=100), predictions(56, examples=100)
    assert decide(challenger, champion, ReleaseSpec(min_improvement=0.01, confidence=0)).promoted
    assert not decide(challenger, champion, ReleaseSpec(min_improvement=0.011, confidence=0)).promoted


def test_challenger_that_falls_on_one_slice_is_refused_and_the_slice_is_named() -> None:
    champion, challenger = predictions(300), predictions(400)
    slices = ["banking" if i < 40 else "travel" for i in range(EXAMPLES)]
    challenger.predicted[:10] = (challenger.labels[:10] + 1) % 4
    decision = decide(challenger, champion, ReleaseSpec(), slices)
    assert not decision.promoted
    assert decision.reasons == (
        "accuracy fell beyond the allowed 0.05 on 1 of 2 slices: banking 0.2500 (of 40 examples)",
    )
    assert decide(challenger, champion, ReleaseSpec(max_slice_regression=0.25), slices).promoted


def test_versions_evaluated_on_different_sets_are_not_compared() -> None:
    with pytest.raises(ReleaseError, match="evaluate the champion on the challenger's set"):
        decide(predictions(360), predictions(300, evaluation="b" * 64), ReleaseSpec())


def test_slices_of_another_length_are_refused() -> None:
    with pytest.raises(ReleaseError, match="3 slice names were given for 400 evaluated examples"):
        decide(predictions(360), predictions(300), ReleaseSpec(), ["a", "b", "c"])


def test_export_whose_loss_rises_too_far_fails_its_check() -> None:
    spec = ReleaseSpec(max_loss_increase=0.02)
    assert loss_check("int8", 1.01, 1.0, spec).passed
    beyond = loss_check("nf4", 1.10, 1.0, spec)
    assert not beyond.passed
    assert beyond.reason == ("export nf4 has loss 1.1000 against 1.0000 unquantized, +10.0%; beyond the allowed +2.0%")
    assert not loss_check("nf4", float("nan"), 1.0, spec).passed


def test_decision_survives_json() -> None:
    decision = decide(predictions(360), predictions(300), ReleaseSpec())
    document = json.loads(json.dumps(decision.as_document()))
    assert document["promoted"] is True
    assert [check["name"] for check in document["checks"]] == [check.name for check in decision.checks]


def test_one_failed_check_refuses_and_only_its_reason_is_given() -> None:
    spec = ReleaseSpec()
    decision = conclude([loss_check("merged", 1.0, 1.0, spec), loss_check("nf4", 2.0, 1.0, spec)])
    assert not decision.promoted
    assert len(decision.reasons) == 1


@settings(deadline=None, max_examples=25)
@given(first=st.integers(0, 60), second=st.integers(0, 60))
def test_of_two_versions_at_most_one_beats_the_other(first: int, second: int) -> None:
    left, right = predictions(first, examples=60), predictions(second, examples=60)
    verdicts = [decide(left, right, ReleaseSpec()).promoted, decide(right, left, ReleaseSpec()).promoted]
    assert sum(verdicts) <= 1
    assert first != second or not any(verdicts)


@pytest.mark.parametrize(
    ("agreement", "registered", "passed"), [(1.0, True, True), (0.5, True, False), (0.5, False, True)]
)
def test_export_without_rows_is_told_by_its_answers_and_the_registered_one_must_agree(
    agreement: float, registered: bool, passed: bool
) -> None:
    check = agreement_check("merged", agreement, registered)
    assert check.passed == passed
    assert f"export merged answers {agreement:.2%} of made-up rows" in check.reason
    assert ("needed 90%" in check.reason) != passed
    assert "its loss was not measured: the coordinator has no rows" in check.reason
