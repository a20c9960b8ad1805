"""A Prefect server and workers as processes of their own; every wait is bounded, and nothing outlives the test."""

import os
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TypeVar

import httpx
import psutil
from postgres import may_keep, postgres_programs, postgres_server

T = TypeVar("T")

START_SECONDS = 180  # a first start migrates an empty database; on a busy machine that takes a minute


@contextmanager
def prefect_server(home: Path, on_sqlite: bool = False, cluster: Path | None = None) -> Iterator[dict[str, str]]:
    """Run a server with a home of its own, on PostgreSQL where that is installed, and yield how Prefect finds it.

    What it records is gone with it, unless it is on SQLite, in its home, or on PostgreSQL with a `cluster`.
    """
    with starting_server(home, on_sqlite, cluster) as environment:
        address = environment["PREFECT_API_URL"]
        wait_for(lambda: _answers(f"{address}/health"), START_SECONDS, "Prefect's server", home / "server.log")
        yield environment


@contextmanager
def starting_server(home: Path, on_sqlite: bool = False, cluster: Path | None = None) -> Iterator[dict[str, str]]:
    """`prefect_server` without waiting until it answers."""
    address = f"http://127.0.0.1:{_free_port()}/api"
    left_out = ("MLFLOW_TRACKING_URI", "FEDPIPE_STORE")
    environment = {name: value for name, value in os.environ.items() if name not in left_out} | {
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": address,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "PREFECT_SERVER_CONCURRENCY_INITIAL_DEPLOYMENT_LEASE_DURATION": "30",  # the least
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    port = address.removesuffix("/api").rpartition(":")[2]
    command = ["server", "start", "--host", "127.0.0.1", "--port", port]
    with (
        nullcontext({}) if on_sqlite else _database(cluster) as database,
        running(command, environment | database, home / "server.log"),
    ):
        yield environment


@contextmanager
def _database(cluster: Path | None) -> Iterator[dict[str, str]]:
    """Where the server keeps its records: SQLite, its default, where no PostgreSQL is installed."""
    programs = postgres_programs() if cluster is None or may_keep(cluster) else None
    if programs is None:
        where = "is not installed" if cluster is None else f"is not installed, or may not enter {cluster.parent}"
        warnings.warn(f"PostgreSQL {where}, so Prefect's server runs on SQLite", stacklevel=2)
    with nullcontext() if programs is None else postgres_server(programs, cluster) as address:
        yield {"PREFECT_SERVER_DATABASE_CONNECTION_URL": address} if address else {}


@contextmanager
def running(arguments: list[str], environment: dict[str, str], log: Path, module: str = "prefect") -> Iterator[Path]:
    """Run a command of Prefect's, or of another module, in its log's folder until the block ends; yield the log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", module, *arguments]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, cwd=log.parent, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
        try:
            yield log
        finally:
            _kill_tree(process)


def call(arguments: list[str], environment: dict[str, str], folder: Path) -> str:
    """Run a command of Prefect's to its end and return what it printed; it must succeed."""
    command = [sys.executable, "-m", "prefect", *arguments]
    done = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=START_SECONDS, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def wait_for(found: Callable[[], T | None], seconds: float, what: str, log: Path) -> T:
    """The first thing found, asked twice a second; fails with the end of the log when there is none in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if result := found():
            return result
        time.sleep(0.5)
    raise AssertionError(f"waited {seconds} s for {what}; {log.name} ends with:\n{log.read_text()[-4000:]}")


def ask(api: httpx.Client, method: str, address: str, body: object = None) -> httpx.Response:
    """The server's answer; asked again while its database is busy."""
    for _ in range(20):
        answer = api.request(method, address, json=body)
        if not answer.is_server_error:
            break
        time.sleep(0.5)
    return answer


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).is_success
    except httpx.TransportError:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all it started, which have process groups of their own."""
    family = [*psutil.Process(process.pid).children(recursive=True), process] if process.poll() is None else []
    for member in family:
        member.kill()
    process.wait(timeout=30)
