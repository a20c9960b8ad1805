"""The place of a run that died with its worker is given back, and the run that waits for it starts: a real server.

The automations are those of `infra/automations`, with shorter limits; heartbeats come as often as `prefect.yaml` says.
"""

import re
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
import yaml
from prefect_processes import ask, call, prefect_server, running, wait_for
from remote_federation import START_WORKER, deployed_server
from tiny_federation import write_federation

from flows.deployed import read_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

T = TypeVar("T")
ROOT = Path(__file__).parent.parent
AUTOMATIONS = ROOT / "infra" / "automations" / "free-places-of-dead-runs.yaml"
PAGE = (ROOT / "docs" / "remote.md").read_text(encoding="utf-8")
DEPLOYMENT = "/deployments/name/federated_finetune/intents"
LIMITS_SECONDS = {"fedpipe-crash-without-heartbeat": 45, "fedpipe-crash-before-start": 45}
PATIENCE_SECONDS = 150
LEASE_SECONDS = 300  # Prefect's, of a place held by a run that lives


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A server with the deployments of `prefect.yaml` and the automations, which act sooner than as shipped."""
    folder = tmp_path_factory.mktemp("server")
    document = yaml.safe_load(AUTOMATIONS.read_text(encoding="utf-8"))
    for automation in document["automations"]:
        automation["trigger"]["within"] = LIMITS_SECONDS[automation["name"]]
    path = folder / "automations.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    with deployed_server(folder) as environment:
        call(["automation", "create", "--from-file", str(path)], environment, folder)
        yield environment


@pytest.fixture(scope="module")
def api(server: dict[str, str]) -> Iterator[httpx.Client]:
    """The server's API."""
    with client_of(server) as client:
        yield client


def client_of(environment: dict[str, str]) -> httpx.Client:
    return httpx.Client(base_url=environment["PREFECT_API_URL"], timeout=30)


def config(folder: Path, rounds: int) -> dict[str, Any]:
    found: dict[str, Any] = read_config(str(write_federation(folder, rounds=rounds)))["config"]
    return found


def start(api: httpx.Client, parameters: dict[str, Any], state: str = "SCHEDULED") -> str:
    """Start a flow run as the UI does, and return its address."""
    body = {"parameters": {"release": False} | parameters, "state": {"type": state}}
    deployment = ask(api, "GET", DEPLOYMENT).raise_for_status().json()["id"]
    created = ask(api, "POST", f"/deployments/{deployment}/create_flow_run", body).raise_for_status()
    return f"/flow_runs/{created.json()['id']}"


def state_of(api: httpx.Client, flow_run: str) -> dict[str, Any]:
    found: dict[str, Any] = ask(api, "GET", flow_run).raise_for_status().json()["state"]
    return found


def places_taken(api: httpx.Client) -> int:
    return int(ask(api, "GET", DEPLOYMENT).raise_for_status().json()["global_concurrency_limit"]["active_slots"])


def test_place_of_a_run_that_died_with_its_worker_goes_to_the_run_that_waits(
    api: httpx.Client, server: dict[str, str], tmp_path: Path
) -> None:
    log = tmp_path / "worker.log"

    def until(found: Callable[[], T | None], what: str) -> T:
        return wait_for(found, PATIENCE_SECONDS, what, log)

    with running(shlex.split(START_WORKER), server, log):
        dying = start(api, {"config": config(tmp_path / "dying", rounds=1000), "run": "dying"})
        until((tmp_path / "dying/out/store/dying/rounds/0001/round.json").exists, "the first round")
        waiting = start(api, {"config": config(tmp_path / "waiting", rounds=1), "run": "waiting"})
        until(lambda: state_of(api, waiting)["name"] == "AwaitingConcurrencySlot", "the second run to wait")
    killed = time.monotonic()  # worker and flow run got SIGKILL
    assert (state_of(api, dying)["type"], places_taken(api)) == ("RUNNING", 1)
    with running(shlex.split(START_WORKER), server, log):
        until(lambda: state_of(api, dying)["type"] == "CRASHED", "the dead run's end")
        taken_seconds = time.monotonic() - killed
        until(lambda: state_of(api, waiting)["type"] == "RUNNING", "the second run's start")
        assert places_taken(api) == 1
        until(lambda: state_of(api, waiting)["type"] == "COMPLETED", "the second run's end")
    assert places_taken(api) == 0
    assert taken_seconds < LEASE_SECONDS
    assert "no heartbeat" in state_of(api, dying)["message"]


def test_place_of_a_run_that_a_worker_took_and_lost_is_given_back(
    api: httpx.Client, server: dict[str, str], tmp_path: Path
) -> None:
    lost = start(api, {"config": config(tmp_path / "lost", rounds=1), "run": "lost"})
    ask(api, "POST", f"{lost}/set_state", {"state": {"type": "PENDING"}}).raise_for_status()  # as a worker does
    assert (state_of(api, lost)["type"], places_taken(api)) == ("PENDING", 1)
    wait_for(lambda: state_of(api, lost)["type"] == "CRASHED", PATIENCE_SECONDS, "its end", AUTOMATIONS)
    assert places_taken(api) == 0
    assert "no process served it" in state_of(api, lost)["message"]


def test_place_is_given_back_though_the_server_was_started_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (setting,) = re.findall(r"^export (PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE)=(\S+)$", PAGE, flags=re.MULTILINE)
    monkeypatch.setenv(*setting)
    home, folder = tmp_path / "home", tmp_path / "lost"
    with deployed_server(home, on_sqlite=True) as environment, client_of(environment) as api:
        lost = start(api, {"config": config(folder, rounds=1), "run": "lost"})
        ask(api, "POST", f"{lost}/set_state", {"state": {"type": "PENDING"}}).raise_for_status()
        assert places_taken(api) == 1
    with prefect_server(home, on_sqlite=True) as environment, client_of(environment) as api:
        wait_for(lambda: places_taken(api) == 0, PATIENCE_SECONDS, "the place", home / "server.log")


def test_automations_act_before_prefect_gives_a_place_back_and_after_heartbeats_were_missed() -> None:
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]
    (heartbeat,) = {
        int(found["work_pool"]["job_variables"]["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"]) for found in deployments
    }
    automations = yaml.safe_load(AUTOMATIONS.read_text(encoding="utf-8"))["automations"]
    limits = [automation["trigger"]["within"] for automation in automations]
    assert all(2 * heartbeat < limit < LEASE_SECONDS for limit in limits)
