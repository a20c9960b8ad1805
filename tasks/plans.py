"""Which plan holds in which round: the federation's, and from the round on in which an edge joined, one that has it.

An edge joins when its profile comes after the plan was made. It is planned for alone, within the deadline and the
modules the others share, whose plans stay as they are; so nothing starts anew. A method that tries sizes has a plan
for every round in which they change.
"""

import hashlib
from pathlib import PurePosixPath

from fedpipe_core.errors import IntegrityError, ObjectMissingError, PlanError
from fedpipe_core.methods import METHODS
from fedpipe_core.plan_schemas import EdgePlan, FederationPlan
from fedpipe_core.planning import plan_federation
from fedpipe_core.profile_schemas import EdgeProfile, ModelShape
from fedpipe_core.schemas import GlobalRecord
from fedpipe_core.trials import plan_trial
from tasks import progress
from tasks.coordinator import Coordinator
from tasks.federation import read_profiles
from tasks.records import RunKeys, get_record, put_record, recorded_edges
from tasks.storage import ObjectStore


def plan_keys(store: ObjectStore, keys: RunKeys) -> dict[int, str]:
    """Key of every plan by the round from which it holds; 0 is the federation's first."""
    return {0: keys.plan} | {int(PurePosixPath(key).stem): key for key in store.list(keys.joined_plans)}


def plan_at(store: ObjectStore, keys: RunKeys, round_index: int, signed_by: str | None = None) -> FederationPlan:
    """The plan that holds in a round. Raises ObjectMissingError when there is none."""
    plans = plan_keys(store, keys)
    newest = max(first for first in plans if first <= round_index)
    found = get_record(store, plans[newest], FederationPlan, signed_by)
    if found is None:
        raise ObjectMissingError(f"store {store.root}: there is no object {plans[newest]}; resume the run")
    return found


def plan_round(coordinator: Coordinator, round_index: int) -> FederationPlan:
    """The plan for an open round, with every edge whose profile has come by now."""
    store, keys = coordinator.store, coordinator.keys
    plan = plan_at(store, keys, round_index, coordinator.config.coordinator_signs)
    listed = {edge.edge_id for edge in coordinator.config.remote_edges} - set(plan.dropped)
    joining = sorted(listed.intersection(recorded_edges(store, keys.profiles)) - set(plan.edges)) if listed else []
    tries = METHODS[coordinator.config.method].trials and round_index > 1
    if not (joining or tries) or store.exists(keys.joined_plan(round_index)):
        return plan
    joined = plan
    for edge_id in joining:
        try:
            joined = _with_edge(coordinator, joined, edge_id)
        except (PlanError, IntegrityError) as error:
            progress.note(f"{edge_id} cannot join round {round_index}: {error}")
            continue
        progress.note(f"{edge_id} joins in round {round_index}")
    if tries:
        joined = _with_trial(coordinator, joined, round_index)
    if tries or joined is not plan:
        put_record(store, keys.joined_plan(round_index), joined, coordinator.signing_key)
    return joined


def _with_trial(coordinator: Coordinator, plan: FederationPlan, round_index: int) -> FederationPlan:
    """The plan in which edges try other sizes around the one that the round starts from."""
    config, keys = coordinator.config, coordinator.keys
    record = get_record(coordinator.store, keys.global_record(round_index), GlobalRecord, config.coordinator_signs)
    profiles = read_profiles(coordinator)
    if record is None or set(plan.edges) - set(profiles):
        raise IntegrityError(
            f"store {coordinator.store.root}: {keys.global_record(round_index)} or a profile is missing"
        )
    found = plan_trial(plan, record.ranks, round_index, coordinator.shape, profiles, config)
    tried = {edge_id: edge.trial.candidate for edge_id, edge in found.edges.items() if edge.trial}
    if tried:
        said = ", ".join(f"{edge_id} {candidate}" for edge_id, candidate in tried.items())
        progress.note(f"round {round_index} tries sizes: {said}")
    return found


def _with_edge(coordinator: Coordinator, plan: FederationPlan, edge_id: str) -> FederationPlan:
    store, key = coordinator.store, coordinator.keys.profile(edge_id)
    profile = get_record(store, key, EdgeProfile, coordinator.config.edge_signs(edge_id))
    if profile is None:
        raise PlanError(f"{edge_id}: its profile {key} is gone; profile the edge again")
    content = hashlib.sha256(store.get(key)).hexdigest()
    return plan.model_copy(
        update={
            "edges": plan.edges | {edge_id: _plan_edge(coordinator, plan, profile)},
            "profiles": plan.profiles | {edge_id: content},
        }
    )


def _plan_edge(coordinator: Coordinator, plan: FederationPlan, profile: EdgeProfile) -> EdgePlan:
    """Plan one edge within the others' modules, largest rank and deadline."""
    config = coordinator.config
    adapted = METHODS[config.method].form == "lora"  # the others do not choose modules
    modules = set(plan.planned_modules if adapted else coordinator.shape.modules)
    ranks = tuple(rank for rank in config.planning.ranks if rank <= plan.largest_rank)
    planning = config.planning.model_copy(update={"round_seconds": plan.round_seconds, "ranks": ranks})
    shared = config.model_copy(update={"planning": planning})
    found = plan_federation(_only(coordinator.shape, modules), {profile.edge_id: _seen(profile, modules)}, shared)
    return found.edges[profile.edge_id]


def _only(shape: ModelShape, modules: set[str]) -> ModelShape:
    return shape.model_copy(update={"modules": {m: value for m, value in shape.modules.items() if m in modules}})


def _seen(profile: EdgeProfile, modules: set[str]) -> EdgeProfile:
    """The profile as far as these modules are concerned."""
    kept = {m: v for m, v in profile.activation_cost.per_token_module_bytes.items() if m in modules}
    cost = profile.activation_cost.model_copy(update={"per_token_module_bytes": kept})
    scores = {m: value for m, value in profile.scores.items() if m in modules}
    return profile.model_copy(update={"activation_cost": cost, "scores": scores})
