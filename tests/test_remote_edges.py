"""Edges on machines of their own: a Prefect server, workers and the command, all in processes of their own."""

import json
import random
import re
import shlex
import signal
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import psutil
import pytest
from commands import RUN_SECONDS, Outcome, run_to_end, running, wait_for_object
from prefect_processes import ask, starting_server, wait_for
from prefect_processes import running as worker_running
from remote_federation import REMOTE, START_WORKER, EdgeSite, Keys, federation_keys, write_edge_config
from tiny_federation import EDGES, write_config, write_federation

from flows.deployed import read_config

pytestmark = pytest.mark.slow

ROUNDS = 4
CHANGES = {"rounds": ROUNDS, "remote.poll_seconds": 0.1, "remote.lease_seconds": 8}


def run_arguments(folder: Path, name: str, *more: object) -> tuple[object, ...]:
    return ("run", folder / "federation.yaml", "--run", name, "--no-release", "--json", *more)


def finish(environment: dict[str, str], folder: Path, name: str, *more: object) -> Outcome:
    """Run the command to its end."""
    return run_to_end(environment, folder, *run_arguments(folder, name, *more), seconds=RUN_SECONDS)


@pytest.fixture(scope="module")
def undisturbed(
    remote_environment: dict[str, str], federation: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What the same federation comes to with all edges in one process."""
    folder = tmp_path_factory.mktemp("local")
    write_federation(folder, **CHANGES)
    outcome = finish(remote_environment, folder, "local")
    assert outcome.exit_code == 0, outcome.stderr
    return outcome.document


def edge_processes(sites: dict[str, EdgeSite]) -> list[psutil.Process]:
    """The processes in which the edges are served, one for each."""
    found = [process for site in sites.values() for process in site.served()]
    assert len(found) == len(sites)
    return found


def task_names(environment: dict[str, str], flow_run: str) -> set[str]:
    """Names of the completed task runs of a flow run, as the UI shows them."""
    wanted = {"flow_runs": {"name": {"any_": [flow_run]}}, "task_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}}
    answer = httpx.post(f"{environment['PREFECT_API_URL']}/task_runs/filter", json=wanted, timeout=30)
    return {task_run["name"] for task_run in answer.raise_for_status().json()}


def records(run: Path) -> dict[str, tuple[int, bytes]]:
    """Every record of a run but the signs of life: when it was written, and what it says."""
    paths = [path for path in run.rglob("*.json") if path.relative_to(run).parts[0] != "leases"]
    return {path.relative_to(run).as_posix(): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def test_edges_on_machines_of_their_own_end_in_the_same_bytes(
    remote_environment: dict[str, str], federation: Path, sites: dict[str, EdgeSite], undisturbed: dict[str, Any]
) -> None:
    outcome = finish(remote_environment, federation, "whole")
    logs = "\n".join(site.log.read_text()[-3000:] for site in sites.values())
    assert outcome.exit_code == 0, outcome.stderr + logs
    assert outcome.document["adapter_sha256"] == undisturbed["adapter_sha256"]
    assert [entry["participants"] for entry in outcome.document["rounds"]] == [list(EDGES)] * ROUNDS
    for edge_id in REMOTE:
        expected = {f"profile {edge_id}", *(f"round {index + 1} train {edge_id}" for index in range(ROUNDS))}
        assert task_names(remote_environment, f"{edge_id} serves whole") == expected


def test_edges_on_machines_of_their_own_judge_where_the_coordinator_has_no_rows(
    remote_environment: dict[str, str], federation: Path, sites: dict[str, EdgeSite], undisturbed: dict[str, Any]
) -> None:
    without = [f"--set={change}" for change in ('data.test=""', "data.label_name_column=null")]
    store, last = federation / "out/store/judged", f"rounds/{ROUNDS + 1:04d}"
    with running(remote_environment, federation, *run_arguments(federation, "judged", *without)) as process:
        wait_for_object(store / last / "global.json", process)
        process.kill()
    seen = records(store)
    outcome = finish(remote_environment, federation, "judged", "--resume", *without)
    logs = "\n".join(site.log.read_text()[-3000:] for site in sites.values())
    assert outcome.exit_code == 0, outcome.stderr + logs
    assert outcome.document["adapter_sha256"] == undisturbed["adapter_sha256"]
    assert all(set(entry["evaluations"]) == set(EDGES) for entry in outcome.document["rounds"])
    assert outcome.document["metrics"]["loss"] < outcome.document["baseline_metrics"]["loss"]
    now = records(store)
    assert {key: now[key] for key in seen} == seen
    assert json.loads((store / last / "evaluations/east.json").read_bytes())["signature"]["place"].endswith("east.json")


def test_killed_coordinator_finds_its_edges_again_and_repeats_nothing(
    remote_environment: dict[str, str], federation: Path, sites: dict[str, EdgeSite], undisturbed: dict[str, Any]
) -> None:
    store = federation / "out/store/killed"
    with running(remote_environment, federation, *run_arguments(federation, "killed")) as process:
        wait_for_object(store / "rounds/0002/global.json", process)
        time.sleep(random.uniform(0, 1))
        process.kill()
    seen = records(store)
    outcome = finish(remote_environment, federation, "killed", "--resume")
    assert outcome.exit_code == 0, outcome.stderr
    assert outcome.document["adapter_sha256"] == undisturbed["adapter_sha256"]
    now = records(store)
    assert {key: now[key] for key in seen} == seen


def test_killed_edge_is_started_again_and_the_run_ends_in_the_same_bytes(
    remote_environment: dict[str, str], federation: Path, sites: dict[str, EdgeSite], undisturbed: dict[str, Any]
) -> None:
    store = federation / "out/store/maimed"
    with running(remote_environment, federation, *run_arguments(federation, "maimed")) as process:
        wait_for_object(store / "rounds/0002/updates/east.json", process)
        assert sites["east"].kill_edge()
        stdout, _ = process.communicate(timeout=RUN_SECONDS)
    assert process.returncode == 0, (federation / "stderr").read_text()
    outcome = Outcome(process.returncode, stdout, (federation / "stderr").read_text())
    assert outcome.document["adapter_sha256"] == undisturbed["adapter_sha256"]
    assert "east gave no sign of life for" in outcome.stderr


def test_interrupted_coordinator_stops_every_edge_within_30_seconds(
    remote_environment: dict[str, str], federation: Path, sites: dict[str, EdgeSite]
) -> None:
    store = federation / "out/store/stopped"
    with running(remote_environment, federation, *run_arguments(federation, "stopped")) as process:
        wait_for_object(store / "rounds/0001/updates/west.json", process)
        served = edge_processes(sites)
        interrupted = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=RUN_SECONDS)
    _, alive = psutil.wait_procs(served, timeout=30 - (time.monotonic() - interrupted))
    assert process.returncode == 130
    assert not alive


def test_edges_meet_their_coordinator_on_s3(
    remote_environment: dict[str, str],
    federation: Path,
    sites: dict[str, EdgeSite],
    undisturbed: dict[str, Any],
    s3_bucket: str,
) -> None:
    outcome = finish(remote_environment, federation, "cloud", "--set", f"store=s3://{s3_bucket}/{uuid4().hex}")
    assert outcome.exit_code == 0, outcome.stderr
    assert outcome.document["adapter_sha256"] == undisturbed["adapter_sha256"]


def test_fault_at_the_coordinator_leaves_neither_a_trace_nor_an_edge_at_work(
    remote_environment: dict[str, str], federation: Path, sites: dict[str, EdgeSite]
) -> None:
    before = sorted((federation / "out/store").rglob("*"))
    outcome = finish(remote_environment, federation, "faulty", "--set", "data.test=nowhere.jsonl")
    assert (outcome.exit_code, "nowhere.jsonl" in outcome.stderr) == (2, True)
    assert "call 2 edges" in outcome.stderr
    assert sorted((federation / "out/store").rglob("*")) == before
    deadline = time.monotonic() + 30
    while served := [process for site in sites.values() for process in site.served()]:
        assert time.monotonic() < deadline, f"{served} serve a run that did not come to be"
        time.sleep(0.1)


def test_worker_that_starts_before_its_server_waits_for_it(tmp_path: Path) -> None:
    config = write_edge_config(tmp_path, "early", tmp_path / "rows.jsonl")
    with starting_server(tmp_path / "server", on_sqlite=True) as environment:
        command = ["edge", "worker", str(config), "--pool", "new"]
        with worker_running(command, environment, tmp_path / "worker.log", module="flows") as log:
            wait_for(lambda: "Worker 'early' started!" in log.read_text() or None, RUN_SECONDS, "the worker", log)
    said = log.read_text()
    assert said.index("early waits for Prefect at http://127.0.0.1:") < said.index("Worker 'early' started!")


def start_as_the_ui_does(api: httpx.Client, federation: Path, name: str) -> str:
    """Create a flow run of the coordinator's deployment and return its address."""
    config = read_config(str(federation / "federation.yaml"))["config"]
    deployment = ask(api, "GET", "/deployments/name/federated_finetune/intents").raise_for_status().json()["id"]
    body = {"parameters": {"config": config, "run": name, "release": False}, "state": {"type": "SCHEDULED"}}
    created = ask(api, "POST", f"/deployments/{deployment}/create_flow_run", body).raise_for_status()
    return f"/flow_runs/{created.json()['id']}"


def test_run_cancelled_in_the_ui_stops_every_edge_within_30_seconds(
    remote_environment: dict[str, str], federation: Path, sites: dict[str, EdgeSite]
) -> None:
    with (
        worker_running(shlex.split(START_WORKER), remote_environment, federation / "coordinator.log"),
        httpx.Client(base_url=remote_environment["PREFECT_API_URL"], timeout=30) as api,
    ):
        flow_run = start_as_the_ui_does(api, federation, "cancelled")
        wait_for_object(federation / "out/store/cancelled/rounds/0001/updates/west.json")
        served = edge_processes(sites)
        ask(api, "POST", f"{flow_run}/set_state", {"state": {"type": "CANCELLING"}}).raise_for_status()
        _, alive = psutil.wait_procs(served, timeout=30)
    assert not alive


def test_edge_that_never_appears_is_named_and_the_quorum_goes_on(
    remote_environment: dict[str, str], federation: Path, sites: dict[str, EdgeSite], keys: Keys
) -> None:
    limits = {"rounds": 1, "remote.start_seconds": 40, "min_edges": 2}
    write_config(federation, **federation_keys(EDGES, keys), **CHANGES | limits)
    outcome = finish(remote_environment, federation, "without-north")
    write_config(federation, **federation_keys(REMOTE, keys), **CHANGES)
    assert outcome.exit_code == 0, outcome.stderr
    assert outcome.document["rounds"][0]["participants"] == ["east", "west"]
    assert "north is planned for when its profile comes: did not start within 40 s" in outcome.stderr


def test_too_few_edges_fail_the_run_by_name_and_it_can_be_resumed(
    remote_environment: dict[str, str], federation: Path, sites: dict[str, EdgeSite], undisturbed: dict[str, Any]
) -> None:
    west, strict = sites["west"], ("--set", "min_edges=3", "--set", "remote.restarts=0")
    store = federation / "out/store/few"
    with running(remote_environment, federation, *run_arguments(federation, "few", *strict)) as process:
        wait_for_object(store / "rounds/0002/updates/west.json", process)
        assert west.kill_edge()
        process.communicate(timeout=RUN_SECONDS)
    assert process.returncode == 1
    said = (federation / "stderr").read_text()
    assert re.search(
        r"round \d has 2 updates that count, min_edges is 3; west: .*; mend these edges and .*--resume", said
    )
    outcome = finish(remote_environment, federation, "few", "--resume", *strict)
    assert outcome.exit_code == 0, outcome.stderr
    assert outcome.document["adapter_sha256"] == undisturbed["adapter_sha256"]


def test_straggler_is_dropped_at_the_deadline_and_catches_up(
    remote_environment: dict[str, str], federation: Path, sites: dict[str, EdgeSite]
) -> None:
    store = federation / "out/store/slow"
    patient = ("--set", "remote.grace_seconds=4", "--set", "remote.lease_seconds=40")
    with running(remote_environment, federation, *run_arguments(federation, "slow", *patient)) as process:
        wait_for_object(store / "plan.json", process)
        (east,) = sites["east"].served()
        east.suspend()
        wait_for_object(store / "rounds/0002/global.json", process)
        east.resume()
        stdout, _ = process.communicate(timeout=RUN_SECONDS)
    assert process.returncode == 0, (federation / "stderr").read_text()
    rounds = json.loads(stdout)["rounds"]
    assert re.fullmatch(r"late: no answer in \d+ s", rounds[0]["dropped"]["east"])
    assert (rounds[0]["participants"], rounds[-1]["participants"]) == (["north", "west"], list(EDGES))
