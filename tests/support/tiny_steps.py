"""Single steps of a tiny federation, called without a flow around them."""

from pathlib import Path

from fedpipe_core.config import FederationConfig
from fedpipe_core.evaluation import metrics_of
from fedpipe_core.plan_schemas import FederationPlan
from tasks import edge, federation, reports
from tasks.coordinator import Coordinator
from tasks.edge import EdgeSession
from tasks.judging import Worth
from tasks.records import RunKeys, put_record
from tasks.storage import open_store


def coordinator_at(config: FederationConfig, store: Path) -> Coordinator:
    """A coordinator of a run named `run`."""
    changed = config.model_copy(update={"store": str(store)})
    return Coordinator(changed, open_store(str(store)), RunKeys("run"))


def sessions_of(coordinator: Coordinator) -> dict[str, EdgeSession]:
    """A session for every edge of a coordinator's run."""
    config, store, keys = coordinator.config, coordinator.store, coordinator.keys
    return {spec.edge_id: EdgeSession(config, spec, store, keys) for spec in config.edges}


def prepare(coordinator: Coordinator, sessions: dict[str, EdgeSession]) -> FederationPlan:
    """Open the federation, profile its edges, plan it and publish the first adapter."""
    federation.open_federation(coordinator.config, coordinator.store, coordinator.keys, resume=False)
    for session in sessions.values():
        edge.profile.fn(session, coordinator.shape)
    found = federation.plan.fn(coordinator)
    federation.publish_first_adapter.fn(coordinator, found)
    return found


def after_a_round(config: FederationConfig, store: Path) -> tuple[Coordinator, dict[str, EdgeSession]]:
    """A federation whose edges have trained one round."""
    coordinator = coordinator_at(config, store)
    sessions = sessions_of(coordinator)
    plan = prepare(coordinator, sessions)
    for session in sessions.values():
        edge.train_round.fn(session, 1)
    federation.aggregate_round.fn(coordinator, plan, 1)
    return coordinator, sessions


def finish_rounds(
    coordinator: Coordinator,
    sessions: dict[str, EdgeSession],
    plan: FederationPlan,
    foreign: tuple[str, int] | None = None,
) -> None:
    """Train and close every round; `foreign` is an edge and a round whose update claims to belong to another run."""
    for index in range(1, coordinator.config.rounds + 1):
        for session in sessions.values():
            edge.train_round.fn(session, index)
        if foreign and foreign[1] == index:
            key = coordinator.keys.update_record(index, foreign[0])
            claimed = federation.round_updates(coordinator, index)[foreign[0]].model_copy(update={"run": "elsewhere"})
            coordinator.store.put(key, claimed.model_dump_json().encode())
        made = federation.aggregate_round.fn(coordinator, plan, index)
        metrics = metrics_of(federation.evaluate.fn(coordinator, index + 1, whole=True))
        record = reports.round_record(coordinator, plan, made, Worth(metrics), 1.0)
        put_record(coordinator.store, coordinator.keys.round_record(index), record)
