"""Whether a registered version is what its records say: every object's hash, and every round computed again.

A fault is told by the object it concerns; a round with an object at fault is not computed again, since it could only
repeat the news. What the objects mean is `tasks.lineage`'s to tell.
"""

import hashlib
import json
from dataclasses import replace

from pydantic import ValidationError

from fedpipe_core.errors import FedPipeError, IntegrityError, ObjectMissingError
from fedpipe_core.lineage_schemas import Fault, RoundVerification, RunManifest, Verification
from fedpipe_core.plan_schemas import FederationPlan
from fedpipe_core.schemas import FederationRecord, GlobalRecord
from tasks.aggregation import StoredRun, combine_updates
from tasks.lineage import needed_record, store_of, stored_config
from tasks.manifest import object_hashes
from tasks.plans import plan_at, plan_keys
from tasks.records import RunKeys, get_data
from tasks.registry import ADAPTER_TAG, BASE_TAG, CONFIG_TAG, MANIFEST_TAG, ModelVersion
from tasks.storage import ObjectStore

Hashes = dict[str, str]


def verify_version(version: ModelVersion, root: str | None = None, last_rounds: int | None = None) -> Verification:
    """Compare every object with the manifest of the release, and compute every round's aggregate again.

    With `last_rounds` only that many of the last rounds are looked at. Raises ReleaseError when the version names no
    run, StoreError when its store cannot be read; whatever else is wrong is returned as a fault.
    """
    store, keys = store_of(version, root)
    promised, faults = _manifest(version, store, keys)
    rounds: list[RoundVerification] = []
    objects: Hashes = {}
    try:
        run, tag_faults = _stored_run(version, store, keys)
        first = 1 if last_rounds is None else max(1, run.config.rounds - last_rounds + 1)
        objects = {key: sha256 for key, sha256 in promised.items() if not _is_before(keys, key, first)}
        faults += tag_faults + _object_faults(store, objects)
        for index in range(first, run.config.rounds + 1):
            found, round_faults = _verify_round(run, index, {fault.subject for fault in faults})
            rounds.append(found)
            faults += round_faults
        faults += _last_faults(version, run, {fault.subject for fault in faults})
    except FedPipeError as error:  # a record without which nothing more can be said
        faults.append(Fault(subject=f"run {keys.run}", found=str(error)))
    return Verification(
        model=version.name,
        version=version.version,
        run=keys.run,
        store=store.root,
        adapter_sha256=version.tags[ADAPTER_TAG],
        objects=len(objects),
        rounds=rounds,
        faults=faults,
        verified=not faults,
    )


def _manifest(version: ModelVersion, store: ObjectStore, keys: RunKeys) -> tuple[Hashes, list[Fault]]:
    """The hashes the version vouches for; none where the manifest itself is not the one it vouches for."""
    try:
        content = store.get(keys.manifest)
        found = RunManifest.model_validate_json(content)
    except (ObjectMissingError, ValidationError) as error:
        what = "is missing" if isinstance(error, ObjectMissingError) else "is no manifest"
        return {}, [Fault(subject=keys.manifest, found=f"{what}; only the records themselves can be compared")]
    sha256, promised = hashlib.sha256(content).hexdigest(), version.tags.get(MANIFEST_TAG)
    if sha256 != promised:
        words = f"has sha256 {sha256}, but the version promises {promised or 'none'}"
        return {}, [Fault(subject=keys.manifest, found=words)]
    return found.objects, []


def _stored_run(version: ModelVersion, store: ObjectStore, keys: RunKeys) -> tuple[StoredRun, list[Fault]]:
    federation = needed_record(store, keys.federation, FederationRecord)
    plan = needed_record(store, keys.plan, FederationPlan)
    config_sha256 = hashlib.sha256(json.dumps(federation.config, sort_keys=True).encode()).hexdigest()
    found = {
        "config_sha256": (config_sha256, federation.config_sha256, version.tags.get(CONFIG_TAG)),
        "base_sha256": (federation.base_sha256, version.tags.get(BASE_TAG)),
    }
    faults = [
        Fault(
            subject=keys.federation, found=f"{name} differs between the record and the version: {' and '.join(known)}"
        )
        for name, values in found.items()
        if len(known := sorted({str(value) for value in values})) > 1
    ]
    config = stored_config(store, federation)
    return StoredRun(config, store, keys, federation.base_sha256, plan), faults


