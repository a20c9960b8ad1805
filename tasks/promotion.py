"""Whether a registered version becomes champion: the gate beside the champion's own answers."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from prefect import task
from prefect.cache_policies import NO_CACHE

from fedpipe_core.base_folder import BASE_FILE
from fedpipe_core.edge_gate import decide_by_edges
from fedpipe_core.errors import ReleaseError
from fedpipe_core.evaluation_schemas import EdgeEvaluation
from fedpipe_core.gate import Decision, agreement_check, decide
from fedpipe_core.predictions import Answers
from fedpipe_core.result_schemas import CheckReport, DecisionReport, ExportRecord, ModelReport
from tasks import registry, tracking
from tasks.export_judge import SCHEMES
from tasks.registry import ModelVersion
from tasks.release import Release


@task(task_run_name="promote", cache_policy=NO_CACHE)
def promote(release: Release, version: ModelVersion, exports: Sequence[ExportRecord] = ()) -> ModelReport:
    """Compare the version with the champion, example by example, and move the alias only where the gate says so."""
    decision = registry.promote(version, functools.partial(_gate, release))
    tracking.log_json(release.tracked, decision.as_document(), "release/decision.json")
    return ModelReport(
        name=version.name,
        version=version.version,
        alias=registry.CHAMPION if decision.promoted else registry.CHALLENGER,
        decision=DecisionReport(
            promoted=decision.promoted,
            reasons=list(decision.reasons),
            checks=[*_export_checks(release, exports), *(CheckReport(**asdict(check)) for check in decision.checks)],
        ),
    )


def _export_checks(release: Release, exports: Sequence[ExportRecord]) -> list[CheckReport]:
    """The limit on each export's loss: it decides on that export alone, not on the version."""
    config = release.coordinator.config
    if not config.coordinator_judges:
        found = [agreement_check(e.scheme, e.agreement or 0.0, e.scheme == release.registered) for e in exports]
        return [CheckReport(**asdict(check)) for check in found]
    limit = config.release.max_loss_increase
    return [
        CheckReport(
            name=f"loss of {entry.scheme}",
            value=-1.0 if entry.loss_increase is None else entry.loss_increase,
            threshold=limit,
            passed=entry.kept,
            reason=entry.reason,
        )
        for entry in exports
    ]


def _gate(release: Release, challenger: ModelVersion, champion: ModelVersion | None) -> Decision:
    coordinator = release.coordinator
    if not coordinator.config.coordinator_judges:
        rival = None if champion is None else _evaluations(release, champion)
        return decide_by_edges(_evaluations(release, challenger), rival, coordinator.config.release)
    return decide(
        _answers(release, challenger),
        None if champion is None else _answers(release, champion),
        coordinator.config.release,
        coordinator.slices,
        coordinator.config.seed,
    )


def _evaluations(release: Release, version: ModelVersion) -> Mapping[str, EdgeEvaluation]:
    """What the edges found a version worth: told by this run, or kept with the version; nothing where neither is."""
    if version.adapter_sha256 == release.adapter_sha256:
        return release.evaluations
    return tracking.load_evaluations(version.uri, version.run_id)


def _answers(release: Release, version: ModelVersion) -> Answers:
    """A version's answers on the held-out set: kept with it, or else made again from its model."""
    mine = release.predictions[release.registered]
    if version.adapter_sha256 == release.adapter_sha256:
        return mine
    kept = tracking.load_predictions(version.uri, version.run_id, mine.evaluation_sha256)
    return kept or _evaluate_version(release, version)


def _evaluate_version(release: Release, version: ModelVersion) -> Answers:
    coordinator = release.coordinator
    with TemporaryDirectory() as folder:
        files = registry.fetch_model(version, Path(folder))
        kind = "adapter" if (files / BASE_FILE).is_file() else "merged"
        if kind == "adapter" and version.tags.get(registry.BASE_TAG) != coordinator.base.sha256:
            raise ReleaseError(
                f"version {version.version} of {version.name} is an adapter for another base, so it cannot be judged "
                "here; register with release.registered: merged, or under another release.model_name"
            )
        model = SCHEMES[kind].load(release.tuned, files)
        return coordinator.judge(model)
