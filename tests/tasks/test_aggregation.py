import pytest

from fedpipe_core.plan_schemas import FederationPlan
from tasks import aggregation, edge, federation
from tasks.aggregation import StoredRun, combine_updates, update_record
from tasks.coordinator import Coordinator
from tasks.edge import EdgeSession


def test_stored_updates_lead_to_the_published_adapter_again(
    coordinator: Coordinator, sessions: dict[str, EdgeSession], plan: FederationPlan
) -> None:
    for edge_id in ("east", "north"):
        edge.train_round.fn(sessions[edge_id], 1)
    made = federation.aggregate_round.fn(coordinator, plan, 1)
    edge.train_round.fn(sessions["west"], 1)  # an answer after the round was closed
    run = StoredRun(coordinator.config, coordinator.store, coordinator.keys, coordinator.base.sha256, plan)
    again = combine_updates(run, 1, answered={"east", "north"})
    assert again.data == coordinator.store.get(made.adapter.key)
    assert again.counted == made.counted
    assert set(combine_updates(run, 1).counted) == {"east", "north", "west"}
    assert update_record(coordinator.store, coordinator.keys, 2, "west") is None


def test_updates_that_are_not_held_in_memory_lead_to_the_same_bytes(
    coordinator: Coordinator,
    sessions: dict[str, EdgeSession],
    plan: FederationPlan,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for session in sessions.values():
        edge.train_round.fn(session, 1)
    run = StoredRun(coordinator.config, coordinator.store, coordinator.keys, coordinator.base.sha256, plan)
    held = combine_updates(run, 1)
    monkeypatch.setattr(aggregation, "MOST_HELD_BYTES", 0)
    read = combine_updates(run, 1)
    assert len(held.counted) == len(sessions)
    assert (read.data, read.counted) == (held.data, held.counted)
