"""What lies in the store and under which key: records written once, and the data they vouch for.

It decides the layout and the order (data first, its record last) and checks bytes against their hash. How bytes travel
is left to `tasks.storage`; whether an adapter's shapes and values are usable is left to `fedpipe_core`.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import TypeVar

from pydantic import ValidationError

from fedpipe_core.errors import IntegrityError, ObjectMissingError, RunError
from fedpipe_core.record import Record
from fedpipe_core.schemas import DataReference, RoundRecord
from fedpipe_core.signatures import SigningKey, sign_record, unsigned, verify_record
from tasks.storage import ObjectStore

R = TypeVar("R", bound=Record)
MOST_SHARED = 2
_shared: dict[tuple[str, str | None], tuple[bytes, Record]] = {}
_sharing = Lock()


@dataclass(frozen=True)
class RunKeys:
    """Every key of one run, relative to the store. A present record means that its step is done.

    federation.json, plan.json, profiles/<edge>.json, manifest.json, release/<name>, result.json, and per round:
    rounds/0003/{global,round}.json, global.safetensors, updates/<edge>.{safetensors,json}, failures/<edge>.json, and
    plans/0003.json where an edge joined in round 3. Where edges judge what a round starts from, it also has
    evaluations/<edge>.json, evaluation_failures/<edge>.json and judged.json. Signs of life are in leases/.
    """

    run: str

    @property
    def federation(self) -> str:
        """What the run is: written first."""
        return f"{self.run}/federation.json"

    @property
    def plan(self) -> str:
        """What every edge shall do."""
        return f"{self.run}/plan.json"

    @property
    def result(self) -> str:
        """What the command printed: written last."""
        return f"{self.run}/result.json"

    @property
    def manifest(self) -> str:
        """Hashes of all that the released adapter came from."""
        return f"{self.run}/manifest.json"

    @property
    def profiles(self) -> str:
        """Folder of the edges' profiles."""
        return f"{self.run}/profiles"

    def profile(self, edge_id: str) -> str:
        """What an edge measured."""
        return f"{self.profiles}/{edge_id}.json"

    def release(self, name: str) -> str:
        """A file of the released model, such as `int8/model.safetensors`."""
        return f"{self.run}/release/{name}"

    def global_record(self, round_index: int) -> str:
        """What a round starts from."""
        return f"{self.round_folder(round_index)}/global.json"

    def global_data(self, round_index: int) -> str:
        """The adapter a round starts from."""
        return f"{self.round_folder(round_index)}/global.safetensors"

    def updates(self, round_index: int) -> str:
        """Folder of what the edges returned."""
        return f"{self.round_folder(round_index)}/updates"

    def update_record(self, round_index: int, edge_id: str) -> str:
        """What an edge returned."""
        return f"{self.updates(round_index)}/{edge_id}.json"

    def update_data(self, round_index: int, edge_id: str) -> str:
        """The adapter an edge returned."""
        return f"{self.updates(round_index)}/{edge_id}.safetensors"

    def failures(self, round_index: int) -> str:
        """Folder of the reasons why edges returned nothing; apart from the updates, as an edge id may hold dots."""
        return f"{self.round_folder(round_index)}/failures"

    def failure(self, round_index: int, edge_id: str) -> str:
        """Why an edge returned nothing."""
        return f"{self.failures(round_index)}/{edge_id}.json"

    def evaluations(self, round_index: int) -> str:
        """Folder of what the edges found the adapter worth that a round starts from."""
        return f"{self.round_folder(round_index)}/evaluations"

    def evaluation(self, round_index: int, edge_id: str) -> str:
        """What an edge found the adapter worth that a round starts from."""
        return f"{self.evaluations(round_index)}/{edge_id}.json"

    def evaluation_failures(self, round_index: int) -> str:
        """Folder of the reasons why edges did not judge."""
        return f"{self.round_folder(round_index)}/evaluation_failures"

    def evaluation_failure(self, round_index: int, edge_id: str) -> str:
        """Why an edge did not judge."""
        return f"{self.evaluation_failures(round_index)}/{edge_id}.json"

    def judged(self, round_index: int) -> str:
        """Closes the edges' judging of the adapter that a round starts from."""
        return f"{self.round_folder(round_index)}/judged.json"

    @property
    def coordinator_lease(self) -> str:
        """The coordinator's sign of life."""
        return f"{self.run}/leases/coordinator.json"

    def edge_lease(self, edge_id: str) -> str:
        """An edge's sign of life, apart from the coordinator's, whose name an edge may have."""
        return f"{self.run}/leases/edges/{edge_id}.json"

    @property
    def joined_plans(self) -> str:
        """Folder of the plans that hold from a later round on."""
        return f"{self.run}/plans"

    def joined_plan(self, round_index: int) -> str:
        """The plan from this round on: the one before it with an edge that joined, or with sizes to try."""
        return f"{self.joined_plans}/{round_index:04d}.json"

    def round_record(self, round_index: int) -> str:
        """Closes a round."""
        return f"{self.round_folder(round_index)}/round.json"

    def round_folder(self, round_index: int) -> str:
        """Folder of everything about a round."""
        return f"{self.run}/rounds/{round_index:04d}"


