"""An edge joins a run at round 3 and leaves it at round 5: real processes, held where it matters by the way to S3.

Nothing depends on who is faster. Round 2 stays open until the newcomer's profile is there, since the other edge's
update is held on its way; the newcomer is told to leave while its update of round 5 is on its way.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from commands import running, wait_until
from remote_federation import REMOTE, EdgeSite
from s3_servers import FaultProxy, fault_proxy
from tiny_federation import EDGES

from tasks.plans import plan_at
from tasks.records import RunKeys
from tasks.storage import ObjectStore, open_store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROUNDS, JOINED, LEFT = 8, 3, 5
PATIENCE_SECONDS = 120
KEYS = RunKeys("changing")
CHANGES = {"rounds": ROUNDS, "remote": {"poll_seconds": 0.1, "lease_seconds": 8, "start_seconds": 30}}


@pytest.fixture(scope="module")
def proxy(s3_endpoint: str) -> Iterator[FaultProxy]:
    """The way to S3 of the remote edges."""
    with fault_proxy(s3_endpoint) as found:
        yield found


@pytest.fixture(scope="module")
def edge_environment(remote_environment: dict[str, str], proxy: FaultProxy) -> dict[str, str]:
    """The way of the edges to the store leads through the proxy."""
    return remote_environment | {"AWS_ENDPOINT_URL": proxy.address}


@pytest.fixture
def store(s3_root: str) -> ObjectStore:
    """The store of the run, as this process sees it: not through the proxy."""
    return open_store(s3_root)


def flow_runs(environment: dict[str, str]) -> list[str]:
    """Names of all flow runs that were started for the run's edges."""
    wanted = {"flow_runs": {"tags": {"all_": [f"fedpipe-run:{KEYS.run}"]}}}
    answer = httpx.post(f"{environment['PREFECT_API_URL']}/flow_runs/filter", json=wanted, timeout=30)
    return sorted(found["name"] for found in answer.raise_for_status().json())


def come_and_go(sites: dict[str, EdgeSite], proxy: FaultProxy, store: ObjectStore) -> None:
    """Let west join in round 3 and leave in round 5; the other remote edge is served by one process all the while."""
    with proxy.holding(KEYS.update_data(LEFT, "west")) as west_answers:
        with proxy.holding(KEYS.update_record(JOINED - 1, "east")) as round_is_open:
            assert round_is_open.wait(PATIENCE_SECONDS)
            sites["west"].start_worker()
            wait_until(lambda: store.exists(KEYS.profile("west")), "the newcomer's profile", PATIENCE_SECONDS)
            serving = sites["east"].served()
        assert west_answers.wait(PATIENCE_SECONDS)
        leaving = sites["west"].served()
        for member in leaving * 2:  # as a service manager does, by itself and through the worker
            member.terminate()
        assert not psutil.wait_procs(leaving, timeout=60)[1]
    assert sites["east"].served() == serving
    assert len(serving) == len(leaving) == 1


def test_edge_joins_at_round_3_and_leaves_at_round_5_without_a_restart(
    remote_environment: dict[str, str],
    federation: Path,
    sites: dict[str, EdgeSite],
    proxy: FaultProxy,
    store: ObjectStore,
) -> None:
    arguments = ("--run", KEYS.run, "--no-release", "--json", "--set", f"store={store.root}")
    sites["west"].kill_worker()  # nobody is at work yet on its machine
    with running(remote_environment, federation, "run", federation / "federation.yaml", *arguments) as process:
        come_and_go(sites, proxy, store)
        stdout, _ = process.communicate(timeout=PATIENCE_SECONDS)
    said = (federation / "stderr").read_text()
    assert process.returncode == 0, said
    rounds, two, all_three = json.loads(stdout)["rounds"], ["east", "north"], list(EDGES)
    before, during, after = JOINED - 1, LEFT - JOINED, ROUNDS - LEFT + 1
    assert [entry["participants"] for entry in rounds] == [two] * before + [all_three] * during + [two] * after
    told = "left: its process was told to stop (TerminationSignal)"
    assert [entry["dropped"].get("west") for entry in rounds] == [None] * (before + during) + [told] * after
    assert [set(plan_at(store, KEYS, index).edges) for index in (JOINED - 1, JOINED)] == [set(two), set(all_three)]
    assert flow_runs(remote_environment) == [f"{edge_id} serves {KEYS.run}" for edge_id in REMOTE]
