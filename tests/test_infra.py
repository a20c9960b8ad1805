"""What `infra/` holds is well formed and means what it says; nothing is started."""

import fnmatch
import json
import re
from pathlib import Path
from typing import Any

import hcl2
import pytest
import yaml

from fedpipe_core.edge_config import load_edge_config
from tasks.records import RunKeys

INFRA = Path(__file__).parents[1] / "infra"
KEYS = RunKeys("run-1")


def of_edge(edge_id: str) -> set[str]:
    """Every key an edge writes."""
    keys = {KEYS.profile(edge_id), f"{KEYS.profiles}/{edge_id}.link", KEYS.edge_lease(edge_id)}
    judged = {KEYS.evaluation(3, edge_id), KEYS.evaluation_failure(3, edge_id)}
    return keys | judged | {KEYS.update_record(3, edge_id), KEYS.update_data(3, edge_id), KEYS.failure(3, edge_id)}


READ = {
    KEYS.federation,
    KEYS.plan,
    KEYS.joined_plan(2),
    KEYS.global_record(3),
    KEYS.global_data(3),
    KEYS.judged(3),
    KEYS.coordinator_lease,
}


@pytest.fixture(scope="module")
def terraform() -> dict[str, Any]:
    """The parsed `main.tf`."""
    text = (INFRA / "terraform" / "main.tf").read_text(encoding="utf-8")
    found: dict[str, Any] = hcl2.loads(text)
    return found


def patterns(name: str) -> list[str]:
    """The resources of a local of `main.tf`, relative to the store."""
    text = (INFRA / "terraform" / "main.tf").read_text(encoding="utf-8")
    block = re.search(rf"\n  {name} = [^\[]*\[(.*?)\]", text, flags=re.DOTALL)
    assert block is not None
    return re.findall(r'"\$\{local\.root\}/([^"]+)"', block.group(1))


def allowed(key: str, edge_id: str, names: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(key, name.replace("${edge}", edge_id)) for name in names)


@pytest.mark.parametrize("path", sorted((INFRA / "terraform").glob("*.tf")), ids=lambda path: path.name)
def test_terraform_parses(path: Path) -> None:
    assert hcl2.loads(path.read_text(encoding="utf-8"))


def test_bucket_is_private_and_encrypted(terraform: dict[str, Any]) -> None:
    text = json.dumps(terraform["resource"])
    for kind in ("aws_s3_bucket_public_access_block", "aws_s3_bucket_server_side_encryption_configuration"):
        assert kind in text


def test_edge_may_write_all_it_writes_and_read_all_it_reads() -> None:
    assert all(allowed(key, "north", patterns("own")) for key in of_edge("north"))
    assert all(allowed(key, "north", patterns("shared")) for key in READ)


@pytest.mark.parametrize(("edge_id", "other"), [("a", "a.b"), ("a.b", "a"), ("a", "ab"), ("north", "south")])
def test_edge_may_write_nothing_of_another_edge_or_the_coordinator(edge_id: str, other: str) -> None:
    foreign = of_edge(other) | READ | {KEYS.result, KEYS.round_record(3)}
    assert [key for key in foreign if allowed(key, edge_id, patterns("own"))] == []
    assert [key for key in of_edge(other) if allowed(key, edge_id, patterns("shared"))] == []


@pytest.mark.parametrize("path", sorted((INFRA / "k8s").glob("*.yaml")), ids=lambda path: path.name)
def test_kubernetes_objects_are_complete(path: Path) -> None:
    for found in yaml.safe_load_all(path.read_text(encoding="utf-8")):
        assert {"apiVersion", "kind", "metadata"} <= set(found)
        assert found["kind"] == "Namespace" or found["metadata"]["namespace"] == "fedpipe"


def test_kubernetes_worker_may_do_nothing_but_run_jobs() -> None:
    objects = list(yaml.safe_load_all((INFRA / "k8s" / "worker.yaml").read_text(encoding="utf-8")))
    (role,) = (found for found in objects if found["kind"] == "Role")
    assert {resource for rule in role["rules"] for resource in rule["resources"]} == {
        "jobs",
        "pods",
        "pods/log",
        "pods/status",
        "events",
    }
    writes = {verb for rule in role["rules"] for verb in rule["verbs"]} - {"get", "list", "watch"}
    assert writes == {"create", "patch", "delete"}


def test_work_pool_template_uses_only_variables_it_declares() -> None:
    template = json.loads((INFRA / "work_pools" / "kubernetes.json").read_text(encoding="utf-8"))
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(template["job_configuration"])))
    assert used == set(template["variables"]["properties"])


def test_claims_and_secrets_of_the_template_are_those_described() -> None:
    template = (INFRA / "work_pools" / "kubernetes.json").read_text(encoding="utf-8")
    claims = {
        found["metadata"]["name"]
        for found in yaml.safe_load_all((INFRA / "k8s" / "rows.yaml").read_text(encoding="utf-8"))
    }
    assert set(re.findall(r'"claimName": "([^"]+)"', template)) == claims
    described = (INFRA / "k8s" / "worker.yaml").read_text(encoding="utf-8")
    assert all(name in described for name in re.findall(r'"(?:secretName|name)": "(fedpipe-[^"]+)"', template))


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """The parsed `compose.yaml`."""
    found: dict[str, Any] = yaml.safe_load((INFRA / "compose.yaml").read_text(encoding="utf-8"))
    return found


def test_compose_brings_up_servers_and_two_edges(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert set(services) == {"postgres", "prefect", "mlflow", "s3", "bucket", "coordinator", "north", "south"}
    for service in services.values():
        assert set(service.get("depends_on", [])) <= set(services)
    assert services["prefect"]["environment"]["PREFECT_SERVER_DATABASE_CONNECTION_URL"].startswith("postgresql+asyncpg")


def test_ports_of_the_servers_are_open_on_this_machine_alone(compose: dict[str, Any]) -> None:
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


@pytest.mark.parametrize("edge_id", ["north", "south"])
def test_edges_of_compose_have_an_edge_yaml_and_look_at_their_queue(compose: dict[str, Any], edge_id: str) -> None:
    own = load_edge_config(INFRA / "edges" / edge_id / "edge.yaml")
    service = compose["services"][edge_id]
    assert own.edge_id == edge_id
    assert service["command"] == "fedpipe edge worker /edge/edge.yaml"  # on the queue of that name
    assert f"./edges/{edge_id}:/edge" in service["volumes"]
    assert service["environment"]["AWS_ENDPOINT_URL"] == "http://s3:9000"
