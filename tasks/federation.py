"""The coordinator's steps: open a run, plan it, aggregate and judge each round.

Everything it decides is written to the store before the next step begins; a step whose record is there is not repeated.
"""

import hashlib
import json
import subprocess
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from fedpipe_core.adapters import Adapter
from fedpipe_core.config import FederationConfig
from fedpipe_core.errors import ConfigError, PlanError, QuorumError, SignatureError
from fedpipe_core.evaluation import metrics_of, share_of
from fedpipe_core.methods import method_shape
from fedpipe_core.plan_schemas import FederationPlan, SavedPlan
from fedpipe_core.planning import plan_federation
from fedpipe_core.predictions import Answers
from fedpipe_core.profile_schemas import EdgeProfile
from fedpipe_core.schemas import FederationRecord, GlobalRecord, UpdateRecord
from fedpipe_core.tokenizing import TokenizedExamples
from fedpipe_core.wire import encode_adapter
from tasks import progress
from tasks.aggregation import Arbiter, Combination, StoredRun, combine_updates, update_record
from tasks.coordinator import Coordinator
from tasks.edge import dense_base, read_global
from tasks.keys import is_key
from tasks.records import RunKeys, get_record, put_data, put_record, recorded_edges
from tasks.signing import signing_key
from tasks.storage import ObjectStore


def open_federation(config: FederationConfig, store: ObjectStore, keys: RunKeys, resume: bool) -> FederationRecord:
    """Write what the run is, or check that a resumed run still is what it was.

    Raises ConfigError when the name is taken or unusable, when there is nothing to resume, or when the config changed
    since.
    """
    if "/" in keys.run or not is_key(keys.run):
        raise ConfigError(
            f"run name {keys.run!r} cannot name a folder of the store; use letters, digits, '_', '-' and '.', not first"
        )
    known = get_record(store, keys.federation, FederationRecord)
    if known is not None and not resume:
        raise ConfigError(
            f"run {keys.run} exists in {store.root}; continue it with --resume, or choose another name with --run"
        )
    if known is None and resume:
        raise ConfigError(f"run {keys.run} is not in {store.root}, so there is nothing to resume; leave out --resume")
    record = _describe(config, keys.run, dense_base(config).sha256)
    if known is not None:
        _check_unchanged(known, record)
        return known
    put_record(store, keys.federation, record, signing_key(config))
    return record


def withdraw_federation(coordinator: Coordinator) -> None:
    """Remove everything of a run that was not planned, so that its name is free again."""
    for key in coordinator.store.list(coordinator.keys.run):
        coordinator.store.delete(key)


def forget_failures(coordinator: Coordinator, round_index: int) -> None:
    """Let edges that failed in the open round try again."""
    store, keys = coordinator.store, coordinator.keys
    for edge_id in recorded_edges(store, keys.failures(round_index)):
        store.delete(keys.failure(round_index, edge_id))


def adopt_plan(coordinator: Coordinator, saved: SavedPlan) -> None:
    """Publish a plan made before, with the profiles it rests on. Raises PlanError when it is not for these edges."""
    expected, found = {edge.edge_id for edge in coordinator.config.edges}, {*saved.plan.edges, *saved.plan.dropped}
    modules = method_shape(coordinator.shape, coordinator.config).modules
    unknown = [name for name in saved.plan.planned_modules if name not in modules]
    if expected != found or unknown:
        difference = f"edges {sorted(expected ^ found)}" if expected != found else f"modules {unknown[:3]}"
        raise PlanError(f"the saved plan and the config differ in {difference}; make a plan with this config")
    signing_edges = {edge.edge_id for edge in coordinator.config.remote_edges if coordinator.signing_key}
    for edge_id, profile in saved.profiles.items():
        if edge_id not in signing_edges:  # those measure again, since nobody else can sign for them
            put_record(coordinator.store, coordinator.keys.profile(edge_id), profile, coordinator.signing_key)
    put_record(coordinator.store, coordinator.keys.plan, saved.plan, coordinator.signing_key)


