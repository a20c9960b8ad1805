"""What a release rests on: every object by hash, and what has become of one since its round was closed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fedpipe_core.config import FederationConfig
from fedpipe_core.errors import FedPipeError, IntegrityError, ReleaseError
from fedpipe_core.schemas import RoundRecord, UpdateRecord
from tasks.lineage import needed_record
from tasks.manifest import object_hashes, run_manifest
from tasks.records import RunKeys, put_record
from tasks.storage import ObjectStore, open_store

KEYS = RunKeys("run")
UPDATE = "run/rounds/0001/updates/east"


@pytest.fixture
def store(finished_store: Path, tmp_path: Path) -> ObjectStore:
    return open_store(str(shutil.copytree(finished_store, tmp_path / "store")))


def flip_byte(store: ObjectStore, key: str) -> None:
    data = bytearray(store.get(key))
    data[-3] ^= 1
    store.put(key, bytes(data))


def change(store: ObjectStore, key: str, **fields: object) -> None:
    store.put(key, json.dumps(json.loads(store.get(key)) | fields).encode())


def test_manifest_holds_the_hash_of_every_object_of_the_run(store: ObjectStore, tiny_config: FederationConfig) -> None:
    assert run_manifest(store, KEYS, tiny_config).objects == object_hashes(store, sorted(store.list("run")))


def test_closed_round_vouches_for_its_records_and_for_the_round_before(store: ObjectStore) -> None:
    first, second = (needed_record(store, KEYS.round_record(index), RoundRecord).records for index in (1, 2))
    opening = {KEYS.federation, KEYS.plan, KEYS.global_record(1), *map(KEYS.profile, ("east", "north", "west"))}
    answers = {KEYS.update_record(1, edge_id) for edge_id in ("east", "north", "west")}
    assert set(first) == {*opening, *answers, KEYS.global_record(2)}
    assert {KEYS.round_record(1), KEYS.update_record(2, "north"), KEYS.global_record(3)} < set(second)
    assert second == object_hashes(store, second)


@pytest.mark.parametrize(
    "key",
    [
        f"{UPDATE}.safetensors",
        f"{UPDATE}.json",
        "run/rounds/0003/global.safetensors",
        "run/profiles/west.json",
        "run/plan.json",
    ],
)
def test_missing_object_is_named(store: ObjectStore, tiny_config: FederationConfig, key: str) -> None:
    store.delete(key)
    with pytest.raises(FedPipeError, match=key) as told:
        run_manifest(store, KEYS, tiny_config)
    assert "missing" in str(told.value) or "there is no object" in str(told.value)


def test_several_missing_objects_are_counted(store: ObjectStore, tiny_config: FederationConfig) -> None:
    for suffix in ("json", "safetensors"):
        store.delete(f"{UPDATE}.{suffix}")
    with pytest.raises(ReleaseError, match=rf"{UPDATE}.json and 1 more, part of .* is missing; nothing was released"):
        run_manifest(store, KEYS, tiny_config)


ALTERED: dict[str, Callable[[ObjectStore], None]] = {
    f"{UPDATE}.safetensors": lambda store: flip_byte(store, f"{UPDATE}.safetensors"),
    f"{UPDATE}.json": lambda store: change(store, f"{UPDATE}.json", num_examples=10**6),
    "run/rounds/0002/global.json": lambda store: change(store, "run/rounds/0002/global.json", opposed=["west"]),
    "run/rounds/0003/global.safetensors": lambda store: flip_byte(store, "run/rounds/0003/global.safetensors"),
    "run/rounds/0001/round.json": lambda store: change(store, "run/rounds/0001/round.json", metrics={"loss": 0.1}),
    "run/profiles/west.json": lambda store: change(store, "run/profiles/west.json", num_examples=10**6),
    "run/plan.json": lambda store: change(store, "run/plan.json", solver="by hand"),
    "run/federation.json": lambda store: change(store, "run/federation.json", code_commit="0" * 40),
}


@pytest.mark.parametrize("key", ALTERED)
def test_altered_object_is_named_with_both_hashes(store: ObjectStore, tiny_config: FederationConfig, key: str) -> None:
    before = object_hashes(store, [key])[key]
    ALTERED[key](store)
    with pytest.raises(IntegrityError, match=rf"{key} was altered since its round was closed: .*{before[:12]}…"):
        run_manifest(store, KEYS, tiny_config)


def test_last_round_that_names_another_adapter_is_told(store: ObjectStore, tiny_config: FederationConfig) -> None:
    change(store, KEYS.round_record(2), adapter_sha256="0" * 64)
    with pytest.raises(IntegrityError, match=r"0002/round.json and run/rounds/0003/global.json differ on round 2"):
        run_manifest(store, KEYS, tiny_config)


def test_object_altered_in_a_bucket_is_told_like_one_on_disk(
    store: ObjectStore, tiny_config: FederationConfig, s3_root: str
) -> None:
    bucket = open_store(s3_root)
    for key in store.list():
        bucket.put(key, store.get(key))
    assert run_manifest(bucket, KEYS, tiny_config) == run_manifest(store, KEYS, tiny_config)
    flip_byte(bucket, f"{UPDATE}.safetensors")
    with pytest.raises(IntegrityError, match=f"store {s3_root}: {UPDATE}.safetensors was altered"):
        run_manifest(bucket, KEYS, tiny_config)
    bucket.delete(f"{UPDATE}.safetensors")
    with pytest.raises(ReleaseError, match=f"store {s3_root}: {UPDATE}.safetensors, part of .* is missing"):
        run_manifest(bucket, KEYS, tiny_config)


def test_answer_that_came_after_its_round_was_closed_is_no_part(
    store: ObjectStore, tiny_config: FederationConfig
) -> None:
    late = needed_record(store, KEYS.update_record(1, "east"), UpdateRecord).model_copy(update={"edge_id": "south"})
    put_record(store, KEYS.update_record(1, "south"), late)
    assert KEYS.update_record(1, "south") not in run_manifest(store, KEYS, tiny_config).objects


def test_run_of_an_older_version_whose_rounds_vouch_for_nothing_is_listed(
    store: ObjectStore, tiny_config: FederationConfig
) -> None:
    for index in (1, 2):
        change(store, KEYS.round_record(index), records={})
    assert set(run_manifest(store, KEYS, tiny_config).objects) == set(store.list("run"))
