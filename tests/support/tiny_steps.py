"""Single steps of a tiny federation, called without a flow around them."""

from pathlib import Path

from fedpipe_core.config import FederationConfig
from fedpipe_core.schemas import FederationPlan
from tasks import edge, federation
from tasks.edge import EdgeSession
from tasks.federation import Coordinator
from tasks.records import RunKeys
from tasks.storage import open_store


def coordinator_at(config: FederationConfig, store: Path) -> Coordinator:
    """A coordinator of a run named `run`."""
    changed = config.model_copy(update={"store": str(store)})
    return Coordinator(changed, open_store(str(store)), RunKeys("run"))


def sessions_of(coordinator: Coordinator) -> dict[str, EdgeSession]:
    """A session for every edge of a coordinator's run."""
    config, store, keys = coordinator.config, coordinator.store, coordinator.keys
    return {spec.edge_id: EdgeSession(config, spec, store, keys, threads=1) for spec in config.edges}


def prepare(coordinator: Coordinator, sessions: dict[str, EdgeSession]) -> FederationPlan:
    """Open the federation, profile its edges, plan it and publish the first adapter."""
    federation.open_federation(coordinator.config, coordinator.store, coordinator.keys, resume=False)
    for session in sessions.values():
        edge.profile.fn(session, coordinator.shape)
    found = federation.plan.fn(coordinator)
    federation.publish_first_adapter.fn(coordinator, found)
    return found
