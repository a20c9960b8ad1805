"""What the coordinator makes of the edges' answers: which count, how many it needs, and that the result stays."""

from typing import Any

import pytest
from tiny_federation import write_federation
from tiny_models import LABELS

from fedpipe_core.combined_metrics import combined_metrics
from fedpipe_core.config import FederationConfig
from fedpipe_core.config_file import load_config
from fedpipe_core.errors import QuorumError
from fedpipe_core.evaluation_schemas import EvaluationRecord
from fedpipe_core.plan_schemas import FederationPlan
from fedpipe_core.schemas import FailureRecord
from tasks import edge_judging, judging
from tasks.coordinator import Coordinator
from tasks.edge import EdgeSession
from tasks.judging import Worth
from tasks.records import get_record, put_record

QUICK = {"planning.importance": "uniform", "training.examples_per_round": 16}


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> FederationConfig:
    """The tiny federation without a row at the coordinator; two edges of three have to judge."""
    data = {"train": "{edge_id}.jsonl", "labels": LABELS}
    return load_config(write_federation(tmp_path_factory.mktemp("edges"), **QUICK, data=data))


@pytest.fixture
def judged(sessions: dict[str, EdgeSession], plan: FederationPlan) -> FederationPlan:
    """The plan of a federation whose edges have judged what round 1 starts from."""
    for session in sessions.values():
        edge_judging.judge.fn(session, 1)
    return plan


def rewrite(coordinator: Coordinator, edge_id: str, changes: dict[str, Any]) -> None:
    """Replace an edge's answer by one that says something else."""
    key = coordinator.keys.evaluation(1, edge_id)
    record = get_record(coordinator.store, key, EvaluationRecord)
    assert record
    coordinator.store.put(key, record.model_copy(update=changes).model_dump_json().encode())


def test_answers_are_combined_once(coordinator: Coordinator, judged: FederationPlan) -> None:
    found = judging.close_judging.fn(coordinator, judged, 1)
    assert set(found.evaluations) == {"east", "north", "west"}
    assert found.metrics == combined_metrics(found.evaluations)
    assert judging.judged(coordinator, 1) == found


def test_answer_that_comes_late_changes_nothing(
    coordinator: Coordinator, sessions: dict[str, EdgeSession], judged: FederationPlan
) -> None:
    late = coordinator.keys.evaluation(1, "west")
    content = coordinator.store.get(late)
    coordinator.store.delete(late)
    found = judging.close_judging.fn(coordinator, judged, 1)
    assert found.dropped == {"west": "no answer"}
    coordinator.store.put(late, content)
    assert judging.judged(coordinator, 1) == found


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"run": "elsewhere"}, "answers to another run, round, edge, base or adapter"),
        ({"round": 2}, "answers to another run"),
        ({"edge_id": "north"}, "answers to another run"),
        ({"base_sha256": "0" * 64}, "answers to another run"),
        ({"global_sha256": "0" * 64}, "answers to another run"),
    ],
)
def test_answer_to_something_else_does_not_count(
    coordinator: Coordinator, judged: FederationPlan, changes: dict[str, Any], words: str
) -> None:
    rewrite(coordinator, "east", changes)
    found = judging.close_judging.fn(coordinator, judged, 1)
    assert set(found.evaluations) == {"north", "west"}
    assert words in found.dropped["east"]


@pytest.mark.parametrize("inflated", [{"rows": 10**6}, {"counted": {"accuracy": 6, "macro_f1": 6, "loss": 10**6}}])
def test_edge_cannot_outweigh_the_others_by_rows_it_does_not_have(
    coordinator: Coordinator, judged: FederationPlan, inflated: dict[str, Any]
) -> None:
    record = get_record(coordinator.store, coordinator.keys.evaluation(1, "east"), EvaluationRecord)
    assert record
    rewrite(coordinator, "east", {"evaluation": record.evaluation.model_copy(update=inflated)})
    found = judging.close_judging.fn(coordinator, judged, 1)
    assert "rows, and the edge's profile of 6; it must not be used" in found.dropped["east"]


def test_too_few_answers_leave_the_judging_open_with_every_reason(
    coordinator: Coordinator, judged: FederationPlan
) -> None:
    store, keys = coordinator.store, coordinator.keys
    for edge_id in ("east", "west"):
        store.delete(keys.evaluation(1, edge_id))
    put_record(
        store, keys.evaluation_failure(1, "west"), FailureRecord(run="run", round=1, edge_id="west", reason="disk full")
    )
    with pytest.raises(
        QuorumError,
        match=r"1 edges judged what round 1 starts from, min_edges is 2; east: no answer; west: disk full; .*--resume",
    ):
        judging.close_judging.fn(coordinator, judged, 1)
    assert judging.judged(coordinator, 1) is None
    judging.forget_evaluation_failures(coordinator, 1)
    assert not store.exists(keys.evaluation_failure(1, "west"))
    assert store.exists(keys.evaluation(1, "north"))


def test_edges_metrics_stand_beside_the_coordinators_or_alone(coordinator: Coordinator, judged: FederationPlan) -> None:
    found = judging.close_judging.fn(coordinator, judged, 1)
    assert Worth({"loss": 1.0}).metrics == {"loss": 1.0}
    assert Worth({}, found).metrics == found.metrics
    both = Worth({"loss": 1.0}, found).metrics
    assert both["loss"] == 1.0
    assert both["edges_loss"] == found.metrics["loss"]
    assert set(Worth({}, found).of_edges) == {"east", "north", "west"}
