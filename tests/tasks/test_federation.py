import json
from pathlib import Path
from typing import Any

import pytest
from tiny_federation import EDGES
from tiny_steps import after_a_round, coordinator_at

from fedpipe_core.config import FederationConfig
from fedpipe_core.errors import ConfigError, PlanError, QuorumError
from fedpipe_core.plan_schemas import FederationPlan, SavedPlan
from fedpipe_core.schemas import FederationRecord, GlobalRecord
from fedpipe_core.wire import decode_adapter
from tasks import edge, federation
from tasks.coordinator import Coordinator
from tasks.edge import EdgeSession, read_global
from tasks.federation import open_federation
from tasks.plans import plan_at
from tasks.records import RunKeys, get_record


def changed(config: FederationConfig, section: str | None, **values: Any) -> FederationConfig:
    """The config with other values in a section, or at the top."""
    if section is None:
        return config.model_copy(update=values)
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def train_all(sessions: dict[str, EdgeSession]) -> None:
    for session in sessions.values():
        edge.train_round.fn(session, 1)


def reopened(coordinator: Coordinator, config: FederationConfig) -> FederationRecord:
    return open_federation(config, coordinator.store, coordinator.keys, resume=True)


def test_opened_federation_records_config_code_and_base(coordinator: Coordinator) -> None:
    record = open_federation(coordinator.config, coordinator.store, coordinator.keys, resume=False)
    assert FederationConfig.model_validate(record.config) == coordinator.config
    assert record.base_sha256 == coordinator.base.sha256
    assert record.config_sha256 == federation.config_sha256(coordinator.config)
    assert get_record(coordinator.store, coordinator.keys.federation, FederationRecord) == record


def test_name_that_is_taken_is_refused_and_resumed(coordinator: Coordinator) -> None:
    first = open_federation(coordinator.config, coordinator.store, coordinator.keys, resume=False)
    with pytest.raises(ConfigError, match=r"run run exists in .*; continue it with --resume"):
        open_federation(coordinator.config, coordinator.store, coordinator.keys, resume=False)
    assert reopened(coordinator, coordinator.config) == first


def test_resuming_nothing_is_refused(coordinator: Coordinator) -> None:
    with pytest.raises(ConfigError, match="so there is nothing to resume; leave out --resume"):
        reopened(coordinator, coordinator.config)


