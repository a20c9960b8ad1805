"""Where a registered version comes from, read from the store: config, code, base, data fingerprints, every update.

The hashes that bind a version to its run are `tasks.manifest`'s.
"""

from pathlib import Path

from pydantic import ValidationError

from fedpipe_core.config import FederationConfig
from fedpipe_core.errors import IntegrityError, ReleaseError
from fedpipe_core.lineage_schemas import AcceptedUpdate, EdgeData, Lineage, RefusedUpdate, RoundLineage
from fedpipe_core.plan_schemas import FederationPlan
from fedpipe_core.profile_schemas import EdgeProfile
from fedpipe_core.schemas import FederationRecord, GlobalRecord, RoundRecord, UpdateRecord
from tasks.records import R, RunKeys, get_record
from tasks.registry import ADAPTER_TAG, MANIFEST_TAG, ModelVersion, aliases
from tasks.storage import ObjectStore, open_store
from tasks.tracking import RUN_TAG, STORE_TAG


def lasting_root(store: ObjectStore) -> str:
    """The store's address as a version keeps it: absolute."""
    return store.root if "://" in store.root else str(Path(store.root).absolute())


def store_of(version: ModelVersion, root: str | None = None) -> tuple[ObjectStore, RunKeys]:
    """Open the store a version's run lies in, at `root` if it was moved.

    Raises ReleaseError when the version names no run.
    """
    missing = [tag for tag in (RUN_TAG, STORE_TAG, ADAPTER_TAG) if tag not in version.tags]
    if missing:
        raise ReleaseError(
            f"model {version.name} version {version.version} has no tag {missing[0]}, so it was not released by "
            "FedPipe and nothing is known of where it comes from"
        )
    return open_store(root or version.tags[STORE_TAG], write=False), RunKeys(version.tags[RUN_TAG])


def needed_record(store: ObjectStore, key: str, kind: type[R]) -> R:
    """Read a record of a finished run. Raises ReleaseError when it is missing."""
    record = get_record(store, key, kind)
    if record is None:
        raise ReleaseError(
            f"{key} is missing in {store.root}, so the run is not finished or its objects were removed; finish it with "
            "`fedpipe run CONFIG --run NAME --resume`, or restore the object"
        )
    return record


def stored_config(store: ObjectStore, record: FederationRecord) -> FederationConfig:
    """The config a run was started with. Raises IntegrityError when this FedPipe cannot read it."""
    try:
        return FederationConfig.model_validate(record.config)
    except ValidationError as error:
        raise IntegrityError(
            f"store {store.root}: the config of run {record.run} does not fit this FedPipe "
            f"({error.errors()[0]['msg']}); use the one that wrote it, {record.code_version}"
        ) from None


def read_lineage(version: ModelVersion, root: str | None = None) -> Lineage:
    """Tell where a version comes from.

    Raises ReleaseError or IntegrityError naming the record that is missing or damaged.
    """
    store, keys = store_of(version, root)
    federation = needed_record(store, keys.federation, FederationRecord)
    config = stored_config(store, federation)
    needed_record(store, keys.plan, FederationPlan)
    return Lineage(
        model=version.name,
        version=version.version,
        aliases=aliases(version),
        run=keys.run,
        store=store.root,
        code_version=federation.code_version,
        code_commit=federation.code_commit,
        config_sha256=federation.config_sha256,
        config=federation.config,
        base=config.model.base,
        base_sha256=federation.base_sha256,
        adapter_sha256=version.tags[ADAPTER_TAG],
        manifest_sha256=version.tags.get(MANIFEST_TAG),
        edges={edge.edge_id: _edge_data(store, keys, edge.edge_id) for edge in config.edges},
        rounds=[_round_lineage(store, keys, index + 1) for index in range(config.rounds)],
    )


def _edge_data(store: ObjectStore, keys: RunKeys, edge_id: str) -> EdgeData:
    profile = needed_record(store, keys.profile(edge_id), EdgeProfile)
    return EdgeData(
        num_examples=profile.num_examples,
        num_validation_examples=profile.num_validation_examples,
        data_fingerprint=profile.data_fingerprint,
    )


def _round_lineage(store: ObjectStore, keys: RunKeys, index: int) -> RoundLineage:
    needed_record(store, keys.round_record(index), RoundRecord)
    made = needed_record(store, keys.global_record(index + 1), GlobalRecord)
    counted = {
        edge_id: needed_record(store, keys.update_record(index, edge_id), UpdateRecord) for edge_id in made.counted
    }
    return RoundLineage(
        round=index,
        start_sha256=needed_record(store, keys.global_record(index), GlobalRecord).adapter.sha256,
        adapter_sha256=made.adapter.sha256,
        accepted={
            edge_id: AcceptedUpdate(sha256=made.counted[edge_id], num_examples=record.num_examples)
            for edge_id, record in counted.items()
        },
        refused={
            edge_id: RefusedUpdate(sha256=made.refused.get(edge_id), reason=reason)
            for edge_id, reason in made.dropped.items()
        },
    )
