"""Prefect's API as a child of the command: it answers, ends with the command, and a wrong address is told."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from commands import FinishedRun, running, wait_until
from prefect.settings import PREFECT_API_URL, temporary_settings

from fedpipe_core.errors import OrchestratorError
from flows import local_api

PATIENCE_SECONDS = 240
START = """
from flows.local_api import is_local, start_api
wait = start_api()
assert is_local()
wait()
from prefect.client.orchestration import get_client
with get_client(sync_client=True) as client:
    print(client.api_url, flush=True)
input()
"""


def alone(environment: dict[str, str], home: Path) -> dict[str, str]:
    """The environment without a server, with a Prefect of its own."""
    without = {name: value for name, value in environment.items() if name != "PREFECT_API_URL"}
    return {**without, "PREFECT_HOME": str(home)}


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.mark.slow
def test_local_api_answers_and_ends_with_its_parent_however_that_ends(
    environment: dict[str, str], tmp_path: Path
) -> None:
    command = [sys.executable, "-c", START]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=alone(environment, tmp_path), **pipes) as parent:  # type: ignore[call-overload]
        url = parent.stdout.readline().strip().rstrip("/")
        assert answers(url)
        parent.kill()
    deadline = time.monotonic() + 30
    while answers(url) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not answers(url)


@pytest.mark.slow
def test_command_interrupted_while_it_starts_ends_at_once(
    finished: FinishedRun, environment: dict[str, str], tmp_path: Path
) -> None:
    config, store = finished.folder / "federation.yaml", tmp_path / "store"
    arguments = ("run", config, "--run", "early", "--set", f"store={store}")
    home = tmp_path / "prefect"
    with running(alone(environment, home), tmp_path, *arguments) as process:
        wait_until(home.exists, "its Prefect folder", PATIENCE_SECONDS, process)  # the command makes it first
        time.sleep(1)  # the libraries are being imported
        os.killpg(process.pid, signal.SIGINT)
        interrupted = time.monotonic()
        process.wait(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130
    assert time.monotonic() - interrupted < 15
    assert (tmp_path / "stderr").read_text().startswith("fedpipe: interrupted")
    assert not store.exists()


def test_configured_server_that_answers_is_used(prefect_api: str) -> None:
    local_api.start_api()()
    assert not local_api.is_local()


def test_configured_server_that_does_not_answer_is_told() -> None:
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        wait = local_api.start_api()
        with pytest.raises(OrchestratorError, match=r"Prefect at http://127.0.0.1:9/api does not answer"):
            wait()