@pytest.mark.parametrize("name", ["a/b", "..", "", "with space", "x" * 300])
def test_name_that_is_no_folder_is_refused(coordinator: Coordinator, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name a folder of the store"):
        open_federation(coordinator.config, coordinator.store, RunKeys(name), resume=False)


@pytest.mark.parametrize(
    ("section", "values", "named"),
    [
        (None, {"seed": 9}, "seed"),
        ("training", {"learning_rate": 0.5, "warmup_steps": 0}, "training.learning_rate, training.warmup_steps"),
        ("planning", {"ranks": (2, 8)}, "planning.ranks.1"),
        ("planning", {"ranks": (2,)}, "planning.ranks"),
    ],
)
def test_resuming_names_every_changed_key(
    coordinator: Coordinator, section: str | None, values: dict[str, Any], named: str
) -> None:
    open_federation(coordinator.config, coordinator.store, coordinator.keys, resume=False)
    with pytest.raises(ConfigError, match=f"changed since: {named}; resume with"):
        reopened(coordinator, changed(coordinator.config, section, **values))


def test_resuming_on_another_base_is_refused(coordinator: Coordinator) -> None:
    record = open_federation(coordinator.config, coordinator.store, coordinator.keys, resume=False)
    other = record.model_copy(update={"base_sha256": "0" * 64})
    coordinator.store.put(coordinator.keys.federation, other.model_dump_json().encode())
    with pytest.raises(ConfigError, match="was started on base model 000000000000, found"):
        reopened(coordinator, coordinator.config)


def test_withdrawn_federation_leaves_nothing_and_other_runs_alone(coordinator: Coordinator) -> None:
    open_federation(coordinator.config, coordinator.store, coordinator.keys, resume=False)
    open_federation(coordinator.config, coordinator.store, RunKeys("run-2"), resume=False)
    federation.withdraw_federation(coordinator)
    assert coordinator.store.list() == ["run-2/federation.json"]


def test_plan_is_published_with_the_hashes_of_its_profiles_and_obeyed(
    coordinator: Coordinator, plan: FederationPlan
) -> None:
    assert set(plan.profiles) == set(plan.edges) == set(EDGES)
    pinned = plan.model_copy(update={"solver": "by hand"})
    coordinator.store.put(coordinator.keys.plan, pinned.model_dump_json().encode())
    assert federation.plan.fn(coordinator) == pinned


def test_missing_profile_ends_the_run(coordinator: Coordinator, sessions: dict[str, EdgeSession]) -> None:
    edge.profile.fn(sessions["east"], coordinator.shape)
    with pytest.raises(QuorumError, match="no profile from north, west; look at that edge's log"):
        federation.read_profiles(coordinator)


def test_saved_plan_is_adopted_with_its_profiles(
    coordinator: Coordinator, plan: FederationPlan, tiny_config: FederationConfig, tmp_path: Path
) -> None:
    saved = SavedPlan(plan=plan, profiles=federation.read_profiles(coordinator))
    other = coordinator_at(tiny_config, tmp_path / "other")
    federation.adopt_plan(other, saved)
    assert federation.plan.fn(other) == plan
    assert federation.read_profiles(other) == saved.profiles


def test_saved_plan_for_other_edges_or_modules_is_refused(coordinator: Coordinator, plan: FederationPlan) -> None:
    profiles = federation.read_profiles(coordinator)
    fewer = plan.model_copy(update={"edges": {"east": plan.edges["east"]}})
    with pytest.raises(PlanError, match=r"differ in edges \['north', 'west'\]; make a plan with this config"):
        federation.adopt_plan(coordinator, SavedPlan(plan=fewer, profiles=profiles))
    stranger = plan.edges["east"].model_copy(update={"ranks": {"elsewhere": 2}})
    strange = plan.model_copy(update={"edges": {**plan.edges, "east": stranger}})
    with pytest.raises(PlanError, match=r"differ in modules \['elsewhere'\]"):
        federation.adopt_plan(coordinator, SavedPlan(plan=strange, profiles=profiles))


def test_first_adapter_changes_nothing_and_is_published_once(coordinator: Coordinator, plan: FederationPlan) -> None:
    record, adapter = read_global(coordinator.store, coordinator.keys, 1)
    assert set(adapter.factors) == set(plan.planned_modules)
    assert all(not factors.B.any() for factors in adapter.factors.values())
    federation.publish_first_adapter.fn(coordinator, plan)
    assert read_global(coordinator.store, coordinator.keys, 1)[0] == record


@pytest.mark.usefixtures("run_logger_off")
@pytest.mark.parametrize(
    ("updates", "adapters", "sent"),
    [
        ("fp32", None, "fp32"),
        ("bf16", None, "bf16"),
        ("int8", None, "int8"),
        ("nf4", None, "int8"),
        ("nf4", "nf4", "nf4"),
        ("nf4", "bf16", "bf16"),
    ],
)
def test_global_adapters_travel_as_short_as_updates_but_as_nf4_only_where_that_is_asked_for(
    tiny_config: FederationConfig, tmp_path: Path, updates: str, adapters: str | None, sent: str
) -> None:
    exchange = tiny_config.exchange.model_copy(update={"dtype": updates, "global_dtype": adapters})
    coordinator, _ = after_a_round(tiny_config.model_copy(update={"exchange": exchange}), tmp_path / "store")
    plan = plan_at(coordinator.store, coordinator.keys, 1)
    made = federation.aggregate_round.fn(coordinator, plan, 1)
    for record in (read_global(coordinator.store, coordinator.keys, 1)[0], made):
        stored = coordinator.store.get(record.adapter.key)
        header = json.loads(stored[8 : 8 + int.from_bytes(stored[:8], "little")])
        assert json.loads(header["__metadata__"]["fedpipe"])["dtype"] == sent
        assert decode_adapter(stored).ranks == record.ranks


def test_aggregate_counts_every_edge_and_is_published_once(
    coordinator: Coordinator, sessions: dict[str, EdgeSession], plan: FederationPlan
) -> None:
    train_all(sessions)
    found = federation.aggregate_round.fn(coordinator, plan, 1)
    assert found.round == 2
    assert set(found.counted) == set(EDGES)
    assert found.counted == {e: u.adapter.sha256 for e, u in federation.round_updates(coordinator, 1).items()}
    assert federation.aggregate_round.fn(coordinator, plan, 1) == found


def test_edge_without_an_answer_is_dropped(
    coordinator: Coordinator, sessions: dict[str, EdgeSession], plan: FederationPlan
) -> None:
    train_all({edge_id: session for edge_id, session in sessions.items() if edge_id != "north"})
    found = federation.aggregate_round.fn(coordinator, plan, 1)
    assert set(found.counted) == {"east", "west"}
    assert found.dropped == {"north": "no answer"}


def test_update_with_other_bytes_than_recorded_is_dropped(
    coordinator: Coordinator, sessions: dict[str, EdgeSession], plan: FederationPlan
) -> None:
    train_all(sessions)
    coordinator.store.put(coordinator.keys.update_data(1, "north"), b"changed on the way")
    found = federation.aggregate_round.fn(coordinator, plan, 1)
    assert set(found.dropped) == {"north"}
    assert "18 bytes" in found.dropped["north"]


@pytest.mark.parametrize("field", ["run", "base_sha256", "global_sha256"])
def test_update_that_belongs_elsewhere_is_dropped(
    coordinator: Coordinator, sessions: dict[str, EdgeSession], plan: FederationPlan, field: str
) -> None:
    train_all(sessions)
    foreign = federation.round_updates(coordinator, 1)["north"].model_copy(update={field: "elsewhere"})
    coordinator.store.put(coordinator.keys.update_record(1, "north"), foreign.model_dump_json().encode())
    found = federation.aggregate_round.fn(coordinator, plan, 1)
    assert f"north: its update's {field} is elsewhere, needed" in found.dropped["north"]
    assert found.refused == {"north": foreign.adapter.sha256}


def test_damaged_record_is_dropped(
    coordinator: Coordinator, sessions: dict[str, EdgeSession], plan: FederationPlan
) -> None:
    train_all(sessions)
    coordinator.store.put(coordinator.keys.update_record(1, "north"), b"{}")
    assert "is no UpdateRecord" in federation.aggregate_round.fn(coordinator, plan, 1).dropped["north"]


def test_too_few_updates_leave_the_round_open(
    coordinator: Coordinator, sessions: dict[str, EdgeSession], plan: FederationPlan
) -> None:
    edge.train_round.fn(sessions["east"], 1)
    words = "round 1 has 1 updates that count, min_edges is 2; north: no answer; west: no answer; mend these edges"
    with pytest.raises(QuorumError, match=words):
        federation.aggregate_round.fn(coordinator, plan, 1)
    assert get_record(coordinator.store, coordinator.keys.global_record(2), GlobalRecord) is None
    train_all(sessions)
    assert set(federation.aggregate_round.fn(coordinator, plan, 1).counted) == set(EDGES)


def test_share_of_the_held_out_set_is_drawn_once(
    coordinator: Coordinator, plan: FederationPlan, tiny_config: FederationConfig
) -> None:
    whole = federation.evaluate.fn(coordinator, 1, whole=True)
    partial = Coordinator(
        changed(coordinator.config, "evaluation", examples_per_round=20), coordinator.store, coordinator.keys
    )
    first, second = (federation.evaluate.fn(partial, 1, whole=False) for _ in range(2))
    assert (len(whole.labels), len(first.labels)) == (120, 20)
    assert first.evaluation_sha256 == second.evaluation_sha256
    assert len(federation.evaluate.fn(partial, 1, whole=True).labels) == 120


def test_slices_and_label_names_come_from_their_columns(coordinator: Coordinator) -> None:
    assert coordinator.label_names == [f"share {label}" for label in range(4)]
    assert coordinator.slices is None
    sliced = changed(coordinator.config, "release", slice_column="name")
    slices = Coordinator(sliced, coordinator.store, coordinator.keys).slices
    assert slices
    assert len(slices) == len(coordinator.held_out)
