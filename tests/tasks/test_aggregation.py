from pathlib import Path

import pytest
from tiny_federation import rows, write_federation, write_rows
from tiny_steps import coordinator_at, prepare, sessions_of

from fedpipe_core import update_checks
from fedpipe_core.adapters import Adapter
from fedpipe_core.config_file import load_config
from fedpipe_core.low_rank import LowRank
from fedpipe_core.plan_schemas import FederationPlan
from fedpipe_core.schemas import GlobalRecord, UpdateRecord
from fedpipe_core.wire_updates import decode_update, encode_update
from tasks import aggregation, edge, federation
from tasks.aggregation import StoredRun, combine_updates, update_record
from tasks.coordinator import Coordinator
from tasks.edge import EdgeSession
from tasks.lineage import needed_record
from tasks.records import get_record, put_data, put_record


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


def reverse_update(coordinator: Coordinator, session: EdgeSession, plan: FederationPlan) -> None:
    """Have an edge's update of round 1 lead as far in the other direction."""
    store, key = coordinator.store, coordinator.keys.update_record(1, session.edge_id)
    record = get_record(store, key, UpdateRecord)
    assert record
    _, previous = edge.read_global(store, coordinator.keys, 1)
    start, _ = edge.edge_start(coordinator.config, plan.edges[session.edge_id], previous, 1)
    trained = decode_update(store.get(record.adapter.key), start)
    factors = {
        name: LowRank(2 * start.factors[name].B - found.B, 2 * start.factors[name].A - found.A)
        for name, found in trained.factors.items()
    }
    head = {name: 2 * start.head[name] - found for name, found in trained.head.items()}
    data, _ = encode_update(Adapter(factors, head), start, "bf16")
    store.delete(key)
    put_record(store, key, record.model_copy(update={"adapter": put_data(store, record.adapter.key, data)}))


@pytest.mark.usefixtures("run_logger_off")
@pytest.mark.parametrize("reversed_", [False, True])
def test_edge_that_opposes_the_others_counts_where_it_takes_the_held_out_loss_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reversed_: bool
) -> None:
    monkeypatch.setattr(update_checks, "LEAST_OPPOSITION", 2.0)  # so that nobody who opposed once agrees enough
    path = write_federation(tmp_path, **{"planning.importance": "uniform"})
    if not reversed_:  # an honest edge, with labels that no other edge has
        for edge_id, own in {"east": (0, 1), "north": (0, 1), "west": (2, 3)}.items():
            write_rows(tmp_path / f"{edge_id}.jsonl", [row for row in rows(120, seed=1) if row["label"] in own])
    coordinator = coordinator_at(load_config(path), tmp_path / "store")
    sessions = sessions_of(coordinator)
    plan = prepare(coordinator, sessions)
    for session in sessions.values():
        edge.train_round.fn(session, 1)
    if reversed_:
        reverse_update(coordinator, sessions["west"], plan)
    store, begun = coordinator.store, coordinator.keys.global_record(1)
    opposed = needed_record(store, begun, GlobalRecord).model_copy(update={"opposed": ("west",)})
    store.delete(begun)
    put_record(store, begun, opposed)

    counted, aggregate = [], aggregation.aggregate
    monkeypatch.setattr(aggregation, "aggregate", lambda *given: counted.append(len(given[1])) or aggregate(*given))
    made = federation.aggregate_round.fn(coordinator, plan, 1)
    assert counted == [3, 3, 2] if reversed_ else [3, 3]  # with west standing still, with it moved, and without it
    assert ("west" in made.counted) is (made.pardoned == ("west",)) is not reversed_
    assert ("west" in made.refused) is ("west" in made.dropped) is (made.opposed == ("west",)) is reversed_
    run = StoredRun(coordinator.config, store, coordinator.keys, coordinator.base.sha256, plan)
    again = combine_updates(run, 1, lambda edge_id, *_: edge_id in made.pardoned)
    assert again.data == store.get(made.adapter.key)
    assert "west" not in combine_updates(run, 1).counted
