"""Every method through the steps that a federation is made of, from plan to judged adapter."""

from itertools import pairwise
from pathlib import Path

import pytest
from tiny_federation import EDGES, write_writers_federation
from tiny_steps import after_a_round, coordinator_at, finish_rounds, prepare, sessions_of

from fedpipe_core.config import FederationConfig
from fedpipe_core.config_file import load_config, parse_config
from fedpipe_core.errors import ConfigError, PlanError
from fedpipe_core.evaluation import metrics_of
from fedpipe_core.methods import bottleneck_places, bottleneck_size
from fedpipe_core.plan_schemas import FederationPlan
from fedpipe_core.schemas import GlobalRecord
from flows.release import require_releasable
from tasks import edge, federation, plans
from tasks.coordinator import Coordinator
from tasks.records import get_record
from tasks.status import unreleased_runs

ROUNDS = 4
METHODS = ["fedpipe", "fedlora", "full", "fedadapter"]
WRITERS = ["full of writers", "fedadapter of writers"]


@pytest.fixture(scope="session")
def writers_config(tmp_path_factory: pytest.TempPathFactory) -> FederationConfig:
    """A config whose model writes."""
    quick = {"planning.importance": "uniform", "training.learning_rate": 0.03}
    return load_config(write_writers_federation(tmp_path_factory.mktemp("writers"), **quick))


@pytest.fixture
def method_config(
    tiny_config: FederationConfig, writers_config: FederationConfig, request: pytest.FixtureRequest
) -> FederationConfig:
    """The tiny federation under the method that the test names; `METHOD of writers` is that of a language model."""
    method, _, task = request.param.partition(" of ")
    document = (writers_config if task else tiny_config).model_dump(mode="json", exclude_unset=True)
    document |= {"method": method, "rounds": ROUNDS}
    document["data"] |= {"validation_fraction": 0.25}
    document["training"] |= {"examples_per_round": 96}
    return parse_config(document, "the test's config")


def run_rounds(config: FederationConfig, store: Path, order: tuple[str, ...] = EDGES) -> Coordinator:
    """All rounds, edges one after another in the given order, every edge's session made anew in every round."""
    coordinator = coordinator_at(config, store)
    prepare(coordinator, sessions_of(coordinator))
    for index in range(1, ROUNDS + 1):
        plan, sessions = plans.plan_round(coordinator, index), sessions_of(coordinator)
        for edge_id in order:
            if edge_id in plan.edges:
                edge.train_round.fn(sessions[edge_id], index)
        made = federation.aggregate_round.fn(coordinator, plan, index)
        assert set(made.counted) == set(plan.edges), made.dropped
    return coordinator


def global_record(coordinator: Coordinator, index: int) -> GlobalRecord:
    record = get_record(coordinator.store, coordinator.keys.global_record(index), GlobalRecord)
    assert record
    return record


@pytest.mark.usefixtures("run_logger_off")
@pytest.mark.parametrize("method_config", [*METHODS, *WRITERS], indirect=True)
def test_rounds_learn_and_depend_on_neither_order_nor_a_warm_session(
    method_config: FederationConfig, tmp_path: Path
) -> None:
    first = run_rounds(method_config, tmp_path / "a")
    again = run_rounds(method_config, tmp_path / "b", EDGES[::-1])
    assert global_record(first, ROUNDS + 1).adapter.sha256 == global_record(again, ROUNDS + 1).adapter.sha256
    before, after = (metrics_of(federation.evaluate.fn(first, index, whole=True)) for index in (1, ROUNDS + 1))
    assert after["loss"] < 0.9 * before["loss"]


@pytest.mark.usefixtures("run_logger_off")
@pytest.mark.parametrize("method_config", ["full", "fedadapter", *WRITERS], indirect=True)
def test_predicted_bytes_and_memory_are_those_of_the_records(method_config: FederationConfig, tmp_path: Path) -> None:
    coordinator = run_rounds(method_config, tmp_path)
    plan = plans.plan_at(coordinator.store, coordinator.keys, ROUNDS)
    for edge_id, update in federation.round_updates(coordinator, ROUNDS).items():
        predicted = plan.edges[edge_id].predicted
        slack = 8192  # names in the file's header, which weigh nothing beside a real model
        assert predicted.upload_bytes == pytest.approx(update.adapter.size_bytes, rel=0.1, abs=slack)
        assert predicted.download_bytes == pytest.approx(update.download_bytes, rel=0.1, abs=slack)
        assert predicted.peak_memory_bytes == pytest.approx(update.peak_memory_bytes, rel=0.3)


