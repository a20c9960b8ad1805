import shutil
from pathlib import Path

import pytest

from fedpipe_core.config import FederationConfig
from fedpipe_core.errors import IntegrityError, ReleaseError
from fedpipe_core.schemas import FederationRecord
from tasks import registry
from tasks.lineage import needed_record, read_lineage, stored_config
from tasks.mlflow_client import connect
from tasks.records import RunKeys
from tasks.registry import ADAPTER_TAG, ModelVersion
from tasks.storage import ObjectStore, open_store
from tasks.tracking import RUN_TAG, STORE_TAG, open_run

KEYS = RunKeys("run")


@pytest.fixture(scope="module")
def version(finished_store: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelVersion:
    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"
    tracked, client = open_run(uri, "tiny", "run", {}, {}), connect(uri)
    client.create_registered_model("tiny")
    tags = {ADAPTER_TAG: "a" * 64, RUN_TAG: "run", STORE_TAG: str(finished_store)}
    client.create_model_version("tiny", "unused", tracked.run_id, tags)
    client.set_registered_model_alias("tiny", "champion", "1")
    return registry.find_version(uri, "tiny@champion")


@pytest.fixture
def store(finished_store: Path, tmp_path: Path) -> ObjectStore:
    return open_store(str(shutil.copytree(finished_store, tmp_path / "store")))


def test_lineage_tells_config_code_base_data_and_every_update(
    version: ModelVersion, tiny_config: FederationConfig
) -> None:
    found = read_lineage(version)
    assert (found.model, found.version, found.aliases, found.run) == ("tiny", 1, ("champion",), "run")
    assert found.config["name"] == "tiny"
    assert found.code_version
    assert {edge_id: data.num_examples for edge_id, data in found.edges.items()} == {
        "east": 54,
        "north": 54,
        "west": 54,
    }
    assert len({data.data_fingerprint for data in found.edges.values()}) == 3
    first, second = found.rounds
    assert set(first.accepted) == {"east", "north", "west"}
    assert set(second.accepted) == {"east", "west"}
    assert second.start_sha256 == first.adapter_sha256
    assert "its update's run is elsewhere" in second.refused["north"].reason
    assert len(str(second.refused["north"].sha256)) == 64


def test_missing_record_is_named(version: ModelVersion, store: ObjectStore) -> None:
    store.delete(KEYS.profile("north"))
    with pytest.raises(ReleaseError, match=r"run/profiles/north.json is missing in .*finish it with"):
        read_lineage(version, store.root)


def test_damaged_record_is_named(version: ModelVersion, store: ObjectStore) -> None:
    store.put(KEYS.update_record(1, "west"), b"{}")
    with pytest.raises(IntegrityError, match=r"updates/west\.json is no UpdateRecord"):
        read_lineage(version, store.root)


def test_config_of_another_fedpipe_is_refused(store: ObjectStore) -> None:
    record = needed_record(store, KEYS.federation, FederationRecord)
    newer = record.model_copy(update={"config": {**record.config, "unheard_of": 1}})
    with pytest.raises(IntegrityError, match="config of run run does not fit this FedPipe"):
        stored_config(store, newer)
