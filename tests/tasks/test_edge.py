import gc
import json
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_federation import EDGES
from tiny_models import LABELS
from tiny_steps import coordinator_at, prepare, sessions_of

from fedpipe_core.config import FederationConfig
from fedpipe_core.costs import base_bytes
from fedpipe_core.errors import IntegrityError
from fedpipe_core.model import base_shape
from fedpipe_core.plan_schemas import FederationPlan
from fedpipe_core.profile_schemas import EdgeProfile
from fedpipe_core.schemas import FailureRecord, UpdateRecord
from fedpipe_core.tokenizing import TokenizedExamples
from tasks import edge, federation
from tasks.coordinator import Coordinator
from tasks.edge import (
    EdgeSession,
    Machine,
    StoppedError,
    let_go_of_bases,
    link_bytes_per_second,
    read_global,
    shared_base,
)
from tasks.edge_models import lent_model
from tasks.records import RunKeys, get_data, get_record
from tasks.storage import open_store


def update_of(session: EdgeSession, round_index: int = 1) -> UpdateRecord | None:
    return get_record(session.store, session.keys.update_record(round_index, session.edge_id), UpdateRecord)


def failure_of(session: EdgeSession) -> FailureRecord | None:
    return get_record(session.store, session.keys.failure(1, session.edge_id), FailureRecord)


def test_profile_is_published_once(coordinator: Coordinator, sessions: dict[str, EdgeSession]) -> None:
    session = sessions["east"]
    edge.profile.fn(session, coordinator.shape)
    key = coordinator.keys.profile("east")
    first = coordinator.store.get(key)
    edge.profile.fn(session, coordinator.shape)
    assert coordinator.store.get(key) == first
    assert EdgeProfile.model_validate_json(first).edge_id == "east"


def test_profile_holds_numbers_and_no_row(coordinator: Coordinator, sessions: dict[str, EdgeSession]) -> None:
    edge.profile.fn(sessions["east"], coordinator.shape)
    text = coordinator.store.get(coordinator.keys.profile("east")).decode()
    assert "word" not in text
    assert not any(f"share {label}" in text for label in range(LABELS))  # their names


def test_declared_resources_stand_in_for_measurements(
    coordinator: Coordinator, sessions: dict[str, EdgeSession]
) -> None:
    edge.profile.fn(sessions["east"], coordinator.shape)
    profile = get_record(coordinator.store, coordinator.keys.profile("east"), EdgeProfile)
    assert profile
    assert profile.declared
    assert (profile.memory_bytes, profile.bandwidth_bytes_per_second) == (2**29, 12.5e6)


@pytest.mark.usefixtures("run_logger_off")
def test_undeclared_resources_are_measured_and_the_probe_is_removed(
    tiny_config: FederationConfig, tmp_path: Path
) -> None:
    bare = tuple(spec.model_copy(update={"resources": None}) for spec in tiny_config.edges)
    coordinator = coordinator_at(tiny_config.model_copy(update={"edges": bare}), tmp_path)
    edge.profile.fn(sessions_of(coordinator)["east"], coordinator.shape)
    profile = get_record(coordinator.store, coordinator.keys.profile("east"), EdgeProfile)
    assert profile
    assert not profile.declared
    assert coordinator.store.list() == [coordinator.keys.profile("east")]