def recorded_edges(store: ObjectStore, folder: str) -> list[str]:
    """Ids of the edges with a record in a folder (such as `profiles` or `updates`): one request for all edges."""
    paths = map(PurePosixPath, store.list(folder))
    return [path.stem for path in paths if path.suffix == ".json"]


def closed_rounds(store: ObjectStore, keys: RunKeys) -> list[RoundRecord]:
    """The records of the rounds closed so far, from the first on."""
    closed: list[RoundRecord] = []
    while (record := get_record(store, keys.round_record(len(closed) + 1), RoundRecord)) is not None:
        closed.append(record)
    return closed


def put_data(store: ObjectStore, key: str, data: bytes) -> DataReference:
    """Write data and return what its record must say of it. Overwrites what a killed attempt left."""
    store.put(key, data)
    return DataReference(key=key, sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))


def put_data_file(store: ObjectStore, key: str, path: Path) -> DataReference:
    """Like `put_data`, streaming a file of any size."""
    reference = DataReference(key=key, sha256=file_sha256(path), size_bytes=path.stat().st_size)
    store.put_file(key, path)
    return reference


def get_data(store: ObjectStore, reference: DataReference) -> bytes:
    """Read data and check it.

    Raises IntegrityError when its size or hash is not the promised one, ObjectMissingError when it is not there.
    """
    data = store.get(reference.key)
    _check(store, reference, len(data), hashlib.sha256(data).hexdigest())
    return data


def get_data_file(store: ObjectStore, reference: DataReference, path: Path) -> None:
    """Like `get_data`, streaming to a file, which is removed again when it is refused."""
    store.get_file(reference.key, path)
    try:
        _check(store, reference, path.stat().st_size, file_sha256(path))
    except IntegrityError:
        path.unlink()
        raise


def put_record(store: ObjectStore, key: str, record: Record, signer: SigningKey | None = None) -> None:
    """Write a record once, signed if a key is given.

    Repeating it is fine; raises RunError when another one stands there.
    """
    content = record.model_dump_json(indent=1).encode()
    if signer is not None:
        content = json.dumps(sign_record(json.loads(content), key, signer), indent=1).encode()
    if not store.put_new(key, content) and store.get(key) != content:
        raise RunError(
            f"store {store.root}: {key} was written before with other content, and a record is never changed; "
            "give the run another name, or resume it with what it was started with"
        )


def offer_record(store: ObjectStore, key: str, record: Record) -> bool:
    """Write a record unless one stands there, which two writers may try: True when this call wrote it."""
    return store.put_new(key, record.model_dump_json(indent=1).encode())


def get_record(store: ObjectStore, key: str, kind: type[R], signed_by: str | None = None) -> R | None:
    """Read a record, or None when it is not there yet. With `signed_by` it must be signed with that public key.

    Raises IntegrityError when it is no record of that kind, SignatureError when it is not signed as it must be.
    """
    try:
        content = store.get(key)
    except ObjectMissingError:
        return None
    return _parsed(store, key, content, kind, signed_by)


def get_shared_record(store: ObjectStore, key: str, kind: type[R], signed_by: str | None = None) -> R | None:
    """`get_record` for what many readers of one process keep, as its edges do the plan: equal bytes are one record."""
    try:
        content = store.get(key)
    except ObjectMissingError:
        return None
    with _sharing:
        kept = _shared.get((key, signed_by))
        if kept is None or kept[0] != content:
            kept = _shared[key, signed_by] = content, _parsed(store, key, content, kind, signed_by)
            while len(_shared) > MOST_SHARED:
                _shared.pop(next(iter(_shared)))
    record = kept[1]
    return record if isinstance(record, kind) else _parsed(store, key, content, kind, signed_by)


def _parsed(store: ObjectStore, key: str, content: bytes, kind: type[R], signed_by: str | None) -> R:
    try:
        document = json.loads(content)
    except ValueError as error:
        raise _damaged(store, key, kind, f"it is no JSON: {error}") from error
    if not isinstance(document, dict):
        raise _damaged(store, key, kind, f"it holds {type(document).__name__}")
    if signed_by is not None:
        verify_record(document, key, signed_by)
    try:
        return kind.model_validate(unsigned(document))
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))} {fault['msg']}".strip() for fault in error.errors())
        raise _damaged(store, key, kind, faults) from error


def _damaged(store: ObjectStore, key: str, kind: type[R], faults: str) -> IntegrityError:
    return IntegrityError(
        f"store {store.root}: {key} is no {kind.__name__} ({faults}); it was damaged or written by another "
        "version of FedPipe: remove it to have it made again"
    )


def _check(store: ObjectStore, reference: DataReference, size_bytes: int, sha256: str) -> None:
    if (size_bytes, sha256) != (reference.size_bytes, reference.sha256):
        raise IntegrityError(
            f"store {store.root}: {reference.key} holds {size_bytes} bytes with sha256 {sha256[:12]}…, but its record "
            f"promises {reference.size_bytes} bytes with {reference.sha256[:12]}…; it must not be used"
        )


def file_sha256(path: Path) -> str:
    """Hash of a file of any size."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
