"""Edges that are called before the coordinator has loaded anything, so that both load libraries at the same time.

An edge that was called early waits for the run's record, which its coordinator writes when it found no fault in config
and data. Until then neither leaves a trace in the store; where there is a fault, the edges are let go.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from uuid import uuid4

from fedpipe_core.config import EdgeSpec
from tasks import progress
from tasks.flow_runs import cancel_flow_run, edge_job, start_flow_run, unfinished_flow_run
from tasks.keys import is_key
from tasks.records import RunKeys
from tasks.storage import ObjectStore


@contextmanager
def called_early(edges: Sequence[EdgeSpec], store: ObjectStore, keys: RunKeys) -> Iterator[None]:
    """Have the flow runs of a new run's edges start while the block loads and checks; cancel them when it fails.

    Edges of a run whose record is in the store are not called, as they would take it up before anything was checked.
    Raises ConfigError or OrchestratorError when an edge cannot be called.
    """
    called: list[str] = []
    try:
        if edges and is_key(keys.federation) and not store.exists(keys.federation):
            with progress.working("coordinator", f"call {len(edges)} edges"):
                for edge in edges:
                    called.append(_call(edge, store, keys))
        yield
    except BaseException:
        for flow_run_id in called:
            cancel_flow_run(flow_run_id)
        raise


def _call(edge: EdgeSpec, store: ObjectStore, keys: RunKeys) -> str:
    """Id of the edge's flow run: a new one, unless a coordinator that died at this point had called it."""
    job = edge_job(store, keys.run, edge)
    return unfinished_flow_run(job) or start_flow_run(job, uuid4().hex, early=True)
