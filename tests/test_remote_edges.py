"""Edges on machines of their own: a Prefect server, workers and the command, all in processes of their own."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Outcome, command_line
from remote_federation import deployed_server, edge_workers, edges_of
from tiny_federation import EDGES, write_config, write_federation

pytestmark = pytest.mark.slow

REMOTE = ("east", "west")
RUN_SECONDS = 300
FAST = {"remote.poll_seconds": 0.1, "remote.lease_seconds": 8}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A Prefect server with the deployments of prefect.yaml, and one MLflow database for all runs."""
    folder = tmp_path_factory.mktemp("server")
    with deployed_server(folder) as environment:
        yield environment | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny federation two of whose edges have machines of their own."""
    folder = tmp_path_factory.mktemp("federation")
    write_federation(folder)
    return folder


@pytest.fixture(scope="module")
def workers(server: dict[str, str], federation: Path) -> Iterator[dict[str, Path]]:
    """A worker for each of those edges."""
    with edge_workers(server, federation, REMOTE) as logs:
        yield logs


def run_command(environment: dict[str, str], folder: Path, *arguments: object) -> Outcome:
    """Run the command to its end."""
    command = command_line("run", folder / "federation.yaml", *arguments, "--no-release", "--json")
    done = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=RUN_SECONDS, check=False
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def undisturbed(server: dict[str, str], federation: Path) -> Outcome:
    """The same federation with all edges in one process."""
    write_config(federation, edges=edges_of(()), **FAST)
    outcome = run_command(server, federation, "--run", "local")
    assert outcome.exit_code == 0, outcome.stderr
    return outcome


def test_edges_on_machines_of_their_own_end_in_the_same_bytes(
    server: dict[str, str], federation: Path, workers: dict[str, Path], undisturbed: Outcome
) -> None:
    write_config(federation, edges=edges_of(REMOTE), **FAST)
    outcome = run_command(server, federation, "--run", "remote")
    logs = "\n".join(log.read_text()[-3000:] for log in workers.values())
    assert outcome.exit_code == 0, outcome.stderr + logs
    assert outcome.document["adapter_sha256"] == undisturbed.document["adapter_sha256"]
    assert [entry["participants"] for entry in outcome.document["rounds"]] == [list(EDGES)] * 2
    print(outcome.stderr)
