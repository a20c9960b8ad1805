"""The tiny federation with edges on machines of their own: a Prefect server, a worker and an edge.yaml per edge."""

import shlex
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml
from prefect_processes import call, prefect_server, running
from tiny_federation import EDGES, RESOURCES

from fedpipe_core.signatures import new_key, save_key

ROOT = Path(__file__).parents[2]
POOL = "edges"
REMOTE = ("east", "west")
SET_UP = (
    "work-pool create fedpipe --type process",
    f"work-pool create {POOL} --type process",
    "--no-prompt deploy --all",
)
START_WORKER = "worker start --pool fedpipe"


@contextmanager
def deployed_server(home: Path, on_sqlite: bool = False, cluster: Path | None = None) -> Iterator[dict[str, str]]:
    """A Prefect server on which everything in `prefect.yaml` is deployed; the environment in which it is found."""
    with prefect_server(home, on_sqlite, cluster) as environment:
        for command in SET_UP:
            call(shlex.split(command), environment, ROOT)
        yield environment


class Keys:
    """Private keys of the coordinator and of every edge, in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.public = {name: self._make(name) for name in ("coordinator", *EDGES)}

    def path(self, name: str) -> Path:
        """File of a private key."""
        return self.folder / f"{name}.pem"

    def _make(self, name: str) -> str:
        key = new_key()
        save_key(key, self.path(name))
        return key.public


def federation_keys(remote: Sequence[str], keys: Keys) -> dict[str, Any]:
    """Changes to the tiny federation's config: the edges named are on machines of their own, and sign."""
    edges = [
        {"edge_id": edge_id, "resources": dict(RESOURCES)}
        | ({"work_pool": POOL, "public_key": keys.public[edge_id]} if edge_id in remote else {})
        for edge_id in EDGES
    ]
    return {"edges": edges, "signing": {"mode": "required", "coordinator_key": keys.public["coordinator"]}}


def write_edge_config(folder: Path, edge_id: str, rows: Path, **changes: Any) -> Path:
    """Write the edge.yaml of one edge into a folder of its own."""
    path = folder / edge_id / "edge.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"edge_id": edge_id, "data": {"train": str(rows)}, "device": "cpu", "threads": 1, **changes}
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


class EdgeSite:
    """One edge's machine: its edge.yaml, its worker, and the process in which the worker has the edge served."""

    def __init__(self, environment: dict[str, str], config: Path, edge_id: str):
        self.environment, self.config, self.edge_id = environment, config, edge_id
        self._worker = ExitStack()

    def start_worker(self) -> None:
        """Start a worker on the edge's queue, as a service manager would."""
        arguments = ["edge", "worker", str(self.config), "--pool", POOL]
        environment = self.environment | {"FEDPIPE_EDGE_CONFIG": str(self.config)}  # by which its processes are found
        self._worker.enter_context(running(arguments, environment, self.log, module="flows"))

    @property
    def log(self) -> Path:
        """The worker's log, with what the edge's process prints."""
        return self.config.parent / "worker.log"

    def served(self) -> list[psutil.Process]:
        """The processes that serve the edge: one at most, unless the worker of one was killed."""
        return [process for process in self._processes() if "worker" not in process.cmdline()]

    def kill_edge(self) -> bool:
        """SIGKILL the process that serves the edge; whether there was one."""
        served = self.served()
        for process in served:
            process.kill()
        return bool(served)

    def kill_worker(self) -> None:
        """SIGKILL the worker alone; an edge that it started goes on, one that it was about to start is lost."""
        for process in self._processes():
            if "worker" in process.cmdline():
                process.kill()
        self._worker.close()

    def close(self) -> None:
        """Kill everything at the edge."""
        self._worker.close()
        self.kill_edge()

    def _processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("FEDPIPE_EDGE_CONFIG") == str(self.config):
                    found.append(process)
        return found


@contextmanager
def edge_sites(
    environment: dict[str, str], folder: Path, edges: Sequence[str], keys: Keys
) -> Iterator[dict[str, EdgeSite]]:
    """Several edges with a worker each, whose rows lie in `folder` under their names."""
    sites = {}
    with ExitStack() as stack:
        for edge_id in edges:
            secrets = {"key": str(keys.path(edge_id)), "coordinator_key": keys.public["coordinator"]}
            config = write_edge_config(folder / "edges", edge_id, folder / f"{edge_id}.jsonl", **secrets)
            _make_queue(environment, edge_id)
            sites[edge_id] = EdgeSite(environment, config, edge_id)
            stack.callback(sites[edge_id].close)
            sites[edge_id].start_worker()
        yield sites


def _make_queue(environment: dict[str, str], edge_id: str) -> None:
    """Make an edge's queue with one place, unless it is there: a dead process that kept it would keep others out."""
    queues = f"{environment['PREFECT_API_URL']}/work_pools/{POOL}/queues"
    answer = httpx.post(queues, json={"name": edge_id, "concurrency_limit": 1}, timeout=60)
    assert answer.status_code in (HTTPStatus.CREATED, HTTPStatus.CONFLICT), answer.text
