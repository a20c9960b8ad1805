"""What a run does from an opened store to its result; `flows.federation` is the flow around it."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from prefect.artifacts import create_table_artifact

from fedpipe_core.config import FederationConfig
from fedpipe_core.errors import PlanError, TrackingError
from fedpipe_core.plan_schemas import FederationPlan, SavedPlan
from fedpipe_core.report import render_page
from fedpipe_core.result_schemas import RunResult
from fedpipe_core.schemas import RoundRecord
from flows.all_edges import Edges, edge_sessions, on_all_edges
from flows.evaluation import judge_adapter
from flows.release import release_model, require_releasable, track
from tasks import edge, federation, mlflow_client, progress, remote_edges, reports, tracking
from tasks.coordinator import Coordinator
from tasks.edge import EdgeSession
from tasks.exports import check_exports
from tasks.plans import plan_at, plan_round
from tasks.records import RunKeys, get_record, put_record
from tasks.report import read_facts
from tasks.reports import Outcome
from tasks.storage import ObjectStore
from tasks.tracking import TrackedRun


@dataclass(frozen=True)
class LoadedRun:
    """A run with its base and all data of this process in memory, and none of it found wrong."""

    coordinator: Coordinator
    sessions: Sequence[EdgeSession]


def load_run(config: FederationConfig, store: ObjectStore, keys: RunKeys, release: bool) -> LoadedRun:
    """Load the base and all data, to find faults in them before the run leaves a trace in the store."""
    if release:
        require_releasable(config)
    coordinator = Coordinator(config, store, keys)
    mlflow_client.connect_early(tracking.tracking_uri(config.tracking, store.root))
    sessions = edge_sessions(coordinator)
    _read_all_data(coordinator, sessions)
    return LoadedRun(coordinator, sessions)


def open_run(loaded: LoadedRun, resume: bool) -> RunResult | None:
    """Write what the run is, or check that it still is what it was; its result where it has one already."""
    coordinator = loaded.coordinator
    federation.open_federation(coordinator.config, coordinator.store, coordinator.keys, resume)
    return get_record(coordinator.store, coordinator.keys.result, RunResult)


def finish_run(loaded: LoadedRun, saved_plan: SavedPlan | None, release: bool, started: float) -> RunResult:
    """Plan, train, judge and release; `started` is when the run began, by the performance counter."""
    coordinator = loaded.coordinator
    store, keys = coordinator.store, coordinator.keys
    with remote_edges.serving(coordinator) as remotes:
        edges = Edges(loaded.sessions, remotes)
        plan = _plan(coordinator, edges, saved_plan)
        tracked = track(coordinator)
        with _closing_on_failure(tracked):
            outcome = _run_rounds(coordinator, edges, plan, tracked)
    with _closing_on_failure(tracked):
        released = release_model(keys.run, store.root, dict(outcome.baseline)) if release else None
    seconds = time.perf_counter() - started
    result = reports.run_result(coordinator, tracked, outcome, released, seconds)
    put_record(store, keys.result, result)
    tracking.log_json(tracked, result.model_dump(mode="json"), "result.json")
    if released is None:  # a release logs the page with its own part
        tracking.log_text(tracked, render_page(read_facts(store, keys)), "report.html")
    tracking.close_run(tracked, "FINISHED")
    return result


@contextmanager
def _closing_on_failure(tracked: TrackedRun) -> Iterator[None]:
    """Tell MLflow when the block fails or is interrupted."""
    try:
        yield
    except BaseException as error:
        with suppress(TrackingError):  # the first error is the one to tell
            tracking.close_run(tracked, "FAILED" if isinstance(error, Exception) else "KILLED")
        raise


def _read_all_data(coordinator: Coordinator, sessions: Sequence[EdgeSession]) -> None:
    with progress.working("coordinator", "load model and data"):
        coordinator.base  # noqa: B018
        for session in sessions:
            session.data  # noqa: B018  read and kept by the session
        if coordinator.config.coordinator_judges:
            coordinator.held_out, coordinator.label_names, coordinator.slices  # noqa: B018
        check_exports(coordinator)


def _plan(coordinator: Coordinator, edges: Edges, saved_plan: SavedPlan | None) -> FederationPlan:
    try:
        if saved_plan is not None:
            federation.adopt_plan(coordinator, saved_plan)
        profile_edges(coordinator, edges)
        plan = federation.plan(coordinator)
    except PlanError:
        if not coordinator.store.exists(coordinator.keys.plan):
            federation.withdraw_federation(coordinator)  # its config has to change, so it could not be resumed
        raise
    for reason in plan.dropped.values():
        progress.note(f"left out of the run: {reason}")
    create_table_artifact(reports.plan_rows(plan), key="plan", description=f"Plan of {coordinator.keys.run}")
    return plan


def profile_edges(coordinator: Coordinator, edges: Edges) -> None:
    """Have every edge publish its profile, unless there is a plan already."""
    if not coordinator.store.exists(coordinator.keys.plan):
        on_all_edges(edge.profile, edges.local, shape=coordinator.shape)
        remote_edges.await_profiles(coordinator, edges.remote)


def _run_rounds(coordinator: Coordinator, edges: Edges, plan: FederationPlan, tracked: TrackedRun) -> Outcome:
    federation.publish_first_adapter(coordinator, plan)
    begun = judge_adapter(coordinator, edges, 1)
    baseline = begun.metrics
    progress.note(f"before training: {reports.metrics_line(baseline)}")
    tracking.log_round(tracked, 0, baseline, begun.of_edges)
    rounds = _all_rounds(coordinator, edges)
    plan = plan_at(coordinator.store, coordinator.keys, coordinator.config.rounds)
    with progress.working("coordinator", "record the rounds in MLflow"):
        tracking.log_rounds(tracked, {record.round: reports.tracked_metrics(record) for record in rounds})
        reports.log_plots(tracked, plan, rounds)
    create_table_artifact(reports.round_rows(rounds), key="rounds", description=f"Rounds of {coordinator.keys.run}")
    return Outcome(plan, rounds, baseline)


def _all_rounds(coordinator: Coordinator, edges: Edges) -> list[RoundRecord]:
    records: list[RoundRecord] = []
    with progress.working("federation", "rounds", coordinator.config.rounds) as advance:
        for index in range(coordinator.config.rounds):
            records.append(_one_round(coordinator, edges, index + 1))
            advance()
    return records


def _one_round(coordinator: Coordinator, edges: Edges, round_index: int) -> RoundRecord:
    known = get_record(coordinator.store, coordinator.keys.round_record(round_index), RoundRecord)
    if known is not None:
        return known
    started = time.perf_counter()
    if not coordinator.store.exists(coordinator.keys.global_record(round_index + 1)):
        _train(coordinator, edges, plan_round(coordinator, round_index), round_index)
    plan = plan_at(coordinator.store, coordinator.keys, round_index, coordinator.config.coordinator_signs)
    aggregate = federation.aggregate_round(coordinator, plan, round_index)
    found = judge_adapter(coordinator, edges, round_index + 1)
    record = reports.round_record(coordinator, plan, aggregate, found, time.perf_counter() - started)
    put_record(coordinator.store, coordinator.keys.round_record(round_index), record)
    progress.note(f"round {round_index}/{coordinator.config.rounds}: {reports.metrics_line(found.metrics)}")
    return record


def _train(coordinator: Coordinator, edges: Edges, plan: FederationPlan, round_index: int) -> None:
    started = time.monotonic()
    federation.forget_failures(coordinator, round_index)
    planned = [session for session in edges.local if session.edge_id in plan.edges]
    on_all_edges(edge.train_round, planned, round_index=round_index)
    remote_edges.await_updates(coordinator, edges.remote, plan, round_index, time.monotonic() - started)
