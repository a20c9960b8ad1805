"""What every store promises, on a folder and on S3; then what only S3 can meet: faults on the way."""

import itertools
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier, Event

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from s3_servers import FaultProxy

from fedpipe_core.errors import InvalidKeyError, ObjectMissingError, StoreError
from tasks.storage import MULTIPART_BYTES, ObjectStore, S3Store, open_store


@pytest.fixture(params=["folder", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return request.getfixturevalue("s3_root") if request.param == "s3" else str(tmp_path / "store")


@pytest.fixture
def store(root: str) -> ObjectStore:
    return open_store(root)


@pytest.fixture
def s3_store(s3_proxy: FaultProxy, s3_root: str) -> S3Store:
    """An S3 store behind the proxy, opened before any fault."""
    store = open_store(s3_root)
    assert isinstance(store, S3Store)
    return store


@pytest.fixture(scope="module")
def large_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "model.safetensors"
    path.write_bytes(random.Random(0).randbytes(2 * MULTIPART_BYTES + 12345))
    return path


# ---- what every store promises


def test_store_returns_what_was_put(store: ObjectStore) -> None:
    store.put("run-1/plan.json", b"{}")
    assert store.get("run-1/plan.json") == b"{}"
    assert store.exists("run-1/plan.json")


def test_put_replaces_an_older_object(store: ObjectStore) -> None:
    store.put("a", b"a longer first version")
    store.put("a", b"second")
    assert store.get("a") == b"second"


def test_empty_object_is_an_object(store: ObjectStore) -> None:
    assert store.put_new("a", b"")
    assert store.get("a") == b""


def test_put_new_leaves_an_existing_object_as_it_is(store: ObjectStore) -> None:
    assert store.put_new("a/record.json", b"first")
    assert not store.put_new("a/record.json", b"second")
    assert not store.put_new("a/record.json", b"first")
    assert store.get("a/record.json") == b"first"


def test_sixteen_threads_creating_one_object_have_exactly_one_winner(store: ObjectStore) -> None:
    barrier = Barrier(16)

    def create(writer: int) -> bool:
        barrier.wait()
        return store.put_new("lease", b"%d" % writer)

    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(create, range(16)))
    assert won.count(True) == 1
    assert store.get("lease") == b"%d" % won.index(True)


def test_processes_creating_one_object_have_exactly_one_winner(store: ObjectStore) -> None:
    script = "import sys; from tasks.storage import open_store; print(open_store(sys.argv[1]).put_new('lease', b'x'))"
    command = [sys.executable, "-c", script, store.root]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert sorted(answers) == ["False", "False", "True"]


def test_reader_never_sees_a_partial_object(store: ObjectStore) -> None:
    versions = [bytes([version]) * size for version, size in enumerate([10, 300_000, 1_000, 700_000])]
    store.put("a", versions[0])
    written = Event()

    def write() -> None:
        for version in versions * 5:
            store.put("a", version)
        written.set()

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        reads = 0
        while not written.is_set() and not writing.done():
            assert store.get("a") in versions
            reads += 1
        writing.result()
    assert reads > 0


def test_missing_object_is_named(store: ObjectStore, tmp_path: Path) -> None:
    assert not store.exists("run-1/plan.json")
    with pytest.raises(ObjectMissingError, match=r"^store \S+: there is no object run-1/plan\.json$"):
        store.get("run-1/plan.json")
    with pytest.raises(KeyError):
        store.get_file("run-1/plan.json", tmp_path / "plan.json")
    assert not (tmp_path / "plan.json").exists()


def test_list_is_sorted_and_takes_folders_not_prefixes_of_names(store: ObjectStore) -> None:
    for key in ["run-1/b", "run-10/c", "run-1/a/x", "z"]:
        store.put(key, b"")
    assert store.list() == ["run-1/a/x", "run-1/b", "run-10/c", "z"]
    assert store.list("run-1") == store.list("run-1/") == ["run-1/a/x", "run-1/b"]
    assert store.list("nothing/here") == []


def test_folder_of_objects_is_no_object(store: ObjectStore) -> None:
    store.put("a/b", b"1")
    assert not store.exists("a")
    with pytest.raises(ObjectMissingError):
        store.get("a")


def test_deleted_object_is_gone_and_deleting_again_is_fine(store: ObjectStore) -> None:
    store.put("a/b", b"1")
    store.delete("a/b")
    store.delete("a/b")
    assert not store.exists("a/b")
    assert store.put_new("a/b", b"2")


@pytest.mark.parametrize(
    "key", ["", "/a", "a/", "a//b", "..", "a/../b", ".hidden", "a\\b", "a b", "ä", "a\n", "x" * 600]
)
def test_keys_that_do_not_fit_every_store_are_refused(store: ObjectStore, key: str, tmp_path: Path) -> None:
    for use in [store.get, store.exists, store.delete, lambda k: store.put(k, b""), lambda k: store.put_new(k, b"")]:
        with pytest.raises(InvalidKeyError, match="cannot name an object"):
            use(key)
    with pytest.raises(InvalidKeyError):
        store.put_file(key, tmp_path)
    if key:  # an empty folder is the whole store
        with pytest.raises(InvalidKeyError):
            store.list(key.rstrip("/") + "/..")
    assert store.list() == []


_NAMES = st.text("abZ019_-.", min_size=1, max_size=8).filter(lambda name: not name.startswith("."))
_ACTIONS = st.sampled_from(["put", "put_new", "delete"])


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.tuples(_ACTIONS, _NAMES, st.binary(max_size=20)), max_size=12))
def test_store_behaves_like_a_dictionary(store: ObjectStore, steps: list[tuple[str, str, bytes]]) -> None:
    for key in store.list():
        store.delete(key)
    expected: dict[str, bytes] = {}
    for action, name, data in steps:
        key = f"folder-{len(name)}/{name}"
        if action == "put":
            store.put(key, data)
            expected[key] = data
        elif action == "put_new":
            assert store.put_new(key, data) == (key not in expected)
            expected.setdefault(key, data)
        else:
            store.delete(key)
            expected.pop(key, None)
    assert {key: store.get(key) for key in store.list()} == expected