@task(task_run_name="plan", cache_policy=NO_CACHE)
def plan(coordinator: Coordinator) -> FederationPlan:
    """Plan every edge from its profile and publish the plan; a published plan is obeyed.

    Raises PlanError when an edge has no feasible plan.
    """
    store, keys = coordinator.store, coordinator.keys
    known = get_record(store, keys.plan, FederationPlan, coordinator.config.coordinator_signs)
    if known is not None:
        return known
    with progress.working("coordinator", "plan"):
        profiles = read_profiles(coordinator)
        found = plan_federation(coordinator.shape, profiles, coordinator.config)
    hashes = {edge_id: hashlib.sha256(store.get(keys.profile(edge_id))).hexdigest() for edge_id in profiles}
    found = found.model_copy(update={"profiles": hashes})
    put_record(store, keys.plan, found, coordinator.signing_key)
    return found


def read_profiles(coordinator: Coordinator) -> dict[str, EdgeProfile]:
    """The profiles that are there, in the config's order of edges. An edge on a machine of its own may come later."""
    found = {edge.edge_id: _usable_profile(coordinator, edge.edge_id) for edge in coordinator.config.edges}
    missing = [edge.edge_id for edge in coordinator.config.local_edges if found[edge.edge_id] is None]
    if missing:
        raise QuorumError(f"no profile from {', '.join(missing)}; look at that edge's log, then resume the run")
    return {edge_id: profile for edge_id, profile in found.items() if profile is not None}


def _usable_profile(coordinator: Coordinator, edge_id: str) -> EdgeProfile | None:
    """An edge's profile; None where there is none, or one that the edge did not sign."""
    key, signed_by = coordinator.keys.profile(edge_id), coordinator.config.edge_signs(edge_id)
    try:
        return get_record(coordinator.store, key, EdgeProfile, signed_by)
    except SignatureError as error:
        progress.note(f"{edge_id}: {error}")
        return None


@task(task_run_name="publish the first adapter", cache_policy=NO_CACHE)
def publish_first_adapter(coordinator: Coordinator, federation_plan: FederationPlan) -> None:
    """Publish what round 1 starts from: the base itself, in the form in which the method changes it."""
    if coordinator.store.exists(coordinator.keys.global_record(1)):
        return
    ranks = dict.fromkeys(federation_plan.planned_modules, federation_plan.largest_rank)
    shapes = method_shape(coordinator.shape, coordinator.config).modules
    adapter = coordinator.form.first(coordinator.base.model, shapes, ranks, coordinator.config.seed)
    data = encode_adapter(adapter, coordinator.config.exchange.dtype_of_global)
    _publish_adapter(coordinator, 1, Combination(data, adapter.ranks, {}, {}, {}, ()))


@task(task_run_name="round {round_index} aggregate", cache_policy=NO_CACHE)
def aggregate_round(coordinator: Coordinator, federation_plan: FederationPlan, round_index: int) -> GlobalRecord:
    """Check the round's updates, aggregate those that count and publish what the next round starts from.

    Raises QuorumError, leaving the round open, when fewer than `min_edges` count.
    """
    key, signed_by = coordinator.keys.global_record(round_index + 1), coordinator.config.coordinator_signs
    known = get_record(coordinator.store, key, GlobalRecord, signed_by)
    if known is not None:
        return known
    run = StoredRun(coordinator.config, coordinator.store, coordinator.keys, coordinator.base.sha256, federation_plan)
    with progress.working("coordinator", "aggregate"):
        arbiter = _held_out_arbiter(coordinator) if coordinator.config.coordinator_judges else None
        found = combine_updates(run, round_index, arbiter)
        told = f"round {round_index} has {len(found.counted)} updates that count"
        require_quorum(coordinator.config, told, len(found.counted), found.dropped)
    return _publish_adapter(coordinator, round_index + 1, found)


@task(task_run_name="round {round_index} evaluate", cache_policy=NO_CACHE)
def evaluate(coordinator: Coordinator, round_index: int, whole: bool) -> Answers:
    """Judge what `round_index` starts from on the held-out set, or on the configured share of it."""
    signed_by = coordinator.config.coordinator_signs
    _, adapter = read_global(coordinator.store, coordinator.keys, round_index, signed_by)
    share = None if whole else share_of(coordinator.held_out, coordinator.config)
    with progress.working("coordinator", "evaluate"):
        return _judged(coordinator, adapter, share)


def _judged(coordinator: Coordinator, adapter: Adapter, rows: TokenizedExamples | None) -> Answers:
    """Answers of what would be released now, on the given held-out rows or on all of them."""
    return coordinator.judge(coordinator.form.judged(coordinator.base.model, adapter), rows)


