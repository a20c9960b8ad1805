"""`prefect.yaml` on a real server: deployed by its command, started through its API as the UI does, run by a worker."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect_processes import ask, call, running, wait_for
from remote_federation import START_WORKER, deployed_server
from tiny_federation import write_federation

from fedpipe_core.config import FederationConfig
from fedpipe_core.config_file import load_config, parse_config
from fedpipe_core.result_schemas import ReleaseReport, RunResult
from flows.deployed import read_config

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
INTENTS = ROOT / "examples" / "intents" / "federation.yaml"
RUN_SECONDS = 300
ENDED = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A server on which everything in `prefect.yaml` is deployed."""
    with deployed_server(tmp_path_factory.mktemp("prefect")) as environment:
        yield environment


@pytest.fixture(scope="module")
def api(server: dict[str, str]) -> Iterator[httpx.Client]:
    """The server's API, as the UI calls it."""
    with httpx.Client(base_url=server["PREFECT_API_URL"], timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def worker(server: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A worker on the pool, started in a folder that holds nothing; the value is its log."""
    log = tmp_path_factory.mktemp("worker") / "worker.log"
    with running(shlex.split(START_WORKER), server, log):
        yield log


@pytest.fixture
def tiny(tmp_path: Path) -> dict[str, Any]:
    """The config of a federation that takes seconds, as JSON with absolute paths."""
    config: dict[str, Any] = read_config(str(write_federation(tmp_path, rounds=1)))["config"]
    return config


def deployment(api: httpx.Client, name: str) -> dict[str, Any]:
    """A deployment as the API tells it."""
    found: dict[str, Any] = ask(api, "GET", f"/deployments/name/{name}").raise_for_status().json()
    return found


def start(api: httpx.Client, name: str, parameters: dict[str, Any]) -> httpx.Response:
    """Create a flow run of a deployment, due now."""
    body = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
    return ask(api, "POST", f"/deployments/{deployment(api, name)['id']}/create_flow_run", body)


def ended(api: httpx.Client, created: httpx.Response, log: Path) -> dict[str, Any]:
    """The flow run once it has ended."""
    address = f"/flow_runs/{created.raise_for_status().json()['id']}"

    def look() -> dict[str, Any] | None:
        flow_run: dict[str, Any] = ask(api, "GET", address).raise_for_status().json()
        return flow_run if flow_run["state"]["type"] in ENDED else None

    return wait_for(look, RUN_SECONDS, "the flow run's end", log)


@pytest.mark.parametrize(
    ("name", "cron"), [("federated_finetune/intents", "0 3 * * *"), ("release_model/any-run", "0 6 * * *")]
)
def test_flow_is_scheduled_but_inactive_and_runs_one_at_a_time(api: httpx.Client, name: str, cron: str) -> None:
    found = deployment(api, name)
    (schedule,) = found["schedules"]
    assert (schedule["schedule"]["cron"], schedule["active"]) == (cron, False)
    assert found["global_concurrency_limit"]["limit"] == 1
    assert found["concurrency_options"]["collision_strategy"] == "ENQUEUE"


@pytest.mark.parametrize(
    ("name", "pool"),
    [
        ("federated_finetune/intents", "fedpipe"),
        ("release_model/any-run", "fedpipe"),
        ("serve_edge/edges", "edges"),
    ],
)
def test_deployments_are_module_entry_points_that_pull_nothing(api: httpx.Client, name: str, pool: str) -> None:
    found = deployment(api, name)
    assert found["entrypoint"].startswith("flows.")
    assert not found["pull_steps"]
    assert (found["work_pool_name"], found["tags"][0]) == (pool, "fedpipe")


def test_form_is_filled_in_with_the_example_at_absolute_paths(api: httpx.Client) -> None:
    filled = parse_config(deployment(api, "federated_finetune/intents")["parameters"]["config"])
    assert filled.model_dump(exclude={"store"}) == load_config(INTENTS).model_dump(exclude={"store"})
    assert filled.store == str(ROOT / ".fedpipe" / "store")
    assert deployment(api, "release_model/any-run")["parameters"] == {"store": filled.store}


def test_form_carries_descriptions_enumerations_and_limits(api: httpx.Client) -> None:
    schema = deployment(api, "federated_finetune/intents")["parameter_openapi_schema"]
    assert schema["required"] == ["config"]
    assert schema["properties"]["run"]["description"].startswith("Name of the run")
    training, aggregation = (schema["definitions"][name]["properties"] for name in ("TrainingSpec", "AggregationSpec"))
    described = FederationConfig.model_fields["training"].annotation.model_fields["learning_rate"]
    assert training["learning_rate"]["description"] == described.description
    assert training["learning_rate"]["exclusiveMaximum"] == 1
    assert "delta_svd" in aggregation["rule"]["enum"]


def test_parameters_outside_the_schema_are_refused_when_the_run_is_created(
    api: httpx.Client, tiny: dict[str, Any]
) -> None:
    answer = start(api, "federated_finetune/intents", {"config": tiny | {"rounds": 0}})
    assert answer.status_code == 409
    assert "rounds" in answer.text


def test_run_started_as_the_ui_does_ends_with_a_promoted_model(
    api: httpx.Client, worker: Path, tiny: dict[str, Any]
) -> None:
    flow_run = ended(api, start(api, "federated_finetune/intents", {"config": tiny}), worker)
    assert flow_run["state"]["type"] == "COMPLETED", flow_run["state"]["message"]
    assert flow_run["name"] == "tiny"
    (path,) = Path(tiny["store"]).glob("*/result.json")
    result = RunResult.model_validate_json(path.read_bytes())
    assert result.model is not None
    assert (result.status, result.model.alias) == ("completed", "champion")


def test_run_that_waits_is_released_as_the_schedule_does_and_then_nothing_waits(
    api: httpx.Client, worker: Path, tiny: dict[str, Any]
) -> None:
    trained = {"config": tiny, "run": "waiting", "release": False}
    assert ended(api, start(api, "federated_finetune/intents", trained), worker)["state"]["type"] == "COMPLETED"
    report = Path(tiny["store"], "waiting", "release", "report.json")
    assert not report.exists()
    for _ in range(2):
        flow_run = ended(api, start(api, "release_model/any-run", {"store": tiny["store"]}), worker)
        assert flow_run["state"]["type"] == "COMPLETED", flow_run["state"]["message"]
        assert flow_run["name"] == "release what waits"
        found = ReleaseReport.model_validate_json(report.read_bytes())
        assert (found.model.version, found.model.alias) == (1, "champion")


def test_relative_paths_fail_the_run_with_words_that_name_them(
    api: httpx.Client, worker: Path, tiny: dict[str, Any]
) -> None:
    flow_run = ended(api, start(api, "federated_finetune/intents", {"config": tiny | {"store": "here"}}), worker)
    assert flow_run["state"]["type"] == "FAILED"
    assert "relative store 'here' would be lost; give absolute paths" in flow_run["state"]["message"]


def test_failure_raises_an_event_on_which_the_example_automation_acts(
    api: httpx.Client, server: dict[str, str], worker: Path, tiny: dict[str, Any]
) -> None:
    example = ROOT / "infra" / "automations" / "pause-after-failure.yaml"
    call(["automation", "create", "--from-file", str(example)], server, ROOT)
    failed = ended(api, start(api, "release_model/any-run", {"run": "nothing", "store": tiny["store"]}), worker)
    assert failed["state"]["type"] == "FAILED"
    assert "run nothing is not in" in failed["state"]["message"]
    wait_for(lambda: deployment(api, "release_model/any-run")["paused"] or None, 60, "the pause", worker)
    assert not deployment(api, "federated_finetune/intents")["paused"]
