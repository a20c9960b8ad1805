"""Edges on machines of their own, as the coordinator sees them: started, watched, waited for, and let go.

An edge's flow run is started on its work pool and found again after the coordinator died. Whether it lives is read
from its lease in the store; whether it answered, from its records. What it does is `tasks.served_edge`'s.
"""

import random
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from uuid import uuid4

from fedpipe_core.config import EdgeSpec, RemoteSpec
from fedpipe_core.errors import FedPipeError, QuorumError
from fedpipe_core.plan_schemas import FederationPlan
from fedpipe_core.schemas import FailureRecord
from tasks import progress
from tasks.coordinator import Coordinator
from tasks.flow_runs import (
    cancel_flow_run,
    edge_job,
    give_up_flow_run,
    look_at_flow_run,
    start_flow_run,
    unfinished_flow_run,
)
from tasks.leases import BEATS_PER_LEASE, Ending, Heartbeat, LeaseWatch
from tasks.records import offer_record, recorded_edges


class RemoteEdge:
    """One edge, and the flow run in which it is served."""

    def __init__(self, coordinator: Coordinator, spec: EdgeSpec):
        store, keys, self._limits = coordinator.store, coordinator.keys, coordinator.config.remote
        self._job = edge_job(store, keys.run, spec)
        self._lease = LeaseWatch(store, keys.edge_lease(spec.edge_id), self._limits.lease_seconds)
        self._flow_run_id, self._started_at, self._starts = "", 0.0, 0
        self._taken = False
        self._asked_at, self._absence = 0.0, ""

    @property
    def edge_id(self) -> str:
        """The edge's name."""
        return self._job.edge.edge_id

    def start(self) -> None:
        """Find the edge's flow run again, or start one. Raises ConfigError or OrchestratorError when that fails."""
        found, lease = unfinished_flow_run(self._job), self._lease.look()
        ended = lease is not None and lease.owner == found and lease.ended is not None
        if found is None or ended:
            self._start_anew()
        else:
            self._flow_run_id, self._started_at, self._starts = found, time.monotonic(), 1

    def trouble(self, at_once: bool = False) -> str | None:
        """Why no answer is to be expected; None while there is. An edge that died is started again on the way.

        With `at_once` the store is asked however newly it was: a farewell is not mistaken for lateness.
        """
        lease = self._lease.look(at_once)
        if lease is None or lease.owner != self._flow_run_id:
            return self._not_started()
        if lease.ended in ("left", "failed", "done"):
            return f"{lease.ended}: {lease.reason}" if lease.reason else str(lease.ended)
        if lease.ended is None and not self._lease.expired:
            return None
        return self._start_again(lease.reason or f"gave no sign of life for {self._lease.silent_seconds:.0f} s")

    def let_go(self, complete: bool) -> None:
        """End the edge's flow run; one that serves a complete run ends by itself."""
        serves = self._lease.lease is not None and self._lease.lease.owner == self._flow_run_id
        if self._flow_run_id and not (complete and serves):
            cancel_flow_run(self._flow_run_id)

    def _start_again(self, reason: str) -> str | None:
        """Replace a flow run whose process died; the reason, and that it happened too often, when it may not."""
        if self._starts > self._limits.restarts:
            return f"{reason}, and was started {self._starts} times (remote.restarts is {self._limits.restarts})"
        progress.note(f"{self.edge_id} {reason}; it is started again")
        give_up_flow_run(self._flow_run_id, reason)
        self._start_anew()
        return None

    def _start_anew(self) -> None:
        self._starts, self._absence, self._taken = self._starts + 1, "", False
        self._flow_run_id, self._started_at = start_flow_run(self._job, uuid4().hex), time.monotonic()

    def _not_started(self) -> str | None:
        """Why the flow run gives no sign of life, as found a few times per lease; None while it may still come."""
        now = time.monotonic()
        if now - self._asked_at >= self._limits.lease_seconds / BEATS_PER_LEASE:
            self._asked_at, self._absence = now, self._find_absence(now) or ""
        return self._absence or None

    def _find_absence(self, now: float) -> str | None:
        fate = look_at_flow_run(self._flow_run_id)
        if fate.taken and not self._taken:  # its process has yet to start, however long nobody came for it
            self._taken, self._started_at = True, now
        if fate.crashed:
            return self._start_again(f"died before it served: {fate.description}")
        if fate.ended:
            return f"ended before it served: {fate.description}"
        if now - self._started_at < self._limits.start_seconds:
            return None
        late = f"did not start within {self._limits.start_seconds:g} s: {fate.description}"
        if fate.taken:  # and lost: a worker that took it died with it
            return self._start_again(late)
        return f"{late}; is a worker running for queue {self._job.queue} of work pool {self._job.edge.work_pool}?"


