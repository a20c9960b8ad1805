"""A run's records gathered from the store for its report; how they look is `fedpipe_core.report`'s to decide."""

from pathlib import Path

from fedpipe_core.errors import ConfigError, ReleaseError
from fedpipe_core.plan_schemas import FederationPlan
from fedpipe_core.profile_schemas import EdgeProfile
from fedpipe_core.report import ReportFacts, render_page
from fedpipe_core.result_schemas import ReleaseReport, RunResult
from fedpipe_core.schemas import FederationRecord, GlobalRecord, UpdateRecord
from tasks.plans import plan_at
from tasks.records import RunKeys, closed_rounds, get_record
from tasks.storage import ObjectStore, open_store


def write_report(root: str, run: str, path: Path) -> Path:
    """Write a run's page and return its full path. Raises ReleaseError when the file cannot be written."""
    page = render_page(read_facts(open_store(root, write=False), RunKeys(run)))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ReleaseError(f"{path} cannot be written ({error.strerror}); choose another place with --out") from None
    return path.absolute()


def read_facts(store: ObjectStore, keys: RunKeys) -> ReportFacts:
    """Read what a report is made from; a run that still goes on gives what there is.

    Raises ConfigError when there is no such run, or it has no plan yet.
    """
    federation = get_record(store, keys.federation, FederationRecord)
    plan = get_record(store, keys.plan, FederationPlan)
    if federation is None or plan is None:
        what = "is not in" if federation is None else "has no plan yet in"
        raise ConfigError(f"run {keys.run} {what} {store.root}; `fedpipe status` lists the runs there")
    rounds = closed_rounds(store, keys)
    result = get_record(store, keys.result, RunResult)
    release = get_record(store, keys.release("report.json"), ReleaseReport) or _released(result)
    made = [get_record(store, keys.global_record(entry.round + 1), GlobalRecord) for entry in rounds]
    plan = plan_at(store, keys, len(closed_rounds(store, keys)))
    profiles = {edge_id: get_record(store, keys.profile(edge_id), EdgeProfile) for edge_id in plan.edges}
    return ReportFacts(
        federation=federation,
        plan=plan,
        profiles={edge_id: profile for edge_id, profile in profiles.items() if profile},
        rounds=rounds,
        made=[record for record in made if record],
        updates=[_updates(store, keys, plan, entry.round) for entry in rounds],
        baseline=result.baseline_metrics if result else release.baseline_metrics if release else {},
        release=release,
    )


def _released(result: RunResult | None) -> ReleaseReport | None:
    if result is None or result.model is None:
        return None
    return ReleaseReport(exports=result.exports, model=result.model)


def _updates(store: ObjectStore, keys: RunKeys, plan: FederationPlan, round_index: int) -> dict[str, UpdateRecord]:
    found = {edge: get_record(store, keys.update_record(round_index, edge), UpdateRecord) for edge in plan.edges}
    return {edge_id: record for edge_id, record in found.items() if record is not None}
