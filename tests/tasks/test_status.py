import pytest
from tiny_federation import EDGES

from fedpipe_core.errors import ConfigError
from fedpipe_core.plan_schemas import FederationPlan
from tasks import edge, federation, reports
from tasks.coordinator import Coordinator
from tasks.edge import EdgeSession
from tasks.judging import Worth
from tasks.records import put_record
from tasks.status import describe_run, list_runs


def test_status_follows_a_run_from_its_records(
    coordinator: Coordinator, sessions: dict[str, EdgeSession], plan: FederationPlan
) -> None:
    root = coordinator.store.root
    assert list_runs(root) == ["run"]
    begun = describe_run(root, "run")
    assert (begun["status"], begun["planned"], begun["rounds_closed"], begun["rounds"]) == ("unfinished", True, 0, 2)
    assert begun["open_round_updates"] == []
    for edge_id in EDGES:
        edge.train_round.fn(sessions[edge_id], 1)
    assert describe_run(root, "run")["open_round_updates"] == sorted(EDGES)
    made = federation.aggregate_round.fn(coordinator, plan, 1)
    record = reports.round_record(coordinator, plan, made, Worth({"accuracy": 0.5}), 1.0)
    put_record(coordinator.store, coordinator.keys.round_record(1), record)
    closed = describe_run(root, "run")
    assert (closed["rounds_closed"], closed["open_round_updates"]) == (1, [])
    assert (closed["metrics"], closed["adapter_sha256"]) == ({"accuracy": 0.5}, made.adapter.sha256)


def test_status_of_an_unknown_run_names_the_runs_there_are(coordinator: Coordinator, plan: FederationPlan) -> None:
    with pytest.raises(ConfigError, match=r"run other is not in .*; there are: run$"):
        describe_run(coordinator.store.root, "other")


def test_empty_store_has_no_runs(coordinator: Coordinator) -> None:
    assert list_runs(coordinator.store.root) == []
    with pytest.raises(ConfigError, match="there are: none"):
        describe_run(coordinator.store.root, "run")