def test_link_is_measured_and_nothing_stays(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    assert link_bytes_per_second(store, RunKeys("run"), "east") > 0
    assert store.list() == []


@pytest.mark.usefixtures("plan")
def test_update_is_data_that_its_record_vouches_for(sessions: dict[str, EdgeSession]) -> None:
    session = sessions["north"]
    edge.train_round.fn(session, 1)
    update = update_of(session)
    assert update
    assert (update.run, update.round, update.edge_id) == ("run", 1, "north")
    assert update.global_sha256 == read_global(session.store, session.keys, 1)[0].adapter.sha256
    assert update.steps == session.plan.local_steps
    assert update.examples_processed == session.plan.local_steps * session.plan.batch_size
    assert update.num_examples + len(session.data.validation) == 60
    assert update.peak_memory_bytes > 0
    assert 0 < update.train_seconds + update.transfer_seconds <= update.round_seconds
    assert update.started_at
    assert update.started_at + update.round_seconds <= time.time()
    assert set(update.metrics) == {"accuracy", "macro_f1", "loss"}
    assert len(get_data(session.store, update.adapter)) == update.adapter.size_bytes


@pytest.mark.usefixtures("plan")
def test_published_update_is_left_as_it_is(sessions: dict[str, EdgeSession]) -> None:
    session = sessions["north"]
    edge.train_round.fn(session, 1)
    key = session.keys.update_record(1, "north")
    path = Path(session.store.root, key)
    before = (path.read_bytes(), path.stat().st_mtime_ns)
    edge.train_round.fn(session, 1)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_update_depends_neither_on_the_order_of_edges_nor_on_a_warm_session(
    tiny_config: FederationConfig, tmp_path: Path, run_logger_off: None
) -> None:
    hashes = []
    for name, order in (("a", EDGES), ("b", EDGES[::-1])):
        coordinator = coordinator_at(tiny_config, tmp_path / name)
        sessions = sessions_of(coordinator)
        prepare(coordinator, sessions)
        for edge_id in order:
            edge.train_round.fn(sessions[edge_id], 1)
        updates = {edge_id: update_of(session) for edge_id, session in sessions.items()}
        hashes.append({edge_id: update.adapter.sha256 for edge_id, update in updates.items() if update})
    assert hashes[0] == hashes[1]
    assert len(set(hashes[0].values())) == len(EDGES)


@pytest.mark.usefixtures("plan")
def test_edge_without_usable_rows_publishes_the_reason(sessions: dict[str, EdgeSession]) -> None:
    session = sessions["west"]
    nothing = TokenizedExamples([], [], 0)
    session.data = replace(session.data, train=nothing)
    edge.train_round.fn(session, 1)
    failure = failure_of(session)
    assert update_of(session) is None
    assert failure
    assert "there are 0 rows to train on" in failure.reason


@pytest.mark.usefixtures("plan")
def test_edge_whose_loss_is_no_number_publishes_the_reason(sessions: dict[str, EdgeSession]) -> None:
    session = sessions["west"]
    with lent_model(session.design) as model:
        norm = model.model.get_submodule("bert.encoder.layer.0.output.LayerNorm")
        norm.weight = torch.nn.Parameter(torch.full((32,), float("nan")), requires_grad=False)
    edge.train_round.fn(session, 1)
    failure = failure_of(session)
    assert update_of(session) is None
    assert failure
    assert "loss became nan at step 1" in failure.reason


@pytest.mark.usefixtures("plan")
def test_unexpected_failure_is_published_with_its_kind(sessions: dict[str, EdgeSession]) -> None:
    session = sessions["west"]
    session.data = None  # type: ignore[assignment]
    edge.train_round.fn(session, 1)
    failure = failure_of(session)
    assert failure
    assert failure.reason.startswith("AttributeError: ")


@pytest.mark.usefixtures("plan")
def test_interrupted_training_publishes_neither_update_nor_failure(sessions: dict[str, EdgeSession]) -> None:
    session = sessions["west"]
    edge.stop_training()
    try:
        with pytest.raises(StoppedError, match="interrupted"):
            edge.train_round.fn(session, 1)
    finally:
        edge.allow_training()
    assert update_of(session) is failure_of(session) is None
    edge.train_round.fn(session, 1)
    assert update_of(session)


@pytest.mark.usefixtures("run_logger_off")
def test_what_a_short_format_leaves_out_stays_at_the_edge(tiny_config: FederationConfig, tmp_path: Path) -> None:
    exchange = tiny_config.exchange.model_copy(update={"dtype": "int8"})
    coordinator = coordinator_at(tiny_config.model_copy(update={"exchange": exchange}), tmp_path / "store")
    sessions = sessions_of(coordinator)
    prepare(coordinator, sessions)
    edge.train_round.fn(sessions["east"], 1)
    assert (tmp_path / "edges/run/east/residual-0001.safetensors").is_file()
    assert not [key for key in coordinator.store.list() if "residual" in key]


@pytest.mark.usefixtures("run_logger_off")
def test_an_edge_that_makes_a_quarter_of_the_steps_that_rates_are_for_trains_at_twice_the_rate(
    tiny_config: FederationConfig, tmp_path: Path
) -> None:
    def trained(name: str, **changes: float) -> str:
        coordinator = coordinator_at(tiny_config, tmp_path / name / "store")
        sessions = sessions_of(coordinator)
        prepare(coordinator, sessions)
        east = sessions["east"]
        quadruple = 4 * east.plan.local_steps if changes.get("rate_steps") else None
        training = tiny_config.training.model_copy(update={**changes, "rate_steps": quadruple})
        east.config = tiny_config.model_copy(update={"training": training})
        edge.train_round.fn(east, 1)
        update = update_of(east)
        assert update
        return update.adapter.sha256

    rate = tiny_config.training.learning_rate
    assert trained("few", rate_steps=1) == trained("twice", learning_rate=2 * rate) != trained("plain")


def test_state_of_an_edge_on_s3_lies_in_the_working_directorys_own_folder(
    tiny_config: FederationConfig, s3_root: str
) -> None:
    session = EdgeSession(tiny_config, tiny_config.edges[0], open_store(s3_root), RunKeys("run"))
    assert session.state == Path(".fedpipe/edges/run/east")


def test_edges_of_a_process_share_one_base(sessions: dict[str, EdgeSession]) -> None:
    bases = {id(session.profile_base) for session in sessions.values()}
    assert bases == {id(shared_base(sessions["east"].config, 32))}


@pytest.mark.usefixtures("run_logger_off")
def test_edge_whose_memory_is_too_small_for_the_dense_base_never_loads_it(
    tiny_config: FederationConfig, tmp_path: Path
) -> None:
    model = tiny_config.model.model_copy(update={"bits": (32, 8, 4)})
    coordinator = coordinator_at(tiny_config.model_copy(update={"model": model}), tmp_path)
    shape = base_shape(model, tiny_config.data.labels)
    probes = 16 * tiny_config.planning.probe_rank * sum(module.features for module in shape.modules.values())
    machine = Machine(memory_bytes=round(base_bytes(shape, 4, 4) + probes))
    session = EdgeSession(coordinator.config, tiny_config.edges[0], coordinator.store, coordinator.keys, machine)
    edge.profile.fn(session, shape)
    profile = get_record(coordinator.store, coordinator.keys.profile("east"), EdgeProfile)
    assert session.profile_base.bits == 4
    assert profile
    assert profile.memory_bytes == machine.memory_bytes
    assert sum(sum(scores) for scores in profile.scores.values()) == pytest.approx(1)


def test_bases_are_freed_when_nothing_else_holds_them(tiny_config: FederationConfig) -> None:
    held = weakref.ref(shared_base(tiny_config, 32).model)
    let_go_of_bases()
    gc.collect()
    assert held() is None


def test_session_without_a_plan_says_so(sessions: dict[str, EdgeSession]) -> None:
    with pytest.raises(IntegrityError, match=r"east: run/plan.json is missing or has no such edge"):
        _ = sessions["east"].plan


def test_missing_global_adapter_is_told(coordinator: Coordinator) -> None:
    with pytest.raises(IntegrityError, match=r"rounds/0009/global.json is missing; resume the run"):
        read_global(coordinator.store, coordinator.keys, 9)


def test_damaged_global_adapter_becomes_the_edges_failure(
    coordinator: Coordinator, sessions: dict[str, EdgeSession], plan: FederationPlan
) -> None:
    coordinator.store.put(coordinator.keys.global_data(1), b"damaged")
    edge.train_round.fn(sessions["east"], 1)
    failure = failure_of(sessions["east"])
    assert failure
    assert "but its record promises" in failure.reason
    federation.forget_failures(coordinator, 1)
    assert failure_of(sessions["east"]) is None
    assert json.loads(coordinator.store.get(coordinator.keys.plan))["edges"].keys() == plan.edges.keys()
