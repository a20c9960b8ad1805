"""A release's exports: written, judged by a process that reloads them, and kept in the store where they hold up."""

import math
import time
from collections.abc import Sequence
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE
from safetensors import SafetensorError

from fedpipe_core.errors import IntegrityError, ReleaseError
from fedpipe_core.evaluation import metrics_of
from fedpipe_core.export import folder_sha256
from fedpipe_core.export_choice import AUTO
from fedpipe_core.gate import Check, agreement_check, loss_check
from fedpipe_core.result_schemas import ExportRecord
from fedpipe_core.token_predictions import read_answers
from tasks import progress
from tasks.coordinator import Coordinator
from tasks.export_judge import SCHEMES, Verdict
from tasks.records import put_data_file
from tasks.release import Release

LOSS_TOLERANCE = 0.02  # by which the loss of an export with all its digits may differ on another machine


def check_exports(coordinator: Coordinator) -> None:
    """Raise ModelError, before anything is trained, when a configured export cannot hold the base."""
    for scheme in coordinator.config.release.exports:
        if scheme != AUTO:
            SCHEMES[scheme].check(coordinator.base)


@task(task_run_name="export {scheme}", cache_policy=NO_CACHE)
def export(release: Release, scheme: str, edges: Sequence[str] = ()) -> ExportRecord:
    """Write one export, have it reloaded and judged in a fresh process, and copy it to the store if it holds its loss.

    Raises ReleaseError when the one that would be registered cannot be used or does not.
    """
    coordinator, folder, started = release.coordinator, release.folder(scheme), time.perf_counter()
    with progress.working("coordinator", f"export {scheme}"):
        _write(release, scheme, folder)
        verdict = release.judge.judge(scheme, folder)
        check, metrics = _verdict(release, scheme, verdict)
        if scheme == release.registered:
            _require_sound(release, check)
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        for path in files if check.passed else ():
            name = path.relative_to(folder).as_posix()
            put_data_file(coordinator.store, coordinator.keys.release(f"{scheme}/{name}"), path)
    return ExportRecord(
        scheme=scheme,
        path=f"{coordinator.store.root}/{coordinator.keys.release(scheme)}" if check.passed else "",
        bytes=sum(path.stat().st_size for path in files),
        sha256=folder_sha256(folder),
        metrics=metrics,
        seconds=time.perf_counter() - started,
        loss_increase=check.value if metrics and math.isfinite(check.value) else None,
        agreement=verdict.agreement,
        load_seconds=verdict.load_seconds,
        latency=verdict.latency,
        edges=list(edges),
        kept=check.passed,
        reason=check.reason,
    )


def _write(release: Release, scheme: str, folder: Path) -> None:
    """Write an export. Raises ReleaseError when the disk does not take it."""
    try:
        SCHEMES[scheme].write(release.tuned, folder)
    except (OSError, SafetensorError) as error:
        raise ReleaseError(
            f"export {scheme} cannot be written to {folder.parent} ({error}); make room there, or set TMPDIR to a "
            "folder on a larger disk; nothing was registered"
        ) from None


def _require_sound(release: Release, check: Check) -> None:
    """Raise ReleaseError when the export that would be registered lost too much, IntegrityError when it gained."""
    if not check.passed:
        raise ReleaseError(f"{check.reason}; nothing is registered")
    if check.value < -LOSS_TOLERANCE:
        coordinator = release.coordinator
        key = coordinator.keys.round_record(coordinator.config.rounds)
        raise IntegrityError(
            f"{check.reason}, but an export is never better: store {coordinator.store.root}: {key}, which told the "
            "loss, was altered, or data.test was since; restore it; nothing is registered"
        )


def _verdict(release: Release, scheme: str, verdict: Verdict) -> tuple[Check, dict[str, float]]:
    """Whether an export's loss is within its limit of the unquantized model's, and its metrics where it has any."""
    if verdict.error:
        limit = release.coordinator.config.release.max_loss_increase
        reason = f"export {scheme} could not be used after reloading it: {verdict.error}"
        return Check(f"loss of {scheme}", math.inf, limit, False, reason), {}
    if not release.coordinator.config.coordinator_judges:
        return agreement_check(scheme, verdict.agreement or 0.0, scheme == release.registered), {}
    predictions = read_answers(verdict.answers)
    release.predictions[scheme] = predictions
    metrics = metrics_of(predictions)
    check = loss_check(scheme, metrics["loss"], release.unquantized_loss, release.coordinator.config.release)
    return check, {name: value for name, value in metrics.items() if math.isfinite(value)}