@pytest.mark.usefixtures("run_logger_off")
@pytest.mark.parametrize("method_config", ["fedadapter"], indirect=True)
def test_bottlenecks_grow_by_trials_whose_plans_are_kept(method_config: FederationConfig, tmp_path: Path) -> None:
    coordinator = run_rounds(method_config, tmp_path)
    shape = bottleneck_places(coordinator.shape)
    sizes = [bottleneck_size(shape, global_record(coordinator, index).ranks) for index in range(1, ROUNDS + 2)]
    assert sizes[0] == sizes[1] == (1, 8)
    assert all(now >= before for before, now in pairwise(sizes))
    for index in range(2, ROUNDS + 1):
        plan = plans.plan_at(coordinator.store, coordinator.keys, index)
        tried = {edge.trial.candidate: edge.ranks for edge in plan.edges.values() if edge.trial}
        assert sizes[index] in [bottleneck_size(shape, ranks) for ranks in tried.values()]
        for edge_id, update in federation.round_updates(coordinator, index).items():
            assert (
                set(update.trained_metrics) == {"accuracy", "macro_f1", "loss"} if plan.edges[edge_id].trial else True
            )
    stored = coordinator.store.list(coordinator.keys.joined_plans)
    assert plans.plan_round(coordinator, ROUNDS) == plans.plan_at(coordinator.store, coordinator.keys, ROUNDS)
    assert coordinator.store.list(coordinator.keys.joined_plans) == stored  # asking again decides nothing anew


@pytest.mark.usefixtures("run_logger_off")
@pytest.mark.parametrize("method_config", ["fedadapter"], indirect=True)
def test_an_edge_waits_for_the_sizes_of_its_round(method_config: FederationConfig, tmp_path: Path) -> None:
    coordinator, sessions = after_a_round(method_config, tmp_path)
    assert sessions["east"].is_ready(1)
    assert not sessions["east"].is_ready(2)
    plans.plan_round(coordinator, 2)
    assert sessions["east"].is_ready(2)


@pytest.mark.usefixtures("run_logger_off")
@pytest.mark.parametrize("method_config", ["full", "fedadapter"], indirect=True)
def test_an_edge_that_does_not_hold_the_method_is_left_out_of_every_round(
    method_config: FederationConfig, tmp_path: Path
) -> None:
    weak = {"memory_gib": 1e-4, "tokens_per_second": 20000, "bandwidth_mbit": 100}
    document = method_config.model_dump(mode="json", exclude_unset=True)
    document["edges"][1]["resources"] = weak
    with pytest.raises(PlanError, match="north: memory: the smallest uniform plan"):
        run_rounds(parse_config(document, "it"), tmp_path / "refused")
    document["planning"] |= {"unfit_edges": "drop"}
    coordinator = run_rounds(parse_config(document, "it"), tmp_path / "dropped")
    plan = get_record(coordinator.store, coordinator.keys.plan, FederationPlan)
    assert plan
    assert sorted(plan.edges) == ["east", "west"]
    assert "north: memory" in global_record(coordinator, 2).dropped["north"]


@pytest.mark.parametrize(
    ("method_config", "released"), [("full", True), ("fedadapter", False)], indirect=["method_config"]
)
def test_a_method_that_nothing_loads_is_refused_a_release_before_it_trains(
    method_config: FederationConfig, released: bool
) -> None:
    if released:
        require_releasable(method_config)
        return
    with pytest.raises(ConfigError, match=r"method fedadapter has no release: .*; run it with --no-release"):
        require_releasable(method_config)


@pytest.mark.usefixtures("run_logger_off")
@pytest.mark.parametrize("method_config", ["full", "fedadapter"], indirect=True)
def test_a_run_that_can_have_no_release_does_not_wait_for_one(method_config: FederationConfig, tmp_path: Path) -> None:
    coordinator = coordinator_at(method_config.model_copy(update={"rounds": 1}), tmp_path)
    sessions = sessions_of(coordinator)
    finish_rounds(coordinator, sessions, prepare(coordinator, sessions))
    assert unreleased_runs(str(tmp_path)) == (["run"] if method_config.method == "full" else [])
