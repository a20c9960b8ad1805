"""An edge whose profile comes after the plan was made: planned for without touching the others' plans."""

from pathlib import Path

import pytest
from tiny_steps import coordinator_at, sessions_of

from fedpipe_core.config import FederationConfig
from fedpipe_core.errors import ObjectMissingError
from fedpipe_core.plan_schemas import FederationPlan
from tasks import edge, federation, reports
from tasks.coordinator import Coordinator
from tasks.edge import EdgeSession
from tasks.judging import Worth
from tasks.manifest import run_manifest
from tasks.plans import plan_at, plan_round
from tasks.records import put_record


@pytest.fixture
def coordinator(tiny_config: FederationConfig, tmp_path: Path, run_logger_off: None) -> Coordinator:
    """A coordinator whose edge east has a machine of its own."""
    east, *others = tiny_config.edges
    edges = (east.model_copy(update={"work_pool": "edges"}), *others)
    return coordinator_at(tiny_config.model_copy(update={"edges": edges}), tmp_path / "store")


@pytest.fixture
def sessions(coordinator: Coordinator) -> dict[str, EdgeSession]:
    """The edges' sessions, by edge."""
    return sessions_of(coordinator)


@pytest.fixture
def plan(coordinator: Coordinator, sessions: dict[str, EdgeSession]) -> FederationPlan:
    """A plan made without east, and round 1 closed by it."""
    federation.open_federation(coordinator.config, coordinator.store, coordinator.keys, resume=False)
    for edge_id in ("north", "west"):
        edge.profile.fn(sessions[edge_id], coordinator.shape)
    found = federation.plan.fn(coordinator)
    federation.publish_first_adapter.fn(coordinator, found)
    close(coordinator, sessions, plan_round(coordinator, 1), 1)
    return found


def close(coordinator: Coordinator, sessions: dict[str, EdgeSession], plan: FederationPlan, index: int) -> list[str]:
    for edge_id in plan.edges:
        edge.train_round.fn(sessions[edge_id], index)
    made = federation.aggregate_round.fn(coordinator, plan, index)
    record = reports.round_record(coordinator, plan, made, Worth({"loss": 1.0}), 1.0)
    put_record(coordinator.store, coordinator.keys.round_record(index), record)
    return sorted(made.counted)


def test_edge_joins_in_the_round_after_its_profile_came(
    coordinator: Coordinator, sessions: dict[str, EdgeSession], plan: FederationPlan
) -> None:
    assert set(plan.edges) == {"north", "west"}
    assert not sessions["east"].is_planned()
    edge.profile.fn(sessions["east"], coordinator.shape)
    joined = plan_round(coordinator, 2)
    assert {edge_id: joined.edges[edge_id] for edge_id in plan.edges} == plan.edges
    assert set(joined.profiles) == {"east", "north", "west"}
    assert set(joined.edges["east"].ranks) <= set(plan.planned_modules)
    assert joined.round_seconds == plan.round_seconds
    assert sessions["east"].plan == joined.edges["east"]
    assert close(coordinator, sessions, joined, 2) == ["east", "north", "west"]


def test_each_round_keeps_the_plan_it_had(
    coordinator: Coordinator, sessions: dict[str, EdgeSession], plan: FederationPlan
) -> None:
    edge.profile.fn(sessions["east"], coordinator.shape)
    joined = plan_round(coordinator, 2)
    assert plan_round(coordinator, 2) == plan_at(coordinator.store, coordinator.keys, 2) == joined
    assert plan_at(coordinator.store, coordinator.keys, 1) == plan


def test_manifest_lists_the_plan_and_profile_of_an_edge_that_joined(
    coordinator: Coordinator, sessions: dict[str, EdgeSession], plan: FederationPlan
) -> None:
    edge.profile.fn(sessions["east"], coordinator.shape)
    close(coordinator, sessions, plan_round(coordinator, 2), 2)
    objects = run_manifest(coordinator.store, coordinator.keys, coordinator.config).objects
    assert {"run/plan.json", "run/plans/0002.json", "run/profiles/east.json"} <= set(objects)


def test_edge_that_no_plan_can_be_made_for_is_told_and_the_round_goes_on(
    coordinator: Coordinator,
    sessions: dict[str, EdgeSession],
    plan: FederationPlan,
    heard: list[str],
) -> None:
    sessions["east"].machine = edge.Machine(memory_bytes=1)
    edge.profile.fn(sessions["east"], coordinator.shape)
    assert plan_round(coordinator, 2) == plan
    assert len(heard) == 1
    assert heard[0].startswith("east cannot join round 2: east: ")


def test_run_without_a_plan_says_so(coordinator: Coordinator) -> None:
    with pytest.raises(ObjectMissingError, match=r"there is no object run/plan.json; resume the run"):
        plan_at(coordinator.store, coordinator.keys, 1)
