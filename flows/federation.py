"""The whole pipeline as one flow: profile every edge, plan, train round after round, aggregate, judge, release.

What it runs is `flows.pipeline`'s, which is imported after the edges were called: it loads torch.
"""

import time
from datetime import datetime

from prefect import flow, runtime

from fedpipe_core.config import FederationConfig
from fedpipe_core.plan_schemas import SavedPlan
from fedpipe_core.result_schemas import RunResult
from fedpipe_core.startup import quick_imports
from flows.deployed import require_lasting_places
from tasks import progress
from tasks.early_edges import called_early
from tasks.records import RunKeys
from tasks.storage import open_store


def new_run_name(config: FederationConfig) -> str:
    """Name of a run that was given none: the federation's and the time."""
    return f"{config.name}-{datetime.now():%Y%m%d-%H%M%S}"


def _title() -> str:
    """Name of the flow run in Prefect's UI: the run's, or the federation's when the run was given none."""
    parameters = runtime.flow_run.parameters
    return parameters["run"] or str(parameters["config"].name)


@flow(name="federated_finetune", flow_run_name=_title)
def federated_finetune(
    config: FederationConfig,
    run: str | None = None,
    resume: bool = False,
    saved_plan: SavedPlan | None = None,
    release: bool = True,
) -> RunResult:
    """Tune one model on the data of all edges and release it.

    Args:
        config: What to tune, on whose data, and how.
        run: Name of the run; made from the federation's name and the time when left out.
        resume: Continue the run of that name; nothing whose record is in the store is computed again.
        saved_plan: A plan made before by `fedpipe plan --save`, in place of profiling and planning.
        release: Export, register and perhaps promote the model.
    """
    require_lasting_places(config)
    started, store, keys = time.perf_counter(), open_store(config.store), RunKeys(run or new_run_name(config))
    progress.note(f"run {keys.run} in {store.root}")
    with called_early(() if resume else config.remote_edges, store, keys):
        with quick_imports():
            from flows import pipeline
        loaded = pipeline.load_run(config, store, keys, release)
        done = pipeline.open_run(loaded, resume)
    return done or pipeline.finish_run(loaded, saved_plan, release, started)
