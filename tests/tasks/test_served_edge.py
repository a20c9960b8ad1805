"""An edge on a machine of its own: which round it takes up, what makes it stop; its coordinator is acted by hand."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedpipe_core.config import FederationConfig
from fedpipe_core.edge_config import load_edge_config
from fedpipe_core.errors import ConfigError, ModelError, UpdateRefusedError
from fedpipe_core.plan_schemas import FederationPlan
from fedpipe_core.profile_schemas import EdgeProfile
from fedpipe_core.schemas import FailureRecord, FederationRecord, LeaseRecord
from tasks import edge, edge_judging, federation, served_edge
from tasks.coordinator import Coordinator
from tasks.edge import EdgeSession, StoppedError
from tasks.leases import Heartbeat
from tasks.local_store import LocalStore
from tasks.records import get_record
from tasks.served_edge import NotOpenedError, ServedEdge, load_base, open_session

LEASE_SECONDS = 1.0


@pytest.fixture(scope="session")
def tiny_config(tiny_config: FederationConfig) -> FederationConfig:
    """The tiny federation, with signs of life in quick succession."""
    remote = tiny_config.remote.model_copy(update={"lease_seconds": LEASE_SECONDS, "poll_seconds": 0.01})
    return tiny_config.model_copy(update={"remote": remote})


@pytest.fixture
def alive(coordinator: Coordinator) -> Iterator[Heartbeat]:
    """The coordinator's signs of life."""
    heartbeat = Heartbeat(coordinator.store, coordinator.keys.coordinator_lease, "coordinator", LEASE_SECONDS)
    heartbeat.start()
    yield heartbeat
    heartbeat.end("done")


@contextmanager
def serving(session: EdgeSession, owner: str = "flow-run") -> Iterator[ServedEdge]:
    with ServedEdge(session, owner) as served:
        yield served


def lease_of(session: EdgeSession) -> LeaseRecord:
    found = get_record(session.store, session.keys.edge_lease(session.edge_id), LeaseRecord)
    assert found is not None
    return found


def close_round(coordinator: Coordinator, sessions: dict[str, EdgeSession], plan: FederationPlan, index: int) -> None:
    for edge_id in ("north", "west"):
        edge.train_round.fn(sessions[edge_id], index)
    federation.aggregate_round.fn(coordinator, plan, index)


def stopped(served: ServedEdge) -> str:
    """What the edge says when it stops, which must be soon."""
    deadline = time.monotonic() + 10 * LEASE_SECONDS
    while time.monotonic() < deadline:
        try:
            served.check()
        except StoppedError as reason:
            return str(reason)
        time.sleep(0.01)
    raise AssertionError("the edge did not stop")


def test_edge_serves_every_round_and_ends(
    coordinator: Coordinator, sessions: dict[str, EdgeSession], plan: FederationPlan, alive: Heartbeat
) -> None:
    with serving(sessions["east"]) as served:
        served.await_plan()
        for index in (1, 2):
            assert served.next_round() == index
            edge.train_round.fn(sessions["east"], index)
            close_round(coordinator, sessions, plan, index)
        assert served.next_round() is None
    assert set(federation.round_updates(coordinator, 2)) == {"east", "north", "west"}
    assert lease_of(sessions["east"]).ended == "done"


def judging_edge(sessions: dict[str, EdgeSession]) -> EdgeSession:
    """East, which is asked to judge beside the coordinator."""
    east = sessions["east"]
    asked = east.config.evaluation.model_copy(update={"at": "both"})
    east.config = east.config.model_copy(update={"evaluation": asked})
    return east


def test_edge_judges_before_it_trains_and_once_more_after_the_last_round(
    coordinator: Coordinator, sessions: dict[str, EdgeSession], plan: FederationPlan, alive: Heartbeat
) -> None:
    east = judging_edge(sessions)
    turns = []
    with serving(east) as served:
        while index := served.next_round():
            turns.append((index, served.judges))
            if served.judges:
                edge_judging.judge.fn(east, index)
            else:
                edge.train_round.fn(east, index)
                close_round(coordinator, sessions, plan, index)
    assert turns == [(1, True), (1, False), (2, True), (2, False), (3, True)]
    assert not coordinator.store.exists(coordinator.keys.update_record(3, "east"))


def test_edge_trains_at_once_where_the_judging_was_closed_without_it(
    coordinator: Coordinator, sessions: dict[str, EdgeSession], plan: FederationPlan, alive: Heartbeat
) -> None:
    east = judging_edge(sessions)
    coordinator.store.put(coordinator.keys.judged(1), b"{}")
    with serving(east) as served:
        assert served.next_round() == 1
        assert not served.judges