def _held_out_arbiter(coordinator: Coordinator) -> Arbiter:
    """Let an update that opposes the others count where it takes the loss on held-out rows down.

    An edge with labels of its own, when the others have learned theirs, points as far against them as one that sends
    its change reversed; what tells them apart is what they do (Zeno, 1805.10032).
    """

    def counts(edge_id: str, still: Callable[[], Adapter], moved: Callable[[], Adapter]) -> bool:
        rows = share_of(coordinator.held_out, coordinator.config)
        before, after = (metrics_of(_judged(coordinator, make(), rows))["loss"] for make in (still, moved))
        verdict = "counts" if after < before else "does not count"
        progress.note(
            f"{edge_id}: its change opposes the other edges', and {verdict}: it takes the held-out loss from "
            f"{before:.4f} to {after:.4f}"
        )
        return after < before

    return counts


def round_updates(coordinator: Coordinator, round_index: int) -> dict[str, UpdateRecord]:
    """The update records of a round, by edge."""
    return {
        edge.edge_id: record
        for edge in coordinator.config.edges
        if (record := update_record(coordinator.store, coordinator.keys, round_index, edge.edge_id)) is not None
    }


def config_sha256(config: FederationConfig) -> str:
    """Hash of a resolved config."""
    return hashlib.sha256(json.dumps(config.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def _describe(config: FederationConfig, run: str, base_sha256: str) -> FederationRecord:
    return FederationRecord(
        run=run,
        config=config.model_dump(mode="json"),
        config_sha256=config_sha256(config),
        seed=config.seed,
        code_version=version("fedpipe"),
        code_commit=_code_commit(),
        base_sha256=base_sha256,
    )


def _code_commit() -> str | None:
    """Commit of a source checkout; None for an installed package."""
    folder = Path(__file__).resolve().parent.parent
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def _check_unchanged(known: FederationRecord, now: FederationRecord) -> None:
    if known.base_sha256 != now.base_sha256:
        raise ConfigError(
            f"run {known.run} was started on base model {known.base_sha256[:12]}, found {now.base_sha256[:12]}; "
            "bring back the model it was started on, or start a new run"
        )
    changed = [key for key in _changed_keys(known.config, now.config) if key.partition(".")[0] != "remote"]
    if changed:
        raise ConfigError(
            f"run {known.run} was started with another config; changed since: {', '.join(changed)}; "
            "resume with the config it was started with, or start a new run with --run NAME"
        )


def _changed_keys(known: object, now: object, prefix: str = "") -> list[str]:
    if isinstance(known, Mapping) and isinstance(now, Mapping):
        keys = [*known, *(key for key in now if key not in known)]
        pairs = [(f"{prefix}.{key}" if prefix else str(key), known.get(key), now.get(key)) for key in keys]
        return [found for name, old, new in pairs for found in _changed_keys(old, new, name)]
    if isinstance(known, list) and isinstance(now, list) and len(known) == len(now):
        items = enumerate(zip(known, now, strict=True))
        return [found for index, (old, new) in items for found in _changed_keys(old, new, f"{prefix}.{index}")]
    return [] if known == now else [prefix]


def _publish_adapter(coordinator: Coordinator, round_index: int, found: Combination) -> GlobalRecord:
    keys = coordinator.keys
    record = GlobalRecord(
        run=keys.run,
        round=round_index,
        base_sha256=coordinator.base.sha256,
        adapter=put_data(coordinator.store, keys.global_data(round_index), found.data),
        counted=found.counted,
        refused=found.refused,
        dropped=found.dropped,
        opposed=found.opposed,
        pardoned=found.pardoned,
        ranks=found.ranks,
    )
    put_record(coordinator.store, keys.global_record(round_index), record, coordinator.signing_key)
    return record


def require_quorum(config: FederationConfig, found: str, counted: int, dropped: Mapping[str, str]) -> None:
    """Raise QuorumError when fewer than `min_edges` count; `found` tells what they did, and how many."""
    if counted < config.min_edges:
        reasons = "; ".join(f"{edge_id}: {reason}" for edge_id, reason in sorted(dropped.items()))
        raise QuorumError(
            f"{found}, min_edges is {config.min_edges}; {reasons}; mend these edges and continue with --resume"
        )