def test_large_file_survives_the_way_there_and_back(store: ObjectStore, large_file: Path, tmp_path: Path) -> None:
    store.put_file("release/model.safetensors", large_file)
    back = tmp_path / "new folder" / "back"
    store.get_file("release/model.safetensors", back)
    assert back.read_bytes() == large_file.read_bytes()
    assert list(back.parent.iterdir()) == [back]
    assert store.list() == ["release/model.safetensors"]


def test_store_opened_for_reading_sees_what_another_wrote(store: ObjectStore) -> None:
    store.put("a", b"1")
    assert open_store(store.root, write=False).get("a") == b"1"


def test_opening_a_store_twice_lists_nothing_of_its_own(root: str) -> None:
    open_store(root)
    assert open_store(root).list() == []


# ---- addresses and permissions


@pytest.mark.parametrize("root", ["gs://bucket/x", "http://127.0.0.1/x", "file:///tmp/x"])
def test_other_kinds_of_address_are_refused(root: str) -> None:
    with pytest.raises(StoreError, match=r"only folders and s3://bucket/prefix are supported"):
        open_store(root)


@pytest.mark.usefixtures("s3_root")
@pytest.mark.parametrize("root", ["s3://", "s3:///x", "s3://UPPER/x", "s3://fedpipe-test/../x"])
def test_malformed_s3_address_is_refused(root: str) -> None:
    with pytest.raises(StoreError, match=r"needs the form s3://bucket"):
        open_store(root)


@pytest.mark.usefixtures("s3_root")
@pytest.mark.parametrize("write", [True, False])
def test_missing_bucket_is_named(write: bool) -> None:
    with pytest.raises(StoreError, match=r"store s3://no-such-bucket-here/x: .* has no bucket 'no-such-bucket-here'"):
        open_store("s3://no-such-bucket-here/x", write=write)


def test_wrong_credentials_are_told_at_once(s3_proxy: FaultProxy, s3_root: str) -> None:
    s3_proxy.faults = itertools.repeat("deny")
    with pytest.raises(StoreError, match=r"refused the credentials \(InvalidAccessKeyId\); check AWS_ACCESS_KEY_ID"):
        open_store(s3_root)
    assert len(s3_proxy.requests) == 1


def test_missing_credentials_are_told(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)
    with pytest.raises(StoreError, match=r"no complete credentials were found; set AWS_ACCESS_KEY_ID"):
        open_store(s3_root)


def test_unreachable_endpoint_is_told_within_seconds(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    started = time.monotonic()
    with pytest.raises(StoreError, match=r"http://127\.0\.0\.1:1 could not be reached, .* check AWS_ENDPOINT_URL"):
        open_store(s3_root)
    assert time.monotonic() - started < 15


def test_server_without_conditional_writes_is_refused(s3_proxy: FaultProxy, s3_root: str) -> None:
    s3_proxy.faults = itertools.repeat("ignore condition")
    with pytest.raises(StoreError, match=r"ignores If-None-Match, so records could be overwritten"):
        open_store(s3_root)


@pytest.mark.usefixtures("s3_root")
def test_malformed_endpoint_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "not an address")
    with pytest.raises(StoreError, match="the AWS settings cannot be used"):
        open_store("s3://fedpipe-test/x")