def _is_before(keys: RunKeys, key: str, first_round: int) -> bool:
    """Whether a key lies in the folder of a round before `first_round`."""
    return any(key.startswith(keys.round_folder(index) + "/") for index in range(1, first_round))


def _object_faults(store: ObjectStore, promised: Hashes) -> list[Fault]:
    faults: list[Fault] = []
    there = set(store.list(next(iter(promised)).partition("/")[0])) if promised else set()
    faults += [Fault(subject=key, found="is missing") for key in promised if key not in there]
    found = object_hashes(store, [key for key in promised if key in there])
    return faults + [
        Fault(subject=key, found=f"was altered: it has sha256 {sha256}, and had {promised[key]} when it was released")
        for key, sha256 in found.items()
        if sha256 != promised[key]
    ]


def _verify_round(run: StoredRun, index: int, at_fault: set[str]) -> tuple[RoundVerification, list[Fault]]:
    """A round's recorded and recomputed adapter; not recomputed when any object it rests on is at fault."""
    keys = run.keys
    made = needed_record(run.store, keys.global_record(index + 1), GlobalRecord)
    plans = {key for first, key in plan_keys(run.store, keys).items() if first <= index}
    shared = {keys.federation, *plans, keys.global_record(index + 1)}
    spoiled = [key for key in at_fault if key in shared or key.startswith(keys.round_folder(index) + "/")]
    sha256, faults = (None, []) if spoiled else _recompute(run, index, made)
    counted, recorded = len(made.counted), made.adapter.sha256
    found = RoundVerification(round=index, updates=counted, recorded_sha256=recorded, recomputed_sha256=sha256)
    return found, faults


def _recompute(run: StoredRun, index: int, made: GlobalRecord) -> tuple[str | None, list[Fault]]:
    subject = f"round {index}"
    try:
        planned = replace(run, plan=plan_at(run.store, run.keys, index, run.config.coordinator_signs))
        # Who was pardoned, the coordinator's signed record tells: judging again would need the base and its machine.
        again = combine_updates(
            planned, index, lambda edge_id, *_: edge_id in made.pardoned, answered={*made.counted, *made.refused}
        )
    except FedPipeError as error:
        return None, [Fault(subject=subject, found=f"cannot be computed again: {error}")]
    sha256 = hashlib.sha256(again.data).hexdigest()
    faults = [
        Fault(
            subject=subject,
            found=f"counted the update of {edge_id}, which does not count now: {again.dropped[edge_id]}",
        )
        for edge_id in made.counted
        if edge_id not in again.counted
    ]
    faults += [
        Fault(subject=subject, found=f"refused the update of {edge_id}, which counts now")
        for edge_id in made.refused
        if edge_id in again.counted
    ]
    if sha256 != made.adapter.sha256 and not faults:
        words = f"leads to adapter {sha256}, but its record says {made.adapter.sha256}"
        faults.append(Fault(subject=subject, found=f"{words}; other hardware or libraries may round otherwise"))
    return sha256, faults


def _last_faults(version: ModelVersion, run: StoredRun, at_fault: set[str]) -> list[Fault]:
    """The adapter after the last round is what its record says, and the one the version was merged from."""
    key = run.keys.global_record(run.config.rounds + 1)
    last, promised = needed_record(run.store, key, GlobalRecord).adapter, version.tags[ADAPTER_TAG]
    if last.sha256 != promised:
        return [Fault(subject=key, found=f"names adapter {last.sha256}, but the version was made of {promised}")]
    try:
        get_data(run.store, last)
    except (IntegrityError, ObjectMissingError) as error:
        return [] if last.key in at_fault else [Fault(subject=last.key, found=str(error))]
    return []