def test_edge_that_comes_late_takes_up_the_newest_round(
    coordinator: Coordinator, sessions: dict[str, EdgeSession], plan: FederationPlan, alive: Heartbeat
) -> None:
    close_round(coordinator, sessions, plan, 1)
    with serving(sessions["east"]) as served:
        assert served.next_round() == 2


def test_edge_whose_failure_was_forgotten_tries_again(
    coordinator: Coordinator, sessions: dict[str, EdgeSession], plan: FederationPlan, alive: Heartbeat
) -> None:
    session, key = sessions["east"], coordinator.keys.failure(1, "east")
    failure = FailureRecord(run="run", round=1, edge_id="east", reason="disk full")
    coordinator.store.put(key, failure.model_dump_json().encode())
    with serving(session) as served:
        assert served._unanswered_round() is None
        federation.forget_failures(coordinator, 1)
        assert served.next_round() == 1


def test_training_stops_when_the_round_went_on_without_the_edge(
    coordinator: Coordinator, sessions: dict[str, EdgeSession], plan: FederationPlan, alive: Heartbeat
) -> None:
    with serving(sessions["east"]) as served:
        assert served.next_round() == 1
        close_round(coordinator, sessions, plan, 1)
        time.sleep(LEASE_SECONDS)
        with pytest.raises(UpdateRefusedError, match="late: round 1 was closed before training ended"):
            served.check()
        edge.train_round.fn(sessions["east"], 1)
        assert served.next_round() == 2
        served.check()
    assert set(federation.round_updates(coordinator, 1)) == {"north", "west"}


def test_edge_stops_when_its_coordinator_falls_silent(
    sessions: dict[str, EdgeSession], plan: FederationPlan, alive: Heartbeat
) -> None:
    served = ServedEdge(sessions["east"], "flow-run")

    def serve() -> None:
        with served:
            assert "the coordinator gave no sign of life for" in stopped(served)
            served.next_round()

    alive._ending.set()  # as a killed coordinator: no more signs, and no word of farewell
    with pytest.raises(StoppedError, match="no sign of life"):
        serve()
    assert lease_of(sessions["east"]).ended == "orphaned"


def test_edge_stops_when_the_run_ended_without_success(
    sessions: dict[str, EdgeSession], plan: FederationPlan, alive: Heartbeat
) -> None:
    with serving(sessions["east"]) as served:
        alive.end("failed", "the coordinator was interrupted")
        assert stopped(served) == "the coordinator was interrupted"


def test_edge_ends_with_a_run_that_is_complete(
    sessions: dict[str, EdgeSession], plan: FederationPlan, alive: Heartbeat
) -> None:
    with serving(sessions["east"]) as served:
        served.next_round()
        alive.end("done")
        time.sleep(LEASE_SECONDS)
        assert served.next_round() is None


def test_of_two_flow_runs_for_one_edge_the_older_stops(
    sessions: dict[str, EdgeSession], plan: FederationPlan, alive: Heartbeat
) -> None:
    with serving(sessions["east"], "old") as old:
        Heartbeat(sessions["east"].store, sessions["east"].keys.edge_lease("east"), "new", LEASE_SECONDS).start()
        assert stopped(old) == "flow run new serves this edge now"


def test_error_at_the_edge_is_told_with_its_last_sign_of_life(
    sessions: dict[str, EdgeSession], plan: FederationPlan, alive: Heartbeat
) -> None:
    with pytest.raises(ModelError), serving(sessions["east"]):
        raise ModelError("no such weights")
    assert (lease_of(sessions["east"]).ended, lease_of(sessions["east"]).reason) == ("failed", "no such weights")


def edge_yaml(folder: Path, config: FederationConfig, **changes: Any) -> Path:
    rows = config.data.train.replace("{edge_id}", "east")
    path = folder / "edge.yaml"
    document = {"edge_id": "east", "data": {"train": rows}, "device": "cpu", **changes}
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


def test_session_is_made_of_the_run_and_the_edges_own_file(
    coordinator: Coordinator, sessions: dict[str, EdgeSession], plan: FederationPlan, tmp_path: Path
) -> None:
    own = load_edge_config(edge_yaml(tmp_path, coordinator.config, memory_gib=2, threads=1))
    session, record = open_session(own, "run", coordinator.store.root)
    load_base(session, record)
    assert session.data.fingerprint == sessions["east"].data.fingerprint
    assert (session.machine.memory_bytes, session.machine.threads) == (2 * 2**30, 1)
    assert session.state == tmp_path / ".fedpipe/edges/run/east"


def test_run_that_is_not_in_the_store_is_told(coordinator: Coordinator, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"east: run elsewhere is not in .*; correct `store` in edge.yaml"):
        open_session(load_edge_config(edge_yaml(tmp_path, coordinator.config)), "elsewhere", coordinator.store.root)


