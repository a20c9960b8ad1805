"""The few fixtures that tests of several packages share."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest
from s3_servers import FaultProxy, fault_proxy, moto_server

if TYPE_CHECKING:
    from remote_federation import EdgeSite, Keys

# Before Prefect is imported: its console handler would keep a stream that pytest closes.
os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")

# A home of its own: tests leave nothing in the user's, and two processes of tests do not share one database.
os.environ["PREFECT_HOME"] = tempfile.mkdtemp(prefix="fedpipe-test-prefect-")
atexit.register(shutil.rmtree, os.environ["PREFECT_HOME"], ignore_errors=True)

# Two processes of tests share the machine, and the models are too small to gain from threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take long, whole deployments first, so that processes of tests end together."""
    slow_files = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow_files, len(item.path.parts)))


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """Address of an S3 server: the one in FEDPIPE_TEST_S3_ENDPOINT, or else moto's, started when first needed."""
    if endpoint := os.environ.get("FEDPIPE_TEST_S3_ENDPOINT"):
        yield endpoint
    else:
        with moto_server() as endpoint:
            yield endpoint


@pytest.fixture(scope="session")
def s3_environment(s3_endpoint: str) -> dict[str, str]:
    """What the SDK must find in the environment; credentials are invented where no real endpoint is named."""
    settings = {"AWS_ENDPOINT_URL": s3_endpoint, "AWS_EC2_METADATA_DISABLED": "true"}
    if "FEDPIPE_TEST_S3_ENDPOINT" in os.environ:
        return settings
    nowhere = {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
    return settings | nowhere | {"AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": "secret"}


@pytest.fixture(scope="session")
def s3_bucket(s3_environment: dict[str, str]) -> str:
    """A bucket to test in: the one in FEDPIPE_TEST_S3_BUCKET, made if it is missing."""
    from boto3.session import Session
    from botocore.config import Config

    bucket = os.environ.get("FEDPIPE_TEST_S3_BUCKET", "fedpipe-test")
    with pytest.MonkeyPatch.context() as patch:
        _apply(s3_environment, patch)
        path_style = Config(s3={"addressing_style": "path"})
        client = Session().client("s3", region_name=os.environ.get("AWS_REGION", "us-east-1"), config=path_style)
        if bucket not in {found["Name"] for found in client.list_buckets()["Buckets"]}:
            client.create_bucket(Bucket=bucket)
    return bucket


@pytest.fixture
def s3_root(s3_bucket: str, s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Address of an empty S3 store that the SDK is set up for."""
    _apply(s3_environment, monkeypatch)
    return f"s3://{s3_bucket}/{uuid4().hex}"


@pytest.fixture
def s3_proxy(s3_root: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """Put a fault-injecting proxy between the SDK and the server."""
    with fault_proxy(s3_endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
        yield proxy


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> "Keys":
    """Keys of a coordinator and of the tiny federation's edges."""
    from remote_federation import Keys

    return Keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="session")
def remote_environment(
    tmp_path_factory: pytest.TempPathFactory, keys: "Keys", s3_environment: dict[str, str], s3_bucket: str
) -> Iterator[dict[str, str]]:
    """Where commands and edges find servers: Prefect's with the deployments of prefect.yaml, S3, MLflow's database."""
    from remote_federation import deployed_server

    folder = tmp_path_factory.mktemp("server")
    with deployed_server(folder) as environment:
        yield (
            environment
            | s3_environment
            | {
                "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
                "FEDPIPE_SIGNING_KEY": str(keys.path("coordinator")),
            }
        )


@pytest.fixture(scope="module")
def federation(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, keys: "Keys") -> Path:
    """The tiny federation with the module's CHANGES; two edges have machines of their own, and whoever writes signs."""
    from remote_federation import REMOTE, federation_keys
    from tiny_federation import write_federation

    folder = tmp_path_factory.mktemp("federation")
    write_federation(folder, **federation_keys(REMOTE, keys), **request.module.CHANGES)
    return folder


@pytest.fixture(scope="module")
def edge_environment(remote_environment: dict[str, str]) -> dict[str, str]:
    """Where remote edges find servers; modules that meddle with their way to S3 have one of their own."""
    return remote_environment


@pytest.fixture(scope="module")
def sites(edge_environment: dict[str, str], federation: Path, keys: "Keys") -> "Iterator[dict[str, EdgeSite]]":
    """The machines of the remote edges."""
    from remote_federation import REMOTE, edge_sites

    with edge_sites(edge_environment, federation, REMOTE, keys) as found:
        yield found


def _apply(environment: dict[str, str], patch: pytest.MonkeyPatch) -> None:
    if "AWS_CONFIG_FILE" in environment:
        patch.delenv("AWS_PROFILE", raising=False)
    for name, value in environment.items():
        patch.setenv(name, value)
