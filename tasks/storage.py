"""Where bytes live: a folder or an S3 bucket behind one small protocol; the only module that knows boto3.

It decides how S3 creates an object once; which faults are retried is `tasks.s3_faults`'. What keys are called, and
whether bytes are the promised ones, is left to `tasks.records`: a server is never relied on for integrity. boto3 is
imported when the first S3 store is opened. Stores may be used from many threads and processes at once.
"""

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar
from uuid import uuid4

from fedpipe_core.errors import StoreError
from tasks.keys import MARKER, check_folder, check_key, is_key
from tasks.local_store import LocalStore
from tasks.s3_faults import explained, is_transient, pauses, status_of

T = TypeVar("T")

PATIENCE_SECONDS = 60.0  # outlasts a restart of the server; a longer outage ends the run, which stays resumable
OPENING_PATIENCE_SECONDS = 3.0  # a wrong address should be told at once
MULTIPART_BYTES = 16 * 2**20  # files above this go up, and come down, in parts that are retried one by one

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


class ObjectStore(Protocol):
    """Whole objects under relative, posix keys (`check_key`). Every method raises StoreError when the store fails."""

    @property
    def root(self) -> str:
        """Address of the store, as given to `open_store`."""

    def put(self, key: str, data: bytes) -> None:
        """Write a small object, over an older one if there is one; readers see the old or the new one, whole."""

    def put_new(self, key: str, data: bytes) -> bool:
        """Create an object: True when this call wrote it, False when it existed. Of many callers exactly one wins."""

    def put_file(self, key: str, path: Path) -> None:
        """Like `put`, streaming a file of any size."""

    def get(self, key: str) -> bytes:
        """Read an object whole. Raises ObjectMissingError."""

    def get_file(self, key: str, path: Path) -> None:
        """Stream an object to `path`, which appears when it is whole. Raises ObjectMissingError."""

    def exists(self, key: str) -> bool:
        """Whether there is an object of that key."""

    def list(self, folder: str = "") -> list[str]:
        """Sorted keys of all objects below a folder (`a/b` or `a/b/`, not a string prefix); all keys by default."""

    def delete(self, key: str) -> None:
        """Remove an object; one that is missing is fine."""


def open_store(root: str, *, write: bool = True, patient: bool = False) -> ObjectStore:
    """Open `s3://bucket/prefix` or a folder, and check that it can be used.

    With `write` a folder is made where there is none, and an empty object `.fedpipe` proves that the store can be
    written and creates objects only once. `write=False` is for readers, and for edges whose permissions cover their
    own keys alone: it only checks that the store answers. A store that does not answer is told within seconds, as the
    address may be wrong; `patient` is for those who know that it is right. On S3, endpoint, credentials and region are
    the SDK's own (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_REGION, ...).

    Raises StoreError when the address is of another kind, the folder cannot be made or written, the bucket is
    missing, credentials are missing or refused, the endpoint is unreachable or ignores `If-None-Match`.
    """
    if "://" in root and not root.startswith("s3://"):
        raise StoreError(f"store {root}: only folders and s3://bucket/prefix are supported; change the address")
    if not root.startswith("s3://"):
        folder = LocalStore(root)
        folder.check(write=write)
        return folder
    store = _connect_s3(root)
    (store if patient else replace(store, patience_seconds=OPENING_PATIENCE_SECONDS)).check(write=write)
    return store