@contextmanager
def serving(coordinator: Coordinator) -> Iterator[list[RemoteEdge]]:
    """Have the run's remote edges served while the block runs; afterwards, however it ends, they stop by themselves."""
    edges = (
        [] if _are_done(coordinator) else [RemoteEdge(coordinator, spec) for spec in coordinator.config.remote_edges]
    )
    if not edges:
        yield edges
        return
    key, seconds = coordinator.keys.coordinator_lease, coordinator.config.remote.lease_seconds
    heartbeat = Heartbeat(coordinator.store, key, uuid4().hex, seconds)
    heartbeat.start()
    ended: tuple[Ending, str] = ("failed", "the coordinator was interrupted")
    try:
        with progress.working("coordinator", f"start {len(edges)} edges"):
            for edge in edges:
                edge.start()
        yield edges
        ended = ("done", "the run is complete")
    except FedPipeError as error:
        ended = ("failed", f"the run failed: {error}")
        raise
    finally:
        heartbeat.end(*ended)
        for edge in edges:
            edge.let_go(ended[0] == "done")


def _are_done(coordinator: Coordinator) -> bool:
    """Whether nothing is left to train, or to judge, at an edge."""
    last, keys = coordinator.config.rounds + 1, coordinator.keys
    key = keys.judged(last) if coordinator.config.edges_judge else keys.global_record(last)
    return coordinator.store.exists(key)


def await_profiles(coordinator: Coordinator, edges: Sequence[RemoteEdge]) -> None:
    """Wait for the profiles of remote edges; go on without those that do not come while `min_edges` are left.

    Raises QuorumError, naming every edge without a profile and why, when fewer are.
    """
    config, folder = coordinator.config, coordinator.keys.profiles
    limit_seconds = config.remote.profile_seconds
    absent = _await(edges, lambda: recorded_edges(coordinator.store, folder), limit_seconds, config.remote)
    for edge_id, reason in absent.items():
        progress.note(f"{edge_id} is planned for when its profile comes: {reason}")
    present = len(config.edges) - len(absent)
    if present < config.min_edges:
        reasons = "; ".join(f"{edge_id} {reason}" for edge_id, reason in absent.items())
        raise QuorumError(
            f"{present} edges sent a profile, min_edges is {config.min_edges}; {reasons}; mend these edges and "
            "continue with --resume"
        )


def await_updates(
    coordinator: Coordinator,
    edges: Sequence[RemoteEdge],
    plan: FederationPlan,
    round_index: int,
    spent_seconds: float = 0.0,
) -> None:
    """Wait until the round's remote edges answered, cannot answer, or its deadline passed; record why others did not.

    The deadline is the plan's, with the configured grace, less what the round took already.
    """
    keys = coordinator.keys
    folders = keys.updates(round_index), keys.failures(round_index)
    silent = _silent_edges(coordinator, edges, plan, folders, spent_seconds)
    for edge_id, reason in silent.items():
        failure = FailureRecord(run=keys.run, round=round_index, edge_id=edge_id, reason=reason)
        if offer_record(coordinator.store, keys.failure(round_index, edge_id), failure):
            progress.note(f"{edge_id} returns no update from round {round_index}: {reason}")


def await_evaluations(
    coordinator: Coordinator,
    edges: Sequence[RemoteEdge],
    plan: FederationPlan,
    round_index: int,
    spent_seconds: float = 0.0,
) -> None:
    """`await_updates` for what the remote edges find the adapter worth that a round starts from, no longer than it."""
    keys = coordinator.keys
    folders = keys.evaluations(round_index), keys.evaluation_failures(round_index)
    silent = _silent_edges(coordinator, edges, plan, folders, spent_seconds)
    for edge_id, reason in silent.items():
        failure = FailureRecord(run=keys.run, round=round_index, edge_id=edge_id, reason=reason)
        offer_record(coordinator.store, keys.evaluation_failure(round_index, edge_id), failure)


def _silent_edges(
    coordinator: Coordinator,
    edges: Sequence[RemoteEdge],
    plan: FederationPlan,
    folders: tuple[str, str],
    spent_seconds: float,
) -> dict[str, str]:
    """Wait for a record of each planned edge in one of two folders; why the others have none."""
    asked = [edge for edge in edges if edge.edge_id in plan.edges]
    limits = coordinator.config.remote

    def answered() -> list[str]:
        return [edge_id for folder in folders for edge_id in recorded_edges(coordinator.store, folder)]

    return _await(asked, answered, plan.round_seconds + limits.grace_seconds - spent_seconds, limits)


def _await(
    edges: Sequence[RemoteEdge], answered: Callable[[], Collection[str]], limit_seconds: float, limits: RemoteSpec
) -> dict[str, str]:
    """Wait for answers, and return why each edge without one has none."""
    deadline = time.monotonic() + limit_seconds
    while True:
        late, present = time.monotonic() > deadline, answered()
        absent = {edge.edge_id: edge.trouble(late) for edge in edges if edge.edge_id not in present}
        if late or all(absent.values()):
            return {
                edge_id: reason or f"late: no answer in {limit_seconds:.0f} s" for edge_id, reason in absent.items()
            }
        time.sleep(random.uniform(0.5, 1.0) * limits.poll_seconds)
