"""Every object a released adapter came from, by hash, and whether each is still what it was when its round was closed.

A round is closed with the hash of every record it rests on, the round before it included, and those records hold the
hashes of all data: an object changed since, or gone, is told by its key before anything is released. Whether the
updates lead to the adapter again is `tasks.verification`'s to find out.
"""

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from fedpipe_core.config import FederationConfig
from fedpipe_core.errors import IntegrityError, ReleaseError
from fedpipe_core.evaluation_schemas import JudgedRecord
from fedpipe_core.lineage_schemas import RunManifest
from fedpipe_core.result_schemas import RunResult
from fedpipe_core.schemas import GlobalRecord, RoundRecord
from tasks.lineage import needed_record
from tasks.plans import plan_at, plan_keys
from tasks.records import RunKeys, file_sha256, get_record
from tasks.storage import ObjectStore

READS_AT_ONCE = 16
_NEXT = "nothing was released; restore the object from a copy, or tune the model again under another run's name"


def record_hashes(store: ObjectStore, keys: RunKeys, made: GlobalRecord) -> dict[str, str]:
    """Hash of every record that the round which made `made` rests on, beside those of the rounds before, by key."""
    index = made.round - 1
    return object_hashes(store, [*_opening_records(store, keys, index), *_answer_records(store, keys, made)])


def run_manifest(store: ObjectStore, keys: RunKeys, config: FederationConfig) -> RunManifest:
    """List every object the adapter after the last round came from; an update that came too late is no part of it.

    Reads them all. Raises ReleaseError naming what is missing, IntegrityError what was altered.
    """
    result = get_record(store, keys.result, RunResult)
    told = {entry.round: entry for entry in result.rounds} if result else {}
    records: dict[str, str] = {}  # with the hash each had when its round was closed, where that is known
    data: dict[str, str] = {}
    for index in range(1, config.rounds + 1):
        made, closed = _closed_round(store, keys, index, told.get(index))
        start = needed_record(store, keys.global_record(index), GlobalRecord)
        known = [*_opening_records(store, keys, index), *_answer_records(store, keys, made), keys.round_record(index)]
        records |= dict.fromkeys(known, "") | closed.records
        data |= {made.adapter.key: made.adapter.sha256, start.adapter.key: start.adapter.sha256}
        answers = (made.counted | made.refused).items()
        data |= {keys.update_data(index, edge_id): sha256 for edge_id, sha256 in answers}
    _require_present(store, keys, [*records, *data])
    found = object_hashes(store, [*records, *data])
    _require_unaltered(store, records | data, found)
    return RunManifest(run=keys.run, objects=dict(sorted(found.items())))


def object_hashes(store: ObjectStore, keys: Iterable[str]) -> dict[str, str]:
    """Hash of each object as it is now, by key. Raises ObjectMissingError."""
    ordered = list(keys)
    with ThreadPoolExecutor(READS_AT_ONCE) as pool, TemporaryDirectory() as folder:
        hashes = pool.map(lambda key: _object_hash(store, key, Path(folder)), ordered)
        return dict(zip(ordered, hashes, strict=True))


def _object_hash(store: ObjectStore, key: str, folder: Path) -> str:
    """Hash of a record, which is small, or of data of any size, which goes through a file."""
    if key.endswith(".json"):
        return hashlib.sha256(store.get(key)).hexdigest()
    path = folder / hashlib.sha256(key.encode()).hexdigest()
    try:
        store.get_file(key, path)
        return file_sha256(path)
    finally:
        path.unlink(missing_ok=True)


def _opening_records(store: ObjectStore, keys: RunKeys, index: int) -> list[str]:
    """What a round began with: the round before it, or the run's first records, and a plan that was made for it."""
    first = index == 1
    begun = [keys.federation, keys.global_record(1), *_judging_records(store, keys, 1)]
    opening = begun if first else [keys.round_record(index - 1)]
    plans = [key for start, key in plan_keys(store, keys).items() if start == index or (first and start == 0)]
    profiles = map(keys.profile, plan_at(store, keys, index).edges) if plans else ()
    return [*opening, *plans, *profiles]


def _answer_records(store: ObjectStore, keys: RunKeys, made: GlobalRecord) -> list[str]:
    """What a round's edges answered, and what was made of it."""
    index, answers = made.round - 1, made.counted | made.refused
    failures = [keys.failure(index, edge_id) for edge_id in made.dropped if edge_id not in answers]
    return [
        *(keys.update_record(index, edge_id) for edge_id in answers),
        *(key for key in failures if store.exists(key)),
        keys.global_record(made.round),
        *_judging_records(store, keys, made.round),
    ]


def _judging_records(store: ObjectStore, keys: RunKeys, index: int) -> list[str]:
    """What the edges found a round's start worth, where they judge."""
    closed = get_record(store, keys.judged(index), JudgedRecord)
    return [keys.judged(index), *(keys.evaluation(index, edge_id) for edge_id in closed.evaluations)] if closed else []


def _closed_round(
    store: ObjectStore, keys: RunKeys, index: int, told: RoundRecord | None
) -> tuple[GlobalRecord, RoundRecord]:
    """What a round led to, and its record. Raises IntegrityError when one does not fit the other."""
    made = needed_record(store, keys.global_record(index + 1), GlobalRecord)
    closed = needed_record(store, keys.round_record(index), RoundRecord)
    differs = keys.result if told not in (None, closed) else None
    if closed.adapter_sha256 != made.adapter.sha256:
        differs = keys.global_record(index + 1)
    if differs:
        raise IntegrityError(
            f"store {store.root}: {keys.round_record(index)} and {differs} differ on round {index}, so one of them was "
            f"altered since; {_NEXT}"
        )
    return made, closed


def _require_present(store: ObjectStore, keys: RunKeys, needed: Iterable[str]) -> None:
    there = set(store.list(keys.run))
    missing = [key for key in needed if key not in there]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ReleaseError(f"store {store.root}: {missing[0]}{more}, part of what was tuned, is missing; {_NEXT}")


def _require_unaltered(store: ObjectStore, promised: dict[str, str], found: dict[str, str]) -> None:
    for key, sha256 in promised.items():
        if sha256 and found[key] != sha256:
            raise IntegrityError(
                f"store {store.root}: {key} was altered since its round was closed: it has sha256 {found[key][:12]}…, "
                f"and had {sha256[:12]}…; {_NEXT}"
            )