@dataclass(frozen=True)
class S3Store:
    """A bucket of S3 or of a server that speaks it, `If-None-Match` included (Minio, Ceph, moto, ...).

    A request that meets a transient fault is repeated, after growing, jittered pauses, until `patience_seconds` have
    passed since the first fault.
    """

    root: str
    client: Any = field(repr=False)
    patience_seconds: float = PATIENCE_SECONDS

    @property
    def bucket(self) -> str:
        """Name of the bucket."""
        return self.root.removeprefix("s3://").partition("/")[0]

    @property
    def prefix(self) -> str:
        """What goes before each key: empty, or ending in "/"."""
        prefix = self.root.removeprefix("s3://").partition("/")[2].strip("/")
        return prefix and prefix + "/"

    def check(self, *, write: bool) -> None:
        """Raise StoreError unless the bucket answers, or takes an object and refuses to create it twice."""
        if not write:
            self._call("", lambda: self.client.list_objects_v2(Bucket=self.bucket, Prefix=self.prefix, MaxKeys=1))
        elif self._create(MARKER, b"") and self._create(MARKER, b""):
            raise StoreError(
                f"store {self.root}: {self.client.meta.endpoint_url} ignores If-None-Match, so records could be "
                "overwritten; use a server with conditional writes"
            )

    def put(self, key: str, data: bytes) -> None:
        where = self._where(key)
        self._call(key, lambda: self.client.put_object(**where, Body=data))

    def put_new(self, key: str, data: bytes) -> bool:
        return self._create(check_key(key), data)

    def put_file(self, key: str, path: Path) -> None:
        where = self._where(key)

        def upload() -> None:
            with path.open("rb") as source:
                self.client.upload_fileobj(source, *where.values(), Config=_transfer_config())

        self._call(key, upload)

    def get(self, key: str) -> bytes:
        where = self._where(key)
        # Reading to the end belongs to the request: botocore counts the bytes against Content-Length there.
        return self._call(key, lambda: bytes(self.client.get_object(**where)["Body"].read()))

    def get_file(self, key: str, path: Path) -> None:
        where = self._where(key)
        temporary = path.with_name(f".{path.name}.{uuid4().hex}")
        path.parent.mkdir(parents=True, exist_ok=True)

        def download() -> None:
            with temporary.open("wb") as target:
                self.client.download_fileobj(*where.values(), target, Config=_transfer_config())

        try:
            self._call(key, download)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def exists(self, key: str) -> bool:
        where = self._where(key)
        return self._call(key, lambda: self._head(where)) is not None

    def list(self, folder: str = "") -> list[str]:
        prefix = self.prefix + (f"{folder}/" if (folder := check_folder(folder)) else "")
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        found = self._call("", lambda: [entry["Key"] for page in pages for entry in page.get("Contents", [])])
        return sorted(key for name in found if is_key(key := name.removeprefix(self.prefix)))

    def delete(self, key: str) -> None:
        where = self._where(key)
        self._call(key, lambda: self.client.delete_object(**where))

    def _where(self, key: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self.prefix + check_key(key)}

    def _create(self, name: str, data: bytes) -> bool:
        where, write_id = {"Bucket": self.bucket, "Key": self.prefix + name}, uuid4().hex

        def create() -> bool:
            try:
                self.client.put_object(**where, Body=data, IfNoneMatch="*", Metadata={"write-id": write_id})
            except self.client.exceptions.ClientError as error:
                if status_of(error) != 412:
                    raise
                # After a lost answer the retry meets its own object: the id tells it from another writer's.
                found = self._head(where)
                return found is not None and found["Metadata"].get("write-id") == write_id
            return True

        return self._call(name, create)

    def _head(self, where: dict[str, str]) -> dict[str, Any] | None:
        try:
            return dict(self.client.head_object(**where))
        except self.client.exceptions.ClientError as error:
            if status_of(error) == 404:
                return None
            raise

    def _call(self, key: str, request: Callable[[], T]) -> T:
        """Make a request until it is answered, patience ends, or the fault is one that repeating cannot cure."""
        from botocore.exceptions import BotoCoreError, ClientError
        from s3transfer.exceptions import RetriesExceededError

        waits = pauses(self.patience_seconds)
        while True:
            try:
                return request()
            except (BotoCoreError, ClientError, RetriesExceededError) as error:
                pause_seconds = next(waits, None)
                if pause_seconds is None or not is_transient(error):
                    endpoint = self.client.meta.endpoint_url
                    raise explained(error, key, self.root, endpoint, self.patience_seconds) from error
            time.sleep(pause_seconds)


def _connect_s3(root: str) -> S3Store:
    """Set up a client; nothing is sent yet."""
    from botocore.exceptions import BotoCoreError

    settings = frozenset((name, value) for name, value in os.environ.items() if name.startswith("AWS_"))
    try:
        store = S3Store(root, _s3_client(settings))
    except (BotoCoreError, ValueError) as error:
        raise StoreError(f"store {root}: the AWS settings cannot be used ({error}); correct them") from error
    if not _BUCKET.fullmatch(store.bucket) or (store.prefix and not is_key(store.prefix[:-1])):
        raise StoreError(f"store {root}: needs the form s3://bucket or s3://bucket/prefix; correct it")
    return store


@lru_cache(maxsize=8)
def _s3_client(settings: frozenset[tuple[str, str]]) -> Any:
    """A client for these settings, which the SDK reads itself; kept, as it takes 0.25 s and tasks open stores anew."""
    from boto3.session import Session
    from botocore.config import Config

    def client(addressing_style: Literal["auto", "path"]) -> Any:
        config = Config(
            connect_timeout=5,
            read_timeout=20,
            max_pool_connections=32,
            retries={"mode": "standard", "total_max_attempts": 3},
            # The newer default sends checksums as trailers, which many S3-compatible servers do not take.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"addressing_style": addressing_style},
        )
        return session.client("s3", region_name=region, config=config)

    session = Session()
    region = os.environ.get("AWS_REGION") or session.region_name or "us-east-1"
    aws = client("auto")
    # Only Amazon resolves bucket names as host names.
    return aws if "amazonaws.com" in aws.meta.endpoint_url else client("path")


def _transfer_config() -> Any:
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(multipart_threshold=MULTIPART_BYTES, multipart_chunksize=MULTIPART_BYTES, max_concurrency=4)
