"""Records are written once and vouch for their data; every key of the layout is named here."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpipe_core.errors import IntegrityError, ObjectMissingError, RunError
from fedpipe_core.schemas import DataReference, FailureRecord
from tasks.records import (
    RunKeys,
    get_data,
    get_data_file,
    get_record,
    put_data,
    put_data_file,
    put_record,
    recorded_edges,
)
from tasks.storage import ObjectStore, open_store

KEYS = RunKeys("intents-1")


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store(str(tmp_path / "store"))


def failure(reason: str = "out of memory") -> FailureRecord:
    return FailureRecord(run="intents-1", round=3, edge_id="edge-1", reason=reason)


def test_layout_is_the_documented_one() -> None:
    assert KEYS.federation == "intents-1/federation.json"
    assert KEYS.profiles == "intents-1/profiles"
    assert KEYS.profile("edge-1") == "intents-1/profiles/edge-1.json"
    assert KEYS.plan == "intents-1/plan.json"
    assert KEYS.global_data(3) == "intents-1/rounds/0003/global.safetensors"
    assert KEYS.global_record(3) == "intents-1/rounds/0003/global.json"
    assert KEYS.updates(3) == "intents-1/rounds/0003/updates"
    assert KEYS.update_data(3, "edge-1") == "intents-1/rounds/0003/updates/edge-1.safetensors"
    assert KEYS.update_record(3, "edge-1") == "intents-1/rounds/0003/updates/edge-1.json"
    assert KEYS.failure(3, "edge-1") == "intents-1/rounds/0003/failures/edge-1.json"
    assert KEYS.round_record(3) == "intents-1/rounds/0003/round.json"
    assert KEYS.release("int8/model.safetensors") == "intents-1/release/int8/model.safetensors"
    assert KEYS.result == "intents-1/result.json"


@settings(deadline=None, max_examples=100)
@given(edges=st.sets(st.from_regex(r"\A[a-z0-9][a-z0-9._-]{0,62}\Z"), min_size=2, max_size=4))
def test_no_two_edges_share_a_key(edges: set[str]) -> None:
    keys = [key(3, edge) for edge in edges for key in (KEYS.update_record, KEYS.update_data, KEYS.failure)]
    assert len(set(keys)) == len(keys)


def test_edges_with_a_record_are_found_by_their_ids(store: ObjectStore) -> None:
    assert recorded_edges(store, KEYS.updates(3)) == []
    put_data(store, KEYS.update_data(3, "edge-2"), b"no record yet")
    put_record(store, KEYS.update_record(3, "edge-1.b"), failure())
    put_record(store, KEYS.update_record(3, "edge-1"), failure())
    assert sorted(recorded_edges(store, KEYS.updates(3))) == ["edge-1", "edge-1.b"]


def test_data_comes_back_by_its_reference(store: ObjectStore) -> None:
    reference = put_data(store, "a", b"tensors")
    assert reference.size_bytes == 7
    assert get_data(store, reference) == b"tensors"


@pytest.mark.parametrize("found", [b"tensorz", b"tensors.", b""])
def test_data_with_a_wrong_hash_or_size_is_refused(store: ObjectStore, found: bytes) -> None:
    reference = put_data(store, "a", b"tensors")
    store.put("a", found)
    with pytest.raises(IntegrityError, match=rf"a holds {len(found)} bytes .* promises 7 bytes .* must not be used"):
        get_data(store, reference)


def test_data_that_vanished_is_named(store: ObjectStore) -> None:
    with pytest.raises(ObjectMissingError, match="no object a"):
        get_data(store, DataReference(key="a", sha256="0" * 64, size_bytes=1))


def test_reference_that_points_out_of_the_store_fails_the_run_not_the_input(store: ObjectStore) -> None:
    with pytest.raises(RunError, match="cannot name an object"):
        get_data(store, DataReference(key="../../etc/passwd", sha256="0" * 64, size_bytes=1))


def test_file_comes_back_by_its_reference(store: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(b"weights")
    reference = put_data_file(store, "a", tmp_path / "there")
    assert reference == put_data(store, "a", b"weights")
    get_data_file(store, reference, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == b"weights"


def test_refused_file_is_removed(store: ObjectStore, tmp_path: Path) -> None:
    reference = put_data(store, "a", b"weights")
    store.put("a", b"other")
    with pytest.raises(IntegrityError, match="a holds 5 bytes"):
        get_data_file(store, reference, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_record_comes_back_equal_and_a_missing_one_is_none(store: ObjectStore) -> None:
    key = KEYS.failure(3, "edge-1")
    assert get_record(store, key, FailureRecord) is None
    put_record(store, key, failure())
    assert get_record(store, key, FailureRecord) == failure()


def test_record_may_be_repeated_but_never_changed(store: ObjectStore) -> None:
    put_record(store, "a", failure())
    put_record(store, "a", failure())
    with pytest.raises(RunError, match="a was written before with other content"):
        put_record(store, "a", failure("another reason"))
    assert get_record(store, "a", FailureRecord) == failure()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is no JSON"),
        (b'{"run": "intents-1"', "it is no JSON"),
        (b"\xff\xfe", "a is no FailureRecord"),
        (b'{"run": "intents-1"}', "round Field required; edge_id Field required"),
        (failure().model_dump_json().replace("}", ',"more":1}').encode(), "more Extra inputs"),
    ],
)
def test_damaged_record_is_named_with_what_is_wrong(store: ObjectStore, content: bytes, words: str) -> None:
    store.put("a", content)
    with pytest.raises(IntegrityError, match="a is no FailureRecord") as caught:
        get_record(store, "a", FailureRecord)
    assert words in str(caught.value)
