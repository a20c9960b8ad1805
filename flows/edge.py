"""One edge on a machine of its own: a single warm flow run that serves all rounds of a federation."""

from prefect import flow, runtime
from prefect.client.schemas.objects import State
from prefect.states import Cancelled, Completed, Crashed

from fedpipe_core.edge_config import find_edge_config
from fedpipe_core.errors import ConfigError
from fedpipe_core.startup import quick_imports
from tasks.flow_runs import EARLY

RETRIES = 1


@flow(name="serve_edge", flow_run_name="{edge_id} serves {run}", retries=RETRIES, retry_delay_seconds=10)
def serve_edge(run: str, store: str, edge_id: str) -> State[None]:
    """Profile this machine's edge once, then judge and train every round of a run; the coordinator starts this flow.

    Args:
        run: Name of the run.
        store: Object store that holds the run: an absolute folder or s3://bucket/prefix.
        edge_id: Name of the edge, which must be that of this machine's edge.yaml.
    """
    own = find_edge_config()
    if own.edge_id != edge_id:
        raise ConfigError(
            f"edge {edge_id} was asked for, and this machine's edge.yaml is for {own.edge_id}; correct work_pool and "
            "work_queue in the federation's config, or edge_id in edge.yaml"
        )
    with quick_imports():  # of torch; whoever only looks this flow up, a worker or `prefect deploy`, needs none of it
        from tasks import edge, edge_judging, served_edge
    try:
        session, record = served_edge.open_session(own, run, store, early=EARLY in runtime.flow_run.tags)
    except served_edge.NotOpenedError as waited:
        return Crashed(message=str(waited))  # which a coordinator that came late after all answers with a new start
    try:
        retried = runtime.flow_run.run_count <= RETRIES
        with served_edge.ServedEdge(session, str(runtime.flow_run.id), retried) as served:
            served_edge.load_base(session, record)
            edge.profile(session, session.shape)
            served.await_plan()
            served_edge.keep_planned_base(session)
            while round_index := served.next_round():
                if served.judges:
                    edge_judging.judge(session, round_index)
                else:
                    edge.train_round(session, round_index)
    except edge.StoppedError as stopped:
        return Cancelled(message=str(stopped))
    return Completed(message=f"{edge_id} served every round of {run}")