def test_edge_that_was_called_early_waits_until_the_run_is_open(
    coordinator: Coordinator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_it(_: float) -> None:
        federation.open_federation(coordinator.config, coordinator.store, coordinator.keys, resume=False)

    monkeypatch.setattr(time, "sleep", open_it)  # the edge looks, and only then is there a run
    own = load_edge_config(edge_yaml(tmp_path, coordinator.config))
    session, record = open_session(own, "run", coordinator.store.root, early=True)
    assert (session.edge_id, record.run) == ("east", "run")


def test_edge_that_was_called_early_leaves_no_trace_when_no_run_comes(
    coordinator: Coordinator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served_edge, "EARLY_SECONDS", 0.1)
    own, before = load_edge_config(edge_yaml(tmp_path, coordinator.config)), coordinator.store.list()
    with pytest.raises(NotOpenedError, match=r"run nobody did not appear in .* within 0.1 s"):
        open_session(own, "nobody", coordinator.store.root, early=True)
    assert coordinator.store.list() == before


def test_other_weights_than_the_federations_are_refused(
    coordinator: Coordinator, sessions: dict[str, EdgeSession], plan: FederationPlan
) -> None:
    record = get_record(coordinator.store, coordinator.keys.federation, FederationRecord)
    assert record is not None
    with pytest.raises(ModelError, match=r"has hash .*, the federation's has 000000000000; bring the same weights"):
        load_base(sessions["east"], record.model_copy(update={"base_sha256": "0" * 64}))


def test_memory_limit_of_the_edge_caps_what_it_reports(
    coordinator: Coordinator, sessions: dict[str, EdgeSession]
) -> None:
    session = sessions["east"]
    session.machine = edge.Machine(memory_bytes=123)
    federation.open_federation(coordinator.config, coordinator.store, coordinator.keys, resume=False)
    edge.profile.fn(session, coordinator.shape)
    found = get_record(coordinator.store, coordinator.keys.profile("east"), EdgeProfile)
    assert found is not None
    assert found.memory_bytes == 123


def test_failure_that_is_retried_is_not_told(
    sessions: dict[str, EdgeSession], plan: FederationPlan, alive: Heartbeat
) -> None:
    for retried, ended in ((True, None), (False, "failed")):
        with pytest.raises(ConfigError), ServedEdge(sessions["east"], "flow-run", retried):
            raise ConfigError("no rows")
        assert lease_of(sessions["east"]).ended == ended


def test_farewell_of_an_older_flow_run_stops_nobody(
    sessions: dict[str, EdgeSession], plan: FederationPlan, alive: Heartbeat
) -> None:
    session = sessions["east"]
    with serving(session, "new") as served:
        farewell = LeaseRecord(owner="old", beat=3, ended="orphaned")
        session.store.put(session.keys.edge_lease("east"), farewell.model_dump_json().encode())
        time.sleep(LEASE_SECONDS)
        served.check()


def test_update_of_another_process_of_the_edge_is_left_as_it_is(
    coordinator: Coordinator, sessions: dict[str, EdgeSession], plan: FederationPlan, alive: Heartbeat
) -> None:
    store, keys, session = coordinator.store, coordinator.keys, sessions["east"]
    twin = EdgeSession(coordinator.config, session.edge, store, keys)

    def answer_first() -> None:
        if not store.exists(keys.update_record(1, "east")):
            edge.train_round.fn(twin, 1)
            written.append(store.get(keys.update_record(1, "east")))

    written: list[bytes] = []
    session.check = answer_first
    edge.train_round.fn(session, 1)
    failure = get_record(store, keys.failure(1, "east"), FailureRecord)
    assert failure is not None
    assert failure.reason == "east: another process of this edge answered round 1 first"
    assert [store.get(keys.update_record(1, "east"))] == written


@pytest.fixture
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM raises in the main thread, as Prefect has it."""

    def leave(*_: object) -> None:
        raise SystemExit("told to stop")

    before = signal.signal(signal.SIGTERM, leave)
    yield
    signal.signal(signal.SIGTERM, before)


def test_second_signal_does_not_cut_the_farewell(
    coordinator: Coordinator,
    sessions: dict[str, EdgeSession],
    alive: Heartbeat,
    ended_by_sigterm: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session, put = sessions["east"], LocalStore.put

    def put_and_hear_again(store: LocalStore, key: str, data: bytes) -> None:
        if key == session.keys.edge_lease("east"):
            signal.raise_signal(signal.SIGTERM)
        put(store, key, data)

    def serve_until_told_to_stop() -> None:
        with serving(session):
            monkeypatch.setattr(LocalStore, "put", put_and_hear_again)
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit):
        serve_until_told_to_stop()
    lease = lease_of(session)
    assert (lease.ended, lease.reason) == ("left", "its process was told to stop (SystemExit)")
