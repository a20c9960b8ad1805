"""What a worker's run refuses, and what a deployment's form is filled with."""

from pathlib import Path

import pytest
import yaml

from fedpipe_core.config import FederationConfig
from fedpipe_core.config_file import load_config, parse_config
from fedpipe_core.errors import ConfigError
from flows.deployed import read_config, require_lasting_places, require_lasting_store

INTENTS = Path(__file__).parents[2] / "examples" / "intents" / "federation.yaml"


@pytest.fixture
def by_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Prefect say that a worker runs the flow."""
    monkeypatch.setenv("PREFECT__RUNTIME__DEPLOYMENT__ID", "some-deployment")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def config_with(**data: str) -> FederationConfig:
    """The example's config at absolute paths, but for those given."""
    config = parse_config(read_config(str(INTENTS))["config"])
    store = data.pop("store", config.store)
    return config.model_copy(update={"store": store, "data": config.data.model_copy(update=data)})


def test_config_read_for_a_deployment_means_what_the_file_says() -> None:
    found = read_config(str(INTENTS))
    assert parse_config(found["config"]).model_dump(exclude={"store"}) == load_config(INTENTS).model_dump(
        exclude={"store"}
    )
    assert found["store"] == found["config"]["store"] == str(Path(".fedpipe/store").absolute())
    assert Path(found["config"]["data"]["train"]).is_absolute()


def test_config_read_for_a_deployment_keeps_a_store_on_s3(tmp_path: Path) -> None:
    document = yaml.safe_load(INTENTS.read_text(encoding="utf-8")) | {"store": "s3://bucket/prefix"}
    path = tmp_path / "federation.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    assert read_config(str(path))["store"] == "s3://bucket/prefix"


@pytest.mark.usefixtures("by_a_worker")
def test_worker_takes_absolute_places() -> None:
    require_lasting_places(config_with())
    require_lasting_store("s3://bucket/prefix")


@pytest.mark.usefixtures("by_a_worker")
def test_worker_names_every_relative_path() -> None:
    with pytest.raises(ConfigError, match=r"relative store 'here', data.train 'train.jsonl' would be lost; give abs"):
        require_lasting_places(config_with(store="here", train="train.jsonl"))
    with pytest.raises(ConfigError, match=r"relative store '.fedpipe/store' would be lost"):
        require_lasting_store(".fedpipe/store")


@pytest.mark.usefixtures("by_a_worker")
def test_worker_with_a_store_on_s3_needs_an_mlflow_server(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_with(store="s3://bucket/prefix")
    with pytest.raises(ConfigError, match=r"give tracking.uri the address of an MLflow server"):
        require_lasting_places(config)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking.example")
    require_lasting_places(config)


def test_command_line_takes_relative_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT__RUNTIME__DEPLOYMENT__ID", raising=False)
    require_lasting_places(config_with(store="here", train="train.jsonl"))
    require_lasting_store(".fedpipe/store")
