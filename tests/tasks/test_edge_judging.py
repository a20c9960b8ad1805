"""An edge's judging turn: what it publishes, on which rows, and that it is the whole global adapter that is judged."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_federation import EDGES, rows, write_federation, write_rows, write_writers_federation
from tiny_models import LABELS
from tiny_steps import after_a_round, coordinator_at, prepare, sessions_of

from fedpipe_core.config import FederationConfig, PlanPin
from fedpipe_core.config_file import load_config
from fedpipe_core.evaluation import metrics_of, predict
from fedpipe_core.evaluation_schemas import EvaluationRecord, JudgedRecord
from fedpipe_core.plan_schemas import FederationPlan
from fedpipe_core.schemas import FailureRecord
from fedpipe_core.tokenizing import TokenizedExamples
from tasks import edge, edge_judging, federation, judging, plans
from tasks.coordinator import Coordinator
from tasks.edge import EdgeSession, read_global
from tasks.records import get_record

QUICK = {"planning.importance": "uniform", "training.examples_per_round": 16}
ROWS = {"train": "{edge_id}.jsonl", "labels": LABELS, "validation_fraction": 0.2}


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> FederationConfig:
    """The tiny federation without a row at the coordinator."""
    return load_config(write_federation(tmp_path_factory.mktemp("edges"), **QUICK, data=dict(ROWS)))


def answer_of(session: EdgeSession, round_index: int = 1) -> EvaluationRecord:
    key = session.keys.evaluation(round_index, session.edge_id)
    found = get_record(session.store, key, EvaluationRecord)
    assert found
    return found


def changed(config: FederationConfig, section: str, **values: Any) -> FederationConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def judge_as_merged(coordinator: Coordinator, sessions: dict[str, EdgeSession], round_index: int) -> None:
    """Have every edge judge, and find what the merged model answers to its rows."""
    _, adapter = read_global(coordinator.store, coordinator.keys, round_index)
    merged = coordinator.form.judged(coordinator.base.model, adapter)
    for session in sessions.values():
        edge_judging.judge.fn(session, round_index)
        expected = metrics_of(predict(merged, session.data.validation, 64))
        assert answer_of(session, round_index).evaluation.metrics == pytest.approx(expected, rel=1e-4)


@pytest.mark.usefixtures("plan")
def test_answer_is_metrics_and_counts_and_is_left_as_it_is(sessions: dict[str, EdgeSession]) -> None:
    session = sessions["north"]
    edge_judging.judge.fn(session, 1)
    found, key = answer_of(session), session.keys.evaluation(1, "north")
    assert (found.run, found.round, found.edge_id) == ("run", 1, "north")
    assert found.global_sha256 == read_global(session.store, session.keys, 1)[0].adapter.sha256
    assert found.evaluation.rows == len(session.data.validation) == 12
    assert found.evaluation.counted == dict.fromkeys(("accuracy", "macro_f1", "loss"), 12)
    path = Path(session.store.root, key)
    before = (path.read_bytes(), path.stat().st_mtime_ns)
    assert b"word" not in before[0]
    edge_judging.judge.fn(session, 1)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


@pytest.mark.usefixtures("plan")
def test_training_does_not_judge_again_what_was_judged(
    sessions: dict[str, EdgeSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = sessions["north"]
    edge_judging.judge.fn(session, 1)
    monkeypatch.delattr(edge, "predict")  # a second judging would call it
    edge.train_round.fn(session, 1)
    update = federation.round_updates(Coordinator(session.config, session.store, session.keys), 1)["north"]
    assert update.metrics == answer_of(session).evaluation.metrics


@pytest.mark.usefixtures("run_logger_off")
@pytest.mark.parametrize("rule", ["delta_svd", "fedavg", "flora_stack", "ffa"])
def test_whole_adapter_is_judged_under_every_rule(tiny_config: FederationConfig, rule: str, tmp_path: Path) -> None:
    pins = {"east": 2, "north": 4, "west": 4}  # an edge of small rank alone would see a part under some rules
    modules = coordinator_at(tiny_config, tmp_path / "first").shape.modules
    edges = tuple(
        spec.model_copy(update={"pin": PlanPin(ranks=dict.fromkeys(modules, pins[spec.edge_id]))})
        for spec in tiny_config.edges
    )
    config = changed(tiny_config, "aggregation", rule=rule).model_copy(update={"edges": edges})
    coordinator, sessions = after_a_round(config, tmp_path / "second")
    judge_as_merged(coordinator, sessions, 2)


@pytest.mark.usefixtures("run_logger_off")
@pytest.mark.parametrize("method", ["full", "fedadapter"])
def test_other_methods_are_judged_at_the_edges_too(method: str, tmp_path: Path) -> None:
    small = {"width": 2, "width_step": 2}
    changes = {"planning.importance": "uniform", "method": method, "fedadapter": small, "data": dict(ROWS)}
    config = load_config(write_federation(tmp_path / "it", **changes))
    coordinator, sessions = after_a_round(config, tmp_path / "store")
    plan = plans.plan_round(coordinator, 2)
    for session in sessions.values():
        edge_judging.judge.fn(session, 2)  # before the edge knows the sizes it is to try
        edge.train_round.fn(session, 2)
    federation.aggregate_round.fn(coordinator, plan, 2)
    judge_as_merged(coordinator, sessions, 3)


@pytest.mark.usefixtures("run_logger_off")
def test_a_round_is_judged_on_a_share_and_the_first_and_last_on_all_rows(
    tiny_config: FederationConfig, tmp_path: Path
) -> None:
    _, sessions = after_a_round(changed(tiny_config, "evaluation", examples_per_round=5), tmp_path)
    for index in (1, 2):
        edge_judging.judge.fn(sessions["east"], index)
    assert [answer_of(sessions["east"], index).evaluation.rows for index in (1, 2)] == [12, 5]
    one, two = (answer_of(sessions["east"], index).evaluation.rows_sha256 for index in (1, 2))
    assert one != two


@pytest.mark.usefixtures("run_logger_off")
def test_text_is_written_at_the_edge_for_no_more_prompts_than_configured(tmp_path: Path) -> None:
    rows_at_edges = {"train": "{edge_id}.jsonl", "format": "completion", "validation_fraction": 0.2}
    generate = {"metrics": ["bleu", "exact_match"], "max_new_tokens": 6, "examples": 4}
    changes = {"data": rows_at_edges, "evaluation.generate": generate, "planning.importance": "uniform"}
    config = load_config(write_writers_federation(tmp_path / "it", **changes))
    coordinator = coordinator_at(config, tmp_path / "store")
    session = sessions_of(coordinator)["east"]
    prepare(coordinator, sessions_of(coordinator))
    edge_judging.judge.fn(session, 1)
    found = answer_of(session).evaluation
    assert set(found.metrics) == {"loss", "perplexity", "token_accuracy", "bleu", "exact_match"}
    assert (found.rows, found.counted["bleu"]) == (12, 4)
    assert found.counted["loss"] == answer_of(session).evaluation.counted["token_accuracy"] > 12
    edge.train_round.fn(session, 1)
    update = federation.round_updates(coordinator, 1)["east"]
    assert set(update.metrics) == {"loss", "perplexity", "token_accuracy"}


@pytest.mark.usefixtures("run_logger_off")
def test_rows_of_a_file_of_their_own_judge_and_all_others_are_trained_on(tmp_path: Path) -> None:
    for number, edge_id in enumerate(EDGES):
        (tmp_path / "it").mkdir(exist_ok=True)
        write_rows(tmp_path / "it" / f"{edge_id}-kept.jsonl", rows(9, seed=number + 50))
    data = {**ROWS, "validation": "{edge_id}-kept.jsonl", "validation_fraction": 0}
    config = load_config(write_federation(tmp_path / "it", **QUICK, data=data))
    coordinator = coordinator_at(config, tmp_path / "store")
    sessions = sessions_of(coordinator)
    prepare(coordinator, sessions)
    edge_judging.judge.fn(sessions["east"], 1)
    assert answer_of(sessions["east"]).evaluation.rows == 9
    assert len(sessions["east"].data.train) == 60


def test_edge_without_rows_tells_why_and_the_others_are_combined(
    coordinator: Coordinator, sessions: dict[str, EdgeSession], plan: FederationPlan
) -> None:
    west = sessions["west"]
    west.data = replace(west.data, validation=TokenizedExamples([], [], 0))
    for session in sessions.values():
        edge_judging.judge.fn(session, 1)
    found = judging.close_judging.fn(coordinator, plan, 1)
    assert set(found.evaluations) == {"east", "north"}
    assert "west keeps no row to judge on, of 48; give it more rows" in found.dropped["west"]
    failure = get_record(coordinator.store, coordinator.keys.evaluation_failure(1, "west"), FailureRecord)
    assert failure
    assert failure.edge_id == "west"


@pytest.mark.usefixtures("plan")
def test_nobody_judges_after_the_judging_was_closed(sessions: dict[str, EdgeSession]) -> None:
    east = sessions["east"]
    closed = JudgedRecord(run="run", round=1, global_sha256="a" * 64, evaluations={}, dropped={}, metrics={})
    east.store.put(east.keys.judged(1), closed.model_dump_json().encode())
    edge_judging.judge.fn(east, 1)
    assert not east.store.exists(east.keys.evaluation(1, "east"))
