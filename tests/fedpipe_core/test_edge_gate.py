"""The gate where the edges alone have rows."""

import pytest

from fedpipe_core.config import ReleaseSpec
from fedpipe_core.edge_gate import decide_by_edges
from fedpipe_core.evaluation_schemas import EdgeEvaluation


def evaluation(accuracy: float, loss: float = 1.0, rows: int = 100, which: str = "a") -> EdgeEvaluation:
    metrics = {"accuracy": accuracy, "loss": loss}
    counted = dict.fromkeys(metrics, rows)
    return EdgeEvaluation(rows=rows, rows_sha256=which * 64, metrics=metrics, counted=counted)


BEFORE = {"east": evaluation(0.5, rows=100), "west": evaluation(0.7, rows=300)}


def test_first_version_is_promoted_with_the_combined_metric_as_the_reason() -> None:
    decision = decide_by_edges(BEFORE, None, ReleaseSpec())
    assert decision.promoted
    assert decision.reasons == ("no champion yet; accuracy is 0.6500 over 2 edges",)


def test_better_challenger_is_promoted_and_edges_that_lose_are_told() -> None:
    after = {"east": evaluation(0.4, rows=100), "west": evaluation(0.8, rows=300)}
    decision = decide_by_edges(after, BEFORE, ReleaseSpec())
    assert decision.promoted
    assert "accuracy is 0.7000 against the champion's 0.6500, an improvement of +0.0500" in decision.reasons[0]
    assert "better at 1 of the 2 edges that judged both on the same rows, of 2 that judged" in decision.reasons[1]
    assert "the least gain is east's, -0.1000" in decision.reasons[1]


@pytest.mark.parametrize(
    ("accuracy", "spec", "promoted"),
    [
        (0.65, ReleaseSpec(), False),
        (0.64, ReleaseSpec(), False),
        (0.66, ReleaseSpec(), True),
        (0.66, ReleaseSpec(min_improvement=0.02), False),
        (0.66, ReleaseSpec(metric="loss"), False),
    ],
)
def test_gain_must_be_as_large_as_asked(accuracy: float, spec: ReleaseSpec, promoted: bool) -> None:
    after = {"east": evaluation(accuracy, rows=100), "west": evaluation(accuracy, rows=300)}
    assert decide_by_edges(after, BEFORE, spec).promoted == promoted


def test_lower_loss_is_better() -> None:
    after = {name: evaluation(0.1, loss=0.9, rows=found.rows) for name, found in BEFORE.items()}
    assert decide_by_edges(after, BEFORE, ReleaseSpec(metric="loss")).promoted


def test_only_edges_that_judged_both_on_the_same_rows_are_compared() -> None:
    after = {"east": evaluation(0.6), "west": evaluation(0.1, rows=300, which="b"), "new": evaluation(0.1)}
    decision = decide_by_edges(after, BEFORE, ReleaseSpec())
    assert decision.promoted
    assert "accuracy is 0.6000 against the champion's 0.5000" in decision.reasons[0]
    assert "1 of the 1 edges that judged both on the same rows, of 3" in decision.reasons[1]


@pytest.mark.parametrize("champion", [{}, {"east": evaluation(0.1, which="b")}])
def test_champion_that_no_edge_judged_on_the_same_rows_stays(champion: dict[str, EdgeEvaluation]) -> None:
    decision = decide_by_edges(BEFORE, champion, ReleaseSpec())
    assert not decision.promoted
    assert "none of the 2 edges judged the champion on the rows it has now" in decision.reasons[0]
    assert "data.validation" in decision.reasons[0]
