"""Release a finished run: export, judge, register, promote."""

import functools
import math
from collections.abc import Mapping

from prefect import flow, runtime
from prefect.artifacts import create_markdown_artifact, create_table_artifact

from fedpipe_core.config import FederationConfig
from fedpipe_core.errors import ConfigError, ReleaseError, TrackingError
from fedpipe_core.export_choice import choose_exports
from fedpipe_core.methods import METHODS
from fedpipe_core.result_schemas import ExportRecord, ReleaseReport
from fedpipe_core.schemas import FederationRecord, RoundRecord
from flows.deployed import require_lasting_store
from tasks import exports, progress, promotion, release, reports, tracking
from tasks.coordinator import Coordinator
from tasks.federation import read_profiles
from tasks.lineage import needed_record, stored_config
from tasks.records import RunKeys, get_record
from tasks.status import unreleased_runs
from tasks.storage import open_store
from tasks.tracking import TrackedRun

MIB = 2**20


def _title() -> str:
    return f"release {runtime.flow_run.parameters['run'] or 'what waits'}"


@flow(name="release_model", flow_run_name=_title)
def release_model(
    run: str | None = None, store: str = ".fedpipe/store", baseline: dict[str, float] | None = None
) -> ReleaseReport | None:
    """Export, register and perhaps promote the model of a finished run; the last report where several were released.

    Args:
        run: Name of the run; every run whose rounds are done and that was not released yet when left out.
        store: Object store that holds the run: a folder or s3://bucket/prefix.
        baseline: Metrics before training; measured when left out.
    """
    require_lasting_store(store)
    if run is None:
        waiting = unreleased_runs(store)
        progress.note(f"runs that wait for their release in {store}: {', '.join(waiting) or 'none'}")
        return [None, *(release_model(name, store) for name in waiting)][-1]
    coordinator = _coordinator(run, store)
    require_releasable(coordinator.config)
    with release.Release(coordinator, functools.partial(track, coordinator), baseline) as step:
        chosen = choose_exports(coordinator.config.release, coordinator.shape, read_profiles(coordinator))
        written = [exports.export(step, scheme, edges) for scheme, edges in chosen.items()]
        report = _registered(step, written)
    create_table_artifact(reports.gate_rows(report), key="gate", description=f"Gate of {run}")
    create_markdown_artifact(_summary(report), key="release", description=f"Release of {run}")
    return report


def require_releasable(config: FederationConfig) -> None:
    """Raises ConfigError for a method whose model cannot be written in a form that others load."""
    reason = METHODS[config.method].unreleased
    if reason:
        raise ConfigError(
            f"method {config.method} has no release: {reason}; run it with --no-release, which evaluates it"
        )


def _registered(step: release.Release, exports: list[ExportRecord]) -> ReleaseReport:
    """Register, promote and publish. Raises TrackingError that says where the exports are and how to go on."""
    try:
        model = promotion.promote(step, release.register(step, exports), exports)
        report = ReleaseReport(exports=exports, model=model, baseline_metrics=dict(step.baseline))
        release.publish(step, report)
    except TrackingError as error:
        run, root = step.coordinator.keys.run, step.coordinator.store.root
        raise TrackingError(
            f"{error}; the exports are kept in {root}/{run}/release/, and `fedpipe release {run}` registers them later"
        ) from None
    return report


def track(coordinator: Coordinator) -> TrackedRun:
    """The MLflow run of a federation: started by its first step, continued by every later one."""
    config, keys = coordinator.config, coordinator.keys
    uri = tracking.tracking_uri(config.tracking, coordinator.store.root)
    tags = {"fedpipe.store": coordinator.store.root, "fedpipe.base_sha256": coordinator.base.sha256}
    with progress.working("coordinator", "open MLflow"):
        return tracking.open_run(uri, config.tracking.experiment or config.name, keys.run, tags, _parameters(config))


def _parameters(config: FederationConfig) -> Mapping[str, object]:
    return config.model_dump(mode="json", exclude={"edges", "tracking", "store"})


def _coordinator(run: str, store: str) -> Coordinator:
    opened, keys = open_store(store), RunKeys(run)
    record = get_record(opened, keys.federation, FederationRecord)
    if record is None:
        raise ReleaseError(f"run {run} is not in {opened.root}; `fedpipe status` lists the runs there")
    config = stored_config(opened, record)
    needed_record(opened, keys.round_record(config.rounds), RoundRecord)
    return Coordinator(config, opened, keys)


def _summary(report: ReleaseReport) -> str:
    names = list(report.exports[0].metrics)
    cells = [
        (e.scheme, f"{e.bytes / MIB:.1f}", *(f"{e.metrics.get(name, math.nan):.4f}" for name in names))
        for e in report.exports
    ]
    verdict = "promoted to champion" if report.model.decision.promoted else "not promoted"
    lines = [
        f"**{report.model.name} version {report.model.version}: {verdict}**",
        *(f"- {reason}" for reason in report.model.decision.reasons),
        "",
        f"| export | MiB | {' | '.join(names)} |",
        "|---" * (2 + len(names)) + "|",
        *(f"| {' | '.join(row)} |" for row in cells),
    ]
    return "\n".join(lines)
