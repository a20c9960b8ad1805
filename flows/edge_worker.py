"""An edge's worker: Prefect's own, on the queue of this machine's edge, as soon as Prefect's server answers.

A machine starts its services in any order. `prefect worker start` ends where no server answers yet; this one has
imported what it needs by the time there is one.
"""

import os
import runpy
import sys
import time
from pathlib import Path

from fedpipe_core.edge_config import EDGE_CONFIG_VARIABLE, load_edge_config
from fedpipe_core.errors import ConfigError
from fedpipe_core.startup import quick_imports

PAUSE_SECONDS = 0.2


def run_worker(config: Path, pool: str) -> None:
    """Serve the queue of this machine's edge in the main thread, until a signal ends it.

    Raises ConfigError when `edge.yaml` cannot be used, or nothing says where Prefect's server is.
    """
    edge_id = load_edge_config(config).edge_id
    with quick_imports():
        import prefect.cli
        import prefect.workers.process  # noqa: F401
        from prefect.settings import PREFECT_API_URL
    address = PREFECT_API_URL.value()
    if not address:
        raise ConfigError(f"{edge_id}: PREFECT_API_URL is not set; set it to http://HOST:4200/api of Prefect's server")
    os.environ[EDGE_CONFIG_VARIABLE] = str(config.absolute())
    _prefer_own_python()
    _await_api(edge_id, address)
    sys.argv = ["prefect", "worker", "start", "--pool", pool, "--work-queue", edge_id, "--name", edge_id]
    runpy.run_module("prefect", run_name="__main__", alter_sys=True)


def _prefer_own_python() -> None:
    """Have `python`, with which `prefect.yaml` starts an edge's flow run, be the one that runs this worker."""
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def _await_api(edge_id: str, address: str) -> None:
    """Wait for Prefect's server, however long it takes, and say what is wrong whenever that changes."""
    from prefect.client.orchestration import get_client

    told = ""
    with get_client(sync_client=True) as client:
        while error := client.api_healthcheck():
            reason = " ".join(str(error or type(error).__name__).split())[:200]
            if reason != told:
                print(f"{edge_id} waits for Prefect at {address}: {reason}", file=sys.stderr, flush=True)
            told = reason
            time.sleep(PAUSE_SECONDS)
