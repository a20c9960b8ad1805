"""Runs disturbed at random moments, in real time and real processes, end as if nothing had happened.

SIGKILL of the coordinator, of an edge and of a worker, and outages of S3, on a line that loses a request now and then.
The seed is printed: FEDPIPE_TEST_SEED=N draws the same disturbances again, though not to the millisecond.
"""

import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from commands import run_to_end, running
from remote_federation import REMOTE, EdgeSite
from s3_servers import Fault, FaultProxy, fault_proxy
from tiny_federation import EDGES, write_federation

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROUNDS = 8
CHANGES = {
    "rounds": ROUNDS,
    "training.examples_per_round": 800,
    "remote": {"poll_seconds": 0.1, "lease_seconds": 8, "start_seconds": 25, "restarts": 50},
}
DISTURBANCES = ("coordinator", "coordinator", "edge", "edge", "worker", "worker")
OUTAGE_SECONDS = (30.0, 12.0, 4.0)  # a run for each
LONGEST_PAUSE_SECONDS = 4.0
PATIENCE_SECONDS = 300
MOST_ATTEMPTS = 20


@pytest.fixture(scope="module")
def dice() -> random.Random:
    """The dice of all disturbances."""
    seed = int(os.environ.get("FEDPIPE_TEST_SEED", time.time_ns()))
    print(f"FEDPIPE_TEST_SEED={seed}")
    return random.Random(seed)


@pytest.fixture(scope="module")
def proxy(s3_endpoint: str, dice: random.Random) -> Iterator[FaultProxy]:
    """A line to S3 on which one request in forty meets a fault."""

    def bad_line() -> Iterator[Fault | None]:
        while True:
            faults: Sequence[Fault] = ("cut request", "lose answer", "truncate answer", "slow down")
            yield dice.choice(faults) if dice.random() < 1 / 40 else None

    with fault_proxy(s3_endpoint) as found:
        found.faults = bad_line()
        yield found


@pytest.fixture(scope="module")
def edge_environment(remote_environment: dict[str, str], proxy: FaultProxy) -> dict[str, str]:
    """The way of the edges to the store leads over the bad line."""
    return remote_environment | {"AWS_ENDPOINT_URL": proxy.address}


@pytest.fixture(scope="module")
def undisturbed(remote_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the same federation comes to with all edges in one process, and without a fault."""
    found = tmp_path_factory.mktemp("undisturbed")
    config = write_federation(found, **CHANGES)
    arguments = ("run", config, "--run", "undisturbed", "--no-release", "--json")
    outcome = run_to_end(remote_environment, found, *arguments, seconds=PATIENCE_SECONDS)
    assert outcome.exit_code == 0, outcome.stderr
    return outcome.document


def disturb(
    process: subprocess.Popen[str], kinds: list[str], sites: dict[str, EdgeSite], proxy: FaultProxy, dice: random.Random
) -> None:
    """Let what is left in `kinds` happen at random moments, from a running command's first sign of life to its end."""
    known = len(proxy.answered)
    while not any("PUT" in request and "leases/coordinator" in request for request, _ in proxy.answered[known:]):
        if process.poll() is not None:
            return
        time.sleep(0.05)
    while kinds:
        time.sleep(dice.uniform(0, LONGEST_PAUSE_SECONDS))
        site = sites[dice.choice(REMOTE)]
        while process.poll() is None:
            if happens(kinds[-1], process, site, proxy):
                print(f"{time.monotonic():.1f} s: {kinds.pop()}")
                break
            time.sleep(0.05)
        else:
            return


def happens(kind: str, process: subprocess.Popen[str], site: EdgeSite, proxy: FaultProxy) -> bool:
    """Make a disturbance; False while there is nothing to disturb."""
    if kind.startswith("outage"):
        proxy.away_until = time.monotonic() + float(kind.split()[1])
    elif kind == "coordinator":
        process.kill()
    elif kind == "worker":
        site.kill_worker()
        site.start_worker()
    else:
        return site.kill_edge()
    return True


def trained_again(answered: list[tuple[str, int]]) -> list[str]:
    """Edge-rounds whose adapter was written once more after the record that says it is there."""
    recorded, again = set(), []
    for request, status in answered:
        found = re.fullmatch(r"PUT \S+?/(rounds/\d+/updates/[a-z]+)\.(json|safetensors)", request)
        if found and status == HTTPStatus.OK and found[2] == "json":
            recorded.add(found[1])
        elif found and found[1] in recorded and found[2] == "safetensors":
            again.append(found[1])
    return again


def test_runs_disturbed_at_random_end_in_the_same_bytes_and_train_nothing_again(
    federation: Path,
    sites: dict[str, EdgeSite],
    proxy: FaultProxy,
    dice: random.Random,
    undisturbed: dict[str, Any],
    s3_bucket: str,
) -> None:
    for seconds in OUTAGE_SECONDS:
        name, first = f"run-{uuid4().hex[:8]}", len(proxy.answered)
        arguments = ("run", federation / "federation.yaml", "--run", name, "--no-release", "--json")
        arguments += ("--set", f"store=s3://{s3_bucket}/{name}")
        kinds, code, attempts = dice.sample([*DISTURBANCES, f"outage {seconds}"], len(DISTURBANCES) + 1), None, 0
        while code != 0:
            begun = any(re.fullmatch(r"PUT \S+/federation\.json", request) for request, _ in proxy.answered[first:])
            resumed = ["--resume"] if begun else []
            with running(sites["east"].environment, federation, *arguments, *resumed) as process:
                disturb(process, kinds, sites, proxy, dice)
                stdout, _ = process.communicate(timeout=PATIENCE_SECONDS)
            code, attempts, said = process.returncode, attempts + 1, (federation / "stderr").read_text()
            print(f"{time.monotonic():.1f} s: {name} ended with {code}\n{said}")
            assert code in (0, -signal.SIGKILL) or "could not be reached" in said, said
            assert attempts < MOST_ATTEMPTS
        assert not kinds, "the run was over before everything had happened"
        document = json.loads(stdout)
        assert [entry["participants"] for entry in document["rounds"]] == [list(EDGES)] * ROUNDS
        assert document["adapter_sha256"] == undisturbed["adapter_sha256"]
        assert trained_again(proxy.answered[first:]) == []
