"""One run of the equal job by FedPipe: `fedpipe run` alone, and with its edges on workers of their own.

What is set up once on a machine is kept under `.fedpipe/benchmarks`, as the packages are: the databases of Prefect and
MLflow, and Prefect's deployments.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from peers.environment import CACHE, ROOT, environment
from peers.make_job import EDGE_IDS, ROUNDS
from peers.systems import Place, Seen, await_true, run_to_end, start

from fedpipe_core.schemas import UpdateRecord
from tasks.records import RunKeys, get_record
from tasks.storage import open_store

sys.path.append(str(ROOT / "tests" / "support"))
from postgres import postgres_programs
from prefect_processes import starting_server
from remote_federation import deployed_server, write_edge_config
from s3_servers import moto_server

POOL, BUCKET = "edges", "equal-job"
SECRETS = {"AWS_ACCESS_KEY_ID": "benchmark", "AWS_SECRET_ACCESS_KEY": "benchmark", "AWS_DEFAULT_REGION": "us-east-1"}
BIN = Path(sys.executable).parent
LOCAL_HOME, SERVER_HOME = CACHE / "prefect", CACHE / "prefect-server"
CLUSTER = SERVER_HOME / "postgres"  # of Prefect's server, where PostgreSQL is installed


def fedpipe_local(place: Place) -> Seen:
    """`fedpipe run` without a server: edges in its process, Prefect's API its child, SQLite for MLflow."""
    store = place.folder / "store"
    with _environment(place, PREFECT_HOME=str(LOCAL_HOME)) as variables:
        started = time.time()
        result = _run(place, variables, [f"store={store}"])
        return _seen(str(store), result, started, started, time.time())


def fedpipe_deployed(place: Place) -> Seen:
    """Prefect's server, an S3 server, a worker per edge, each a process, started at once; then `fedpipe run`."""
    with _environment(place, **SECRETS) as own:
        started = time.time()
        with starting_server(SERVER_HOME, cluster=CLUSTER) as found, moto_server() as address:
            os.environ["AWS_ENDPOINT_URL"] = address
            variables = {**own, **found, "AWS_ENDPOINT_URL": address}
            for edge_id in EDGE_IDS:
                _start_worker(place, variables, edge_id)
            _make_bucket(address)
            await_true(lambda: all(_waits(place, edge_id) for edge_id in EDGE_IDS), "the workers")
            ready = time.time()
            edges = [edge | {"work_pool": POOL} for edge in _edges(place)]
            options = [f"store=s3://{BUCKET}", f"edges={json.dumps(edges)}", "signing.mode=off"]
            result = _run(place, variables, [*options, "remote.poll_seconds=0.1"])
            return _seen(f"s3://{BUCKET}", result, started, ready, time.time())


def set_up(job: Path) -> None:
    """Make the databases and deploy the flows, unless that was done."""
    deployed = SERVER_HOME / "deployed"  # written last: a database alone may be that of a set-up that was cut off
    wanted = f"{postgres_programs()}\n{(ROOT / 'prefect.yaml').read_text()}"
    if not deployed.exists() or deployed.read_text() != wanted:
        shutil.rmtree(SERVER_HOME, ignore_errors=True)
        with deployed_server(SERVER_HOME, cluster=CLUSTER):
            pass
        deployed.write_text(wanted)
    if not (CACHE / "mlflow.db").exists():
        folder = CACHE / "first-run"
        folder.mkdir(exist_ok=True)
        with _environment(Place(folder, job, None), PREFECT_HOME=str(LOCAL_HOME)) as variables:  # type: ignore[arg-type]
            short = [f"store={folder / 'store'}", "rounds=1", "training.examples_per_round=8"]
            _run(Place(folder, job, None), variables, short)  # type: ignore[arg-type]


@contextmanager
def _environment(place: Place, **more: str) -> Iterator[dict[str, str]]:
    """Variables of every process of the run, in this process too, whose helpers hand them on."""
    before = dict(os.environ)
    uri = f"sqlite:///{CACHE / 'mlflow.db'}"
    found = environment(place.folder, place.job, MLFLOW_TRACKING_URI=uri, PREFECT_WORKER_QUERY_SECONDS="1", **more)
    found["PATH"] = f"{BIN}{os.pathsep}{found['PATH']}"
    os.environ.update(found)
    try:
        yield found
    finally:
        os.environ.clear()
        os.environ.update(before)


def _run(place: Place, variables: Mapping[str, str], changes: Sequence[str]) -> dict[str, Any]:
    name = f"equal-{time.time_ns()}"  # a server that was killed still knows the flow runs of the last one
    options = [word for change in changes for word in ("--set", change)]
    command = ["fedpipe", "run", place.job / "federation.yaml", "--run", name, "--no-release", "--json", *options]
    result: dict[str, Any] = json.loads(run_to_end(command, variables, place.folder))
    return result


def _seen(store: str, result: Mapping[str, Any], started: float, ready: float, done: float) -> Seen:
    opened, keys = open_store(store), RunKeys(result["run"])
    trained = {}
    for index in range(1, ROUNDS + 1):
        updates = [get_record(opened, keys.update_record(index, edge_id), UpdateRecord) for edge_id in EDGE_IDS]
        trained[index] = [(u.started_at + u.round_seconds, u.train_seconds) for u in updates if u is not None]
    return Seen(started, ready, done, result["metrics"]["loss"], trained)


def _edges(place: Place) -> list[dict[str, Any]]:
    edges: list[dict[str, Any]] = yaml.safe_load((place.job / "federation.yaml").read_text())["edges"]
    return edges


def _start_worker(place: Place, variables: Mapping[str, str], edge_id: str) -> None:
    config = write_edge_config(place.folder / "edges", edge_id, place.job / f"{edge_id}.jsonl")
    start(["fedpipe", "edge", "worker", config, "--pool", POOL], variables, config.with_name("worker.log"))


def _waits(place: Place, edge_id: str) -> bool:
    return "started!" in (place.folder / "edges" / edge_id / "worker.log").read_text()


def _make_bucket(address: str) -> None:
    import boto3

    boto3.client("s3", endpoint_url=address).create_bucket(Bucket=BUCKET)
