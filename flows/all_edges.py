"""The edges of a run, and one step done on all that this process serves, as many at once as the machine carries."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from prefect import Task
from prefect.task_runners import ThreadPoolTaskRunner

from fedpipe_core.config import FederationConfig
from tasks import edge
from tasks.coordinator import Coordinator
from tasks.edge import EdgeSession, Machine
from tasks.remote_edges import RemoteEdge


@dataclass(frozen=True)
class Edges:
    """The edges served in this process, and those on machines of their own."""

    local: Sequence[EdgeSession]
    remote: Sequence[RemoteEdge] = ()


def edge_sessions(coordinator: Coordinator) -> list[EdgeSession]:
    """The edges served in this process."""
    config = coordinator.config
    machine = Machine(_threads_per_edge(config), signing_key=coordinator.signing_key)
    return [EdgeSession(config, spec, coordinator.store, coordinator.keys, machine) for spec in config.local_edges]


def on_all_edges(step: Task, sessions: Sequence[EdgeSession], **parameters: object) -> None:  # type: ignore[type-arg]
    """Run one step on every edge, as many at once as the machine is meant to carry; the first error is raised."""
    if not sessions:
        return
    runner: ThreadPoolTaskRunner[None] = ThreadPoolTaskRunner(max_workers=_edges_at_once(sessions[0].config))
    edge.allow_training()
    with runner:
        try:
            futures = [runner.submit(step, {"session": session, **parameters}) for session in sessions]
            for future in futures:
                future.result()
        except KeyboardInterrupt:
            edge.stop_training()
            raise


def _threads_per_edge(config: FederationConfig) -> int:
    """An even share of the cores, or of OMP_NUM_THREADS where it is set: the count of threads changes last digits."""
    allowed = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return max(1, (int(allowed) if allowed.isdigit() else os.cpu_count() or 1) // _edges_at_once(config))


def _edges_at_once(config: FederationConfig) -> int:
    return config.concurrency or min(len(config.local_edges), os.cpu_count() or 1) or 1
