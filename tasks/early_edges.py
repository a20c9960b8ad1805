"""Edges that are called before the coordinator has loaded anything, so that both load libraries at the same time.

An edge that was called early waits for the run's record, which its coordinator writes when it found no fault in config
and data. Until then neither leaves a trace in the store; where there is a fault, the edges are let go.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import copy_context
from uuid import uuid4

from fedpipe_core.config import EdgeSpec
from tasks import progress
from tasks.flow_runs import EdgeJob, cancel_flow_run, edge_job, start_flow_run, unfinished_flow_run
from tasks.keys import is_key
from tasks.records import RunKeys
from tasks.storage import ObjectStore


@contextmanager
def called_early(edges: Sequence[EdgeSpec], store: ObjectStore, keys: RunKeys) -> Iterator[Future[None]]:
    """Have the flow runs of a new run's edges start while the block loads and checks; cancel them when it fails.

    Edges of a run whose record is in the store are not called, as they would take it up before anything was checked.
    Yields the calls, made in a thread of their own; they end in ConfigError or OrchestratorError when one fails.
    """
    is_new = bool(edges) and is_key(keys.federation) and not store.exists(keys.federation)
    jobs = [edge_job(store, keys.run, edge) for edge in edges] if is_new else []
    called: list[str] = []
    with ThreadPoolExecutor(1, "call edges") as caller:
        calls = caller.submit(copy_context().run, _call, jobs, called)  # which holds the flow run that Prefect links
        try:
            yield calls
        except BaseException:
            wait([calls])
            for flow_run_id in called:
                cancel_flow_run(flow_run_id)
            raise


def _call(jobs: Sequence[EdgeJob], called: list[str]) -> None:
    """Start each edge's flow run, unless a coordinator that died at this point had done so."""
    if jobs:
        with progress.working("coordinator", f"call {len(jobs)} edges"):
            for job in jobs:
                called.append(unfinished_flow_run(job) or start_flow_run(job, uuid4().hex, early=True))
