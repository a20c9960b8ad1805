import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fedpipe_core.config import FederationConfig
from fedpipe_core.errors import ReleaseError, StoreError
from fedpipe_core.schemas import FederationRecord, GlobalRecord
from tasks.lineage import needed_record
from tasks.manifest import run_manifest
from tasks.records import RunKeys, put_record
from tasks.registry import ADAPTER_TAG, BASE_TAG, CONFIG_TAG, MANIFEST_TAG, ModelVersion
from tasks.storage import ObjectStore, open_store
from tasks.tracking import RUN_TAG, STORE_TAG
from tasks.verification import verify_version

KEYS = RunKeys("run")
UPDATE = "run/rounds/0001/updates/east"


@pytest.fixture
def store(finished_store: Path, tmp_path: Path) -> ObjectStore:
    return open_store(str(shutil.copytree(finished_store, tmp_path / "store")))


@pytest.fixture
def version(store: ObjectStore, tiny_config: FederationConfig) -> ModelVersion:
    return release(store, tiny_config)


def release(store: ObjectStore, config: FederationConfig) -> ModelVersion:
    """What a release leaves: the manifest in the store, and a version with its hash."""
    manifest = run_manifest(store, KEYS, config)
    put_record(store, KEYS.manifest, manifest)
    federation = needed_record(store, KEYS.federation, FederationRecord)
    last = needed_record(store, KEYS.global_record(config.rounds + 1), GlobalRecord)
    tags = {
        ADAPTER_TAG: last.adapter.sha256,
        BASE_TAG: federation.base_sha256,
        CONFIG_TAG: federation.config_sha256,
        MANIFEST_TAG: hashlib.sha256(store.get(KEYS.manifest)).hexdigest(),
        RUN_TAG: "run",
        STORE_TAG: store.root,
    }
    return ModelVersion("sqlite:///unused", "tiny", 1, "id", tags)


def flip_byte(store: ObjectStore, key: str) -> None:
    data = bytearray(store.get(key))
    data[-3] ^= 1
    store.put(key, bytes(data))


def change(store: ObjectStore, key: str, **fields: object) -> None:
    document = json.loads(store.get(key))
    store.put(key, json.dumps(document | fields).encode())


def test_untouched_run_is_verified_round_by_round(store: ObjectStore, version: ModelVersion) -> None:
    found = verify_version(version)
    assert found.verified
    assert found.faults == []
    assert [entry.updates for entry in found.rounds] == [3, 2]
    assert all(entry.recomputed_sha256 == entry.recorded_sha256 for entry in found.rounds)
    assert found.rounds[-1].recomputed_sha256 == found.adapter_sha256
    assert found.objects == len([key for key in store.list("run") if key != KEYS.manifest])


def test_run_in_a_bucket_is_verified_like_one_on_disk(store: ObjectStore, version: ModelVersion, s3_root: str) -> None:
    bucket = open_store(s3_root)
    for key in store.list():
        bucket.put(key, store.get(key))
    assert verify_version(version, s3_root).verified
    flip_byte(bucket, f"{UPDATE}.safetensors")
    assert [fault.subject for fault in verify_version(version, s3_root).faults] == [f"{UPDATE}.safetensors"]


DAMAGES: dict[str, tuple[Callable[[ObjectStore], None], str, str]] = {
    "flipped byte of an update": (
        lambda store: flip_byte(store, f"{UPDATE}.safetensors"),
        f"{UPDATE}.safetensors",
        "was altered",
    ),
    "missing update": (lambda store: store.delete(f"{UPDATE}.safetensors"), f"{UPDATE}.safetensors", "is missing"),
    "missing record": (lambda store: store.delete(f"{UPDATE}.json"), f"{UPDATE}.json", "is missing"),
    "altered record": (
        lambda store: change(store, f"{UPDATE}.json", num_examples=10**6),
        f"{UPDATE}.json",
        "was altered",
    ),
    "altered plan": (lambda store: change(store, KEYS.plan, solver="by hand"), KEYS.plan, "was altered"),
    "flipped byte of the last adapter": (
        lambda store: flip_byte(store, KEYS.global_data(3)),
        KEYS.global_data(3),
        "was altered",
    ),
    "altered manifest": (lambda store: change(store, KEYS.manifest, objects={}), KEYS.manifest, "has sha256"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_by_the_object_it_concerns(store: ObjectStore, version: ModelVersion, damage: str) -> None:
    spoil, key, words = DAMAGES[damage]
    spoil(store)
    found = verify_version(version)
    assert not found.verified
    assert found.faults[0].subject == key
    assert words in found.faults[0].found


def test_round_without_damage_is_still_computed_again(store: ObjectStore, version: ModelVersion) -> None:
    flip_byte(store, f"{UPDATE}.safetensors")
    first, second = verify_version(version).rounds
    assert first.recomputed_sha256 is None
    assert second.recomputed_sha256 == second.recorded_sha256


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda store: flip_byte(store, f"{UPDATE}.safetensors"),
            "counted the update of east, which does not count now",
        ),
        (lambda store: change(store, f"{UPDATE}.json", num_examples=10**6), "leads to adapter"),
        (lambda store: change(store, "run/rounds/0002/updates/north.json", run="run"), "refused the update of north"),
        (lambda store: store.delete(KEYS.global_data(1)), "cannot be computed again"),
        (lambda store: flip_byte(store, KEYS.global_data(3)), "global.safetensors holds"),
    ],
)
def test_records_alone_give_a_changed_update_away(
    store: ObjectStore, version: ModelVersion, spoil: Callable[[ObjectStore], None], words: str
) -> None:
    store.delete(KEYS.manifest)
    spoil(store)
    missing, fault, *_ = verify_version(version).faults
    assert missing.subject == KEYS.manifest
    assert words in fault.found


def test_only_the_last_rounds_are_looked_at_when_asked(store: ObjectStore, version: ModelVersion) -> None:
    flip_byte(store, f"{UPDATE}.safetensors")
    found = verify_version(version, last_rounds=1)
    assert found.verified
    assert [entry.round for entry in found.rounds] == [2]


def test_version_of_another_adapter_is_told(store: ObjectStore, version: ModelVersion) -> None:
    version.tags[ADAPTER_TAG] = "0" * 64  # type: ignore[index]
    [fault] = verify_version(version).faults
    assert fault.subject == KEYS.global_record(3)
    assert "but the version was made of 000" in fault.found


def test_run_without_a_plan_is_one_fault(store: ObjectStore, version: ModelVersion) -> None:
    store.delete(KEYS.plan)
    [fault] = verify_version(version).faults
    assert "run/plan.json is missing in" in fault.found


def test_version_that_names_no_run_is_refused() -> None:
    with pytest.raises(ReleaseError, match=r"model tiny version 1 has no tag fedpipe.run, so it was not released by"):
        verify_version(ModelVersion("sqlite:///unused", "tiny", 1, "id", {}))


def test_store_that_is_gone_is_told(version: ModelVersion) -> None:
    with pytest.raises(StoreError, match="there is no such folder"):
        verify_version(version, "/nowhere/store")
