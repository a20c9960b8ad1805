"""What the coordinator makes of edges on machines of their own: flow runs on a real API, signs of life by hand."""

import time
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from prefect import tags
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags
from prefect.deployments.runner import EntrypointType
from prefect.logging import disable_run_logger
from prefect.states import Failed, Pending
from remote_federation import write_edge_config
from tiny_federation import EDGES, write_federation
from tiny_steps import coordinator_at, prepare, sessions_of

from fedpipe_core.config import FederationConfig, RemoteSpec
from fedpipe_core.config_file import load_config
from fedpipe_core.errors import ConfigError, DataError, QuorumError
from fedpipe_core.plan_schemas import FederationPlan
from fedpipe_core.schemas import FailureRecord
from flows.edge import serve_edge
from tasks import edge, remote_edges, served_edge
from tasks.coordinator import Coordinator
from tasks.early_edges import called_early
from tasks.federation import aggregate_round, open_federation, round_updates
from tasks.flow_runs import EARLY, FLOW, give_up_flow_run
from tasks.leases import Heartbeat
from tasks.records import get_record
from tasks.remote_edges import RemoteEdge

POOL = "quick"
LIMITS = RemoteSpec(start_seconds=1, profile_seconds=1, grace_seconds=1, lease_seconds=1, poll_seconds=0.01, restarts=1)


@pytest.fixture(scope="session")
def pool(prefect_api: str) -> str:
    """A work pool with the edge's deployment, at which no worker looks."""
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
    deployment = serve_edge.to_deployment(POOL, work_pool_name=POOL, entrypoint_type=EntrypointType.MODULE_PATH)
    deployment.apply()
    return POOL


@pytest.fixture(scope="session")
def remote_config(pool: str, tmp_path_factory: pytest.TempPathFactory) -> FederationConfig:
    """The tiny federation, with its edge east on a machine of its own."""
    quick = {"planning.importance": "uniform", "training.examples_per_round": 16}
    config = load_config(write_federation(tmp_path_factory.mktemp("remote"), **quick))
    east, *others = config.edges
    edges = (east.model_copy(update={"work_pool": pool}), *others)
    return config.model_copy(update={"edges": edges, "remote": LIMITS})


@pytest.fixture
def coordinator(remote_config: FederationConfig, tmp_path: Path) -> Iterator[Coordinator]:
    """A coordinator of a run of its own."""
    found = coordinator_at(remote_config, tmp_path / "store")
    found.keys = type(found.keys)(f"run-{uuid4().hex[:8]}")
    with disable_run_logger():
        yield found


@pytest.fixture
def plan(coordinator: Coordinator) -> FederationPlan:
    """The plan of a federation that is ready for round 1."""
    return prepare(coordinator, sessions_of(coordinator))


@pytest.fixture
def east(coordinator: Coordinator) -> RemoteEdge:
    """The remote edge, started: its flow run waits for a worker."""
    found = RemoteEdge(coordinator, coordinator.config.remote_edges[0])
    found.start()
    return found


def sign_of_life(coordinator: Coordinator, edge_run: RemoteEdge) -> Heartbeat:
    """The edge's process, as far as its coordinator can see it."""
    key = coordinator.keys.edge_lease(edge_run.edge_id)
    heartbeat = Heartbeat(coordinator.store, key, edge_run._flow_run_id, LIMITS.lease_seconds)
    heartbeat.start()
    return heartbeat


def state_of(flow_run_id: str) -> str:
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(UUID(flow_run_id)).state
    assert state is not None
    return state.type.value


def runs_of(coordinator: Coordinator, *more_tags: str) -> list[str]:
    """Ids of the flow runs that were started for a run, those with these tags as well."""
    wanted = FlowRunFilter(tags=FlowRunFilterTags(all_=[f"fedpipe-run:{coordinator.keys.run}", *more_tags]))
    with get_client(sync_client=True) as client:
        return [str(flow_run.id) for flow_run in client.read_flow_runs(flow_run_filter=wanted)]


