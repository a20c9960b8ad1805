"""Profile every edge and plan, as a run would, and train nothing."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.artifacts import create_table_artifact
from pydantic import ValidationError

from fedpipe_core.config import FederationConfig
from fedpipe_core.errors import PlanError, StoreError
from fedpipe_core.methods import METHODS
from fedpipe_core.plan_schemas import FederationPlan, SavedPlan
from fedpipe_core.planning import infeasible_edges
from fedpipe_core.profile_schemas import EdgeProfile
from fedpipe_core.trials import foreseen_rounds
from flows.all_edges import Edges, edge_sessions
from flows.pipeline import profile_edges
from tasks import federation, remote_edges, reports
from tasks.coordinator import Coordinator
from tasks.exports import check_exports
from tasks.records import RunKeys
from tasks.storage import open_store


@flow(name="plan_federation")
def plan_federation(config: FederationConfig, save: str | None = None) -> tuple[dict[str, Any], bool]:
    """Plan a federation and say what each edge would do; true beside it when an edge has no feasible plan.

    config: the federation. save: file to keep the plan in. Nothing stays in the store.
    """
    keys = RunKeys(f"{config.name}-plan-{datetime.now():%Y%m%d-%H%M%S-%f}")
    coordinator = Coordinator(config, open_store(config.store), keys)
    try:
        if config.remote_edges:
            federation.open_federation(config, coordinator.store, keys, resume=False)
        check_exports(coordinator)
        with remote_edges.serving(coordinator) as remotes:
            profile_edges(coordinator, Edges(edge_sessions(coordinator), remotes))
        return _planned(coordinator, save)
    finally:
        federation.withdraw_federation(coordinator)


def read_saved_plan(path: Path) -> SavedPlan:
    """Read what `save` kept. Raises PlanError when the file is anything else."""
    try:
        return SavedPlan.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise PlanError(f"{path} holds no plan ({reason}); keep one with `fedpipe plan CONFIG --save FILE`") from None


def _planned(coordinator: Coordinator, save: str | None) -> tuple[dict[str, Any], bool]:
    profiles, keys = federation.read_profiles(coordinator), coordinator.keys
    infeasible = infeasible_edges(coordinator.shape, profiles, coordinator.config)
    if infeasible and (coordinator.config.planning.unfit_edges == "refuse" or len(infeasible) == len(profiles)):
        return {"run": keys.run, "plan": {}, "infeasible": infeasible, "totals": None}, True
    plan = federation.plan(coordinator)
    create_table_artifact(reports.plan_rows(plan), key="plan", description=f"Plan of {coordinator.config.name}")
    if save is not None:
        _save(SavedPlan(plan=plan, profiles=profiles), Path(save))
    edges = {edge_id: report.model_dump(mode="json") for edge_id, report in _reports(coordinator, plan).items()}
    totals = _totals(_foreseen(coordinator, plan, profiles), plan.round_seconds)
    return {"run": keys.run, "plan": edges, "infeasible": plan.dropped, "totals": totals}, False


def _reports(coordinator: Coordinator, plan: FederationPlan) -> dict[str, Any]:
    return dict(reports.plan_reports(coordinator, plan))


def _save(saved: SavedPlan, path: Path) -> None:
    try:
        path.write_text(saved.model_dump_json(indent=1), encoding="utf-8")
    except OSError as error:
        raise StoreError(
            f"plan cannot be kept in {path}: {error.strerror}; name a file in a folder that exists"
        ) from None


def _foreseen(
    coordinator: Coordinator, plan: FederationPlan, profiles: Mapping[str, EdgeProfile]
) -> list[tuple[FederationPlan, int]]:
    """The plans of all rounds, each with how many it holds for."""
    if METHODS[coordinator.config.method].trials:
        return foreseen_rounds(plan, coordinator.shape, profiles, coordinator.config)
    return [(plan, coordinator.config.rounds)]


def _totals(foreseen: Sequence[tuple[FederationPlan, int]], deadline_seconds: float) -> dict[str, float]:
    costs = [([edge.predicted for edge in plan.edges.values()], rounds) for plan, rounds in foreseen]
    return {
        "seconds": sum(rounds * max(cost.round_seconds for cost in edges) for edges, rounds in costs),
        "upload_bytes": sum(rounds * cost.upload_bytes for edges, rounds in costs for cost in edges),
        "download_bytes": sum(rounds * cost.download_bytes for edges, rounds in costs for cost in edges),
        "deadline_seconds": deadline_seconds,
        "trial_rounds": sum(any(edge.trial for edge in plan.edges.values()) * rounds for plan, rounds in foreseen),
    }
