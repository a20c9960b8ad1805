"""Flow runs of edges at the Prefect API: started on their work pool, found again, and ended."""

from dataclasses import dataclass
from pathlib import Path
from typing import cast
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType, FlowRunFilterTags
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelling, Crashed

from fedpipe_core.config import EdgeSpec
from fedpipe_core.errors import ConfigError, OrchestratorError
from tasks.storage import ObjectStore

FLOW = "serve_edge"
EARLY = "fedpipe-early"  # tag of a flow run that is to wait until its run is in the store
_UNFINISHED = [StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING]


@dataclass(frozen=True)
class EdgeJob:
    """What an edge is asked to serve."""

    run: str
    store: str
    edge: EdgeSpec

    @property
    def queue(self) -> str:
        """Queue of the pool at which the edge's worker looks."""
        return self.edge.work_queue or self.edge.edge_id

    @property
    def tags(self) -> list[str]:
        """Tags by which the edge's flow runs are found."""
        return [f"fedpipe-run:{self.run}", f"fedpipe-edge:{self.edge.edge_id}"]


def edge_job(store: ObjectStore, run: str, edge: EdgeSpec) -> EdgeJob:
    """What an edge is asked to serve, with the store's address as it is found from any folder."""
    return EdgeJob(run, store.root if "://" in store.root else str(Path(store.root).absolute()), edge)


def start_flow_run(job: EdgeJob, attempt: str, early: bool = False) -> str:
    """Start the edge's flow on its pool and queue, and return the flow run's id; the same attempt starts it once.

    With `early` the edge waits for the run's record. Raises ConfigError when the pool has no deployment of the flow,
    OrchestratorError when Prefect's API fails.
    """
    name = f"{FLOW}/{job.edge.work_pool}"
    parameters = {"run": job.run, "store": job.store, "edge_id": job.edge.edge_id}
    try:
        flow_run = run_deployment(  # outside of async code it returns the run itself
            name,
            parameters=parameters,
            timeout=0,
            flow_run_name=f"{job.edge.edge_id} serves {job.run}",
            idempotency_key=f"{job.run}/{job.edge.edge_id}/{attempt}",
            work_queue_name=job.queue,
            tags=[*job.tags, EARLY] if early else job.tags,
        )
        return str(cast(FlowRun, flow_run).id)
    except ObjectNotFound:
        raise ConfigError(
            f"edge {job.edge.edge_id}: Prefect has no deployment {name}, which work_pool {job.edge.work_pool!r} needs; "
            "add it to prefect.yaml and run `prefect deploy`, or correct the name of the pool"
        ) from None
    except Exception as error:
        raise _failed(job, "started", error) from error


def unfinished_flow_run(job: EdgeJob) -> str | None:
    """Id of the newest flow run of that edge and run that has not ended, such as one a dead coordinator started."""
    wanted = FlowRunFilter(
        tags=FlowRunFilterTags(all_=job.tags),
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=_UNFINISHED)),
    )
    try:
        with _client() as client:
            found = client.read_flow_runs(flow_run_filter=wanted)
    except Exception as error:
        raise _failed(job, "looked for", error) from error
    newest = max(found, key=lambda flow_run: flow_run.expected_start_time or flow_run.created, default=None)  # type: ignore[arg-type,return-value]
    return None if newest is None else str(newest.id)


@dataclass(frozen=True)
class FlowRunFate:
    """What became of a flow run: in words, whether a worker took it, and whether it ended or its process died."""

    description: str
    taken: bool = False
    ended: bool = False
    crashed: bool = False


def look_at_flow_run(flow_run_id: str) -> FlowRunFate:
    """What became of a flow run; where Prefect's API fails, what failed."""
    try:
        flow_run = _read(flow_run_id)
    except Exception as error:
        return FlowRunFate(f"flow run {flow_run_id} ({_short(error)})")
    state = flow_run.state
    if state is None:
        return FlowRunFate(f"flow run {flow_run.name!r} has no state")
    why = f" ({_short(Exception(state.message))})" if state.is_final() and state.message else ""
    description = f"flow run {flow_run.name!r} is {state.name}{why}"
    return FlowRunFate(description, not state.is_scheduled(), state.is_final(), state.is_crashed())


def cancel_flow_run(flow_run_id: str) -> None:
    """Ask Prefect to end a flow run; one that cannot be asked ends by its coordinator's silence."""
    _set_state(flow_run_id, cancelled=True)


def give_up_flow_run(flow_run_id: str, reason: str) -> None:
    """Mark a flow run whose process died unnoticed as crashed, so that it holds its pool's slot no longer."""
    _set_state(flow_run_id, cancelled=False, reason=reason)


def _set_state(flow_run_id: str, cancelled: bool, reason: str = "") -> None:
    try:
        flow_run = _read(flow_run_id)
        if flow_run.state is not None and flow_run.state.is_final():
            return
        state: State[None] = Cancelling() if cancelled else Crashed(message=reason)
        with _client() as client:
            client.set_flow_run_state(UUID(flow_run_id), state, force=not cancelled)
    except Exception:
        return  # Prefect shows a stale state until it answers again; what the edge does follows from the store alone


def _read(flow_run_id: str) -> FlowRun:
    with _client() as client:
        return client.read_flow_run(UUID(flow_run_id))


def _client() -> SyncPrefectClient:
    return get_client(sync_client=True)


def _failed(job: EdgeJob, verb: str, error: Exception) -> OrchestratorError:
    return OrchestratorError(
        f"edge {job.edge.edge_id}: its flow run could not be {verb} ({_short(error)}); look at the Prefect server, "
        "then continue with --resume"
    )


def _short(error: Exception) -> str:
    return " ".join(str(error or type(error).__name__).split())[:200]
