"""The tiny federation with edges on machines of their own: a Prefect server, a worker and an edge.yaml per edge."""

import shlex
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml
from prefect_processes import call, prefect_server, running
from tiny_federation import EDGES, RESOURCES

from fedpipe_core.signatures import new_key, save_key

ROOT = Path(__file__).parents[2]
POOL = "edges"
SET_UP = (
    "work-pool create fedpipe --type process",
    f"work-pool create {POOL} --type process",
    "--no-prompt deploy --all",
)
START_WORKER = "worker start --pool fedpipe"


@contextmanager
def deployed_server(home: Path) -> Iterator[dict[str, str]]:
    """A Prefect server on which everything in `prefect.yaml` is deployed; the environment in which it is found."""
    with prefect_server(home) as environment:
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


@contextmanager
def edge_worker(environment: dict[str, str], config: Path, edge_id: str) -> Iterator[Path]:
    """Run a worker for one edge, as at the edge; the value is its log."""
    arguments = ["worker", "start", "--pool", POOL, "--work-queue", edge_id, "--name", edge_id]
    with running(arguments, environment | {"FEDPIPE_EDGE_CONFIG": str(config)}, config.parent / "worker.log") as log:
        yield log


@contextmanager
def edge_workers(
    environment: dict[str, str], folder: Path, edges: Sequence[str], keys: Keys
) -> Iterator[dict[str, Path]]:
    """Workers for several edges, whose rows lie in `folder` under their names; their logs by edge."""
    with ExitStack() as stack:
        logs = {}
        for edge_id in edges:
            secrets = {"key": str(keys.path(edge_id)), "coordinator_key": keys.public["coordinator"]}
            config = write_edge_config(folder / "edges", edge_id, folder / f"{edge_id}.jsonl", **secrets)
            logs[edge_id] = stack.enter_context(edge_worker(environment, config, edge_id))
        yield logs