def until_trouble(edge_run: RemoteEdge) -> str:
    deadline = time.monotonic() + 20
    while (reason := edge_run.trouble()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return reason


def test_flow_run_waits_on_the_edges_queue_under_its_name(coordinator: Coordinator, east: RemoteEdge) -> None:
    with get_client(sync_client=True) as client:
        flow_run = client.read_flow_run(UUID(east._flow_run_id))
    assert (flow_run.work_pool_name, flow_run.work_queue_name) == (POOL, "east")
    assert flow_run.name == f"east serves {coordinator.keys.run}"
    assert flow_run.parameters == {
        "run": coordinator.keys.run,
        "store": coordinator.store.root,
        "edge_id": "east",
    }


def test_another_coordinator_of_the_run_finds_the_flow_run_again(coordinator: Coordinator, east: RemoteEdge) -> None:
    again = RemoteEdge(coordinator, coordinator.config.remote_edges[0])
    again.start()
    assert again._flow_run_id == east._flow_run_id


def test_edge_called_early_is_served_by_the_same_flow_run(coordinator: Coordinator) -> None:
    specs = coordinator.config.remote_edges
    with called_early(specs, coordinator.store, coordinator.keys):
        (called,) = runs_of(coordinator, EARLY)
    again = RemoteEdge(coordinator, specs[0])
    again.start()
    assert again._flow_run_id == called
    assert runs_of(coordinator) == [called]


def test_fault_at_the_coordinator_lets_go_of_edges_called_early(coordinator: Coordinator) -> None:
    before = coordinator.store.list()
    with (
        pytest.raises(DataError, match="no such column"),
        called_early(coordinator.config.remote_edges, coordinator.store, coordinator.keys),
    ):
        raise DataError("no such column")
    assert [state_of(flow_run_id) for flow_run_id in runs_of(coordinator)] == ["CANCELLED"]
    assert coordinator.store.list() == before


def test_edges_of_a_run_that_is_open_are_not_called_before_it_is_checked(coordinator: Coordinator) -> None:
    open_federation(coordinator.config, coordinator.store, coordinator.keys, resume=False)
    with called_early(coordinator.config.remote_edges, coordinator.store, coordinator.keys):
        assert runs_of(coordinator) == []


def test_edge_called_early_in_vain_may_be_started_again(
    coordinator: Coordinator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_edge_config(tmp_path, "east", tmp_path / "east.jsonl")
    monkeypatch.setenv("FEDPIPE_EDGE_CONFIG", str(config))
    monkeypatch.setattr(served_edge, "EARLY_SECONDS", 0.1)
    with tags(EARLY):
        state = serve_edge(coordinator.keys.run, coordinator.store.root, "east", return_state=True)
    assert state.is_crashed()  # not failed, which is told as the edge's own fault
    assert state.message == f"run {coordinator.keys.run} did not appear in {coordinator.store.root} within 0.1 s"


def test_pool_without_the_deployment_is_told(coordinator: Coordinator) -> None:
    spec = coordinator.config.remote_edges[0].model_copy(update={"work_pool": "nowhere"})
    with pytest.raises(ConfigError, match=f"edge east: Prefect has no deployment {FLOW}/nowhere, which work_pool"):
        RemoteEdge(coordinator, spec).start()


def test_edge_that_never_starts_is_named_with_what_it_waits_for(east: RemoteEdge) -> None:
    reason = until_trouble(east)
    assert reason.startswith("did not start within 1 s: flow run 'east serves run-")
    assert reason.endswith("is a worker running for queue east of work pool quick?")


def test_edge_that_lives_is_waited_for(coordinator: Coordinator, east: RemoteEdge) -> None:
    heartbeat = sign_of_life(coordinator, east)
    time.sleep(2 * LIMITS.start_seconds)
    assert east.trouble() is None
    heartbeat.end("failed", "east.jsonl has 1 unusable row")
    time.sleep(LIMITS.lease_seconds)
    assert east.trouble() == "failed: east.jsonl has 1 unusable row"


def test_edge_that_dies_is_started_again_as_often_as_allowed(coordinator: Coordinator, east: RemoteEdge) -> None:
    first = east._flow_run_id
    for _ in range(1 + LIMITS.restarts):
        dying = sign_of_life(coordinator, east)
        assert east.trouble() is None
        dying._ending.set()  # as a killed process: no more signs, and no word of farewell
        started, deadline = east._flow_run_id, time.monotonic() + 20
        while east.trouble() is None and east._flow_run_id == started:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert state_of(first) == "CRASHED"
    assert "gave no sign of life for" in until_trouble(east)
    assert "and was started 2 times (remote.restarts is 1)" in until_trouble(east)


def test_flow_run_that_died_before_it_served_is_started_again(east: RemoteEdge) -> None:
    first = east._flow_run_id
    give_up_flow_run(first, "Process exited with status code: -9")
    assert east.trouble() is None
    assert east._flow_run_id != first


def test_flow_run_that_its_worker_lost_is_started_again(east: RemoteEdge) -> None:
    first, deadline = east._flow_run_id, time.monotonic() + 20
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(UUID(first), Pending())
    while east._flow_run_id == first:
        assert time.monotonic() < deadline
        assert east.trouble() is None
    assert state_of(first) == "CRASHED"


def test_flow_run_that_a_worker_took_late_has_as_long_to_start_as_any(east: RemoteEdge) -> None:
    first = east._flow_run_id
    time.sleep(LIMITS.start_seconds - 0.2)
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(UUID(first), Pending())
    until = time.monotonic() + LIMITS.start_seconds - 0.2
    while time.monotonic() < until:
        assert east.trouble() is None
        assert east._flow_run_id == first
        time.sleep(0.05)


def test_flow_run_that_failed_before_it_served_is_named_at_once(
    east: RemoteEdge,
) -> None:
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(UUID(east._flow_run_id), Failed(message="edge.yaml is for west"), force=True)
    reason = east.trouble()
    assert reason is not None
    assert reason.startswith("ended before it served: flow run 'east serves run-")
    assert reason.endswith("is Failed (edge.yaml is for west)")


def test_quorum_of_profiles_goes_on_without_the_others(coordinator: Coordinator, east: RemoteEdge) -> None:
    remote_edges.await_profiles(coordinator, [east])
    config = coordinator.config.model_copy(update={"min_edges": 3})
    strict = coordinator_at(config, Path(coordinator.store.root))
    with pytest.raises(QuorumError, match=r"2 edges sent a profile, min_edges is 3; east did not start within 1 s"):
        remote_edges.await_profiles(strict, [east])


def test_late_edge_is_dropped_with_the_reason_and_the_round_goes_on(
    coordinator: Coordinator, plan: FederationPlan, east: RemoteEdge
) -> None:
    heartbeat = sign_of_life(coordinator, east)
    sessions = sessions_of(coordinator)
    for edge_id in ("north", "west"):
        edge.train_round.fn(sessions[edge_id], 1)
    started = time.monotonic()
    remote_edges.await_updates(coordinator, [east], plan, 1)
    assert time.monotonic() - started < plan.round_seconds + LIMITS.grace_seconds + 1
    made = aggregate_round.fn(coordinator, plan, 1)
    heartbeat.end("done")
    assert made.dropped == {"east": "late: no answer in 1 s"}
    assert set(made.counted) == {"north", "west"}


def test_round_is_over_as_soon_as_every_edge_answered(
    coordinator: Coordinator, plan: FederationPlan, east: RemoteEdge
) -> None:
    heartbeat = sign_of_life(coordinator, east)
    edge.train_round.fn(sessions_of(coordinator)["east"], 1)
    started = time.monotonic()
    remote_edges.await_updates(coordinator, [east], plan, 1)
    heartbeat.end("done")
    assert time.monotonic() - started < 0.5
    assert set(round_updates(coordinator, 1)) == {"east"}
    assert get_record(coordinator.store, coordinator.keys.failure(1, "east"), FailureRecord) is None


def test_edges_are_let_go_when_the_run_fails(coordinator: Coordinator) -> None:
    def fail() -> None:
        with remote_edges.serving(coordinator) as edges:
            started.extend(found._flow_run_id for found in edges)
            raise QuorumError("round 1 has too few updates")

    started: list[str] = []
    with pytest.raises(QuorumError):
        fail()
    assert [state_of(flow_run_id) for flow_run_id in started] == ["CANCELLED"]


def test_federation_without_remote_edges_leaves_no_lease(coordinator: Coordinator) -> None:
    edges = tuple(found.model_copy(update={"work_pool": None}) for found in coordinator.config.edges)
    local = coordinator_at(coordinator.config.model_copy(update={"edges": edges}), Path(coordinator.store.root))
    with remote_edges.serving(local) as found:
        assert found == []
    assert local.store.list("run/leases") == []
    assert len(EDGES) == len(local.config.local_edges)