def test_importing_the_stores_imports_no_boto3() -> None:
    script = "import sys, tasks.records; print('boto3' in sys.modules, 'torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["False", "False"]


# ---- faults on the way to S3


@pytest.mark.parametrize("fault", ["cut request", "lose answer", "slow down"])
def test_requests_are_repeated_after_a_fault(s3_store: S3Store, s3_proxy: FaultProxy, fault: str) -> None:
    s3_proxy.faults = iter([fault])
    s3_store.put("a", b"1" * 100_000)
    s3_proxy.faults = iter([fault])
    assert s3_store.get("a") == b"1" * 100_000
    s3_proxy.faults = iter([fault])
    assert s3_store.list() == ["a"]
    s3_proxy.faults = iter([fault])
    assert s3_store.exists("a")


def test_truncated_object_is_read_again(s3_store: S3Store, s3_proxy: FaultProxy) -> None:
    s3_store.put("a", b"0123456789" * 1000)
    s3_proxy.faults = iter(["truncate answer", "truncate answer"])
    assert s3_store.get("a") == b"0123456789" * 1000


def test_more_faults_than_the_sdk_repeats_are_outlasted(s3_store: S3Store, s3_proxy: FaultProxy) -> None:
    s3_proxy.faults = iter(["slow down", "cut request"] * 3)
    s3_store.put("a", b"1")
    assert s3_store.get("a") == b"1"


def test_winner_whose_answer_was_lost_knows_that_it_won(s3_store: S3Store, s3_proxy: FaultProxy) -> None:
    s3_proxy.faults = iter(["lose answer"])
    assert s3_store.put_new("lease", b"same")
    s3_proxy.faults = iter(["lose answer"])
    assert not s3_store.put_new("lease", b"same")


def test_racing_creators_behind_a_bad_line_have_exactly_one_winner(s3_store: S3Store, s3_proxy: FaultProxy) -> None:
    s3_proxy.faults = iter(["lose answer", None, "cut request", "lose answer", "slow down"])
    with ThreadPoolExecutor(6) as pool:
        won = list(pool.map(lambda _: s3_store.put_new("lease", b"same"), range(6)))
    assert won.count(True) == 1


@pytest.mark.parametrize("fault", ["cut request", "slow down"])
def test_outage_ends_in_bounded_time_with_a_reason(s3_store: S3Store, s3_proxy: FaultProxy, fault: str) -> None:
    s3_proxy.faults = itertools.repeat(fault)
    started = time.monotonic()
    with pytest.raises(StoreError, match=r"could not be reached, or kept failing, for 1 s"):
        replace(s3_store, patience_seconds=1.0).put("a", b"1")
    assert time.monotonic() - started < 20
    s3_proxy.faults = iter(())
    assert not s3_store.exists("a")


def test_upload_in_parts_survives_faults(
    s3_store: S3Store, s3_proxy: FaultProxy, large_file: Path, tmp_path: Path
) -> None:
    s3_proxy.requests.clear()
    s3_proxy.faults = iter([None, "cut request", "slow down", None, "lose answer"])
    s3_store.put_file("model", large_file)
    assert any("partNumber=3" in request for request in s3_proxy.requests)
    s3_proxy.faults = iter(["truncate answer", None, "cut request"])
    s3_store.get_file("model", tmp_path / "model")
    assert (tmp_path / "model").read_bytes() == large_file.read_bytes()


def test_interrupted_upload_shows_nothing(s3_store: S3Store, s3_proxy: FaultProxy, large_file: Path) -> None:
    s3_proxy.faults = itertools.chain([None, None], itertools.repeat("cut request"))
    with pytest.raises(StoreError):
        replace(s3_store, patience_seconds=0.1).put_file("model", large_file)
    s3_proxy.faults = iter(())
    assert s3_store.list() == []


def test_nothing_is_lost_or_mixed_up_on_a_line_that_drops_every_fourth_request(
    s3_store: S3Store, s3_proxy: FaultProxy
) -> None:
    def bad_line() -> Iterator[str | None]:
        dice = random.Random(7)
        while True:
            yield dice.choice(["cut request", "lose answer", "truncate answer", "slow down", *[None] * 12])

    s3_proxy.faults = bad_line()
    with ThreadPoolExecutor(4) as pool:
        won = list(pool.map(lambda number: s3_store.put_new(f"k-{number % 20}", b"%d" % (number % 20)), range(40)))
    assert won.count(True) == 20
    assert [s3_store.get(key) for key in s3_store.list()] == [
        key.removeprefix("k-").encode() for key in s3_store.list()
    ]
