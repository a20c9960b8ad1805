"""What a release rests on, and its steps after the exports: register the model, and keep what became of it."""

import functools
import hashlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Self

from prefect import task
from prefect.cache_policies import NO_CACHE

from fedpipe_core.dialogues import chat_template
from fedpipe_core.evaluation_schemas import EdgeEvaluation
from fedpipe_core.export import TunedModel
from fedpipe_core.lineage_schemas import RunManifest
from fedpipe_core.methods import METHODS
from fedpipe_core.model_card import CardFacts, license_of, render_card
from fedpipe_core.predictions import Answers, metric_interval
from fedpipe_core.report import render_page
from fedpipe_core.result_schemas import ExportRecord, ReleaseReport
from fedpipe_core.schemas import FederationRecord, RoundRecord
from tasks import progress, registry, tracking
from tasks.coordinator import Coordinator
from tasks.edge import read_global
from tasks.export_judge import ExportJudge
from tasks.federation import read_profiles
from tasks.judging import judged, told_metrics
from tasks.lineage import lasting_root, needed_record
from tasks.manifest import run_manifest
from tasks.plans import plan_at
from tasks.records import get_data_file, put_record
from tasks.registry import ModelVersion
from tasks.report import read_facts
from tasks.reports import gate_rows
from tasks.tracking import TrackedRun


class Release:
    """What a release rests on: a run whose rounds are done, how its MLflow run is opened, metrics before training.

    A plain class, since Prefect walks through every dataclass it is handed.
    """

    def __init__(self, coordinator: Coordinator, track: Callable[[], TrackedRun], baseline: Mapping[str, float] | None):
        self.coordinator = coordinator
        self._baseline = baseline
        self._track = track
        self.written = TemporaryDirectory(prefix="fedpipe-release-")
        self._open = ExitStack()
        self.predictions: dict[str, Answers] = {}

    def __enter__(self) -> Self:
        """Check what the run left, and start the process that judges exports: it imports while the first is written.

        Raises ReleaseError or IntegrityError naming the object that is missing or was altered since.
        """
        with self._open as opened:  # closes what is open when the rest fails
            opened.enter_context(self.written)
            self.manifest, self.judge, self.baseline  # noqa: B018
            self._open = opened.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the process and remove what was written; the store has its copies."""
        self._open.__exit__(kind, error, trace)

    @functools.cached_property
    def manifest(self) -> RunManifest:
        """Every object the adapter came from, each found as it was when its round was closed."""
        with progress.working("coordinator", "check the run's objects"):
            return run_manifest(self.coordinator.store, self.coordinator.keys, self.coordinator.config)

    @functools.cached_property
    def baseline(self) -> Mapping[str, float]:
        """Metrics before training; when none were given measured here, and as the edges told them."""
        return told_metrics(self.coordinator, 1) if self._baseline is None else self._baseline

    @functools.cached_property
    def tracked(self) -> TrackedRun:
        """The MLflow run, opened when the exports are done: a registry that is away must not cost them."""
        return self._track()

    @functools.cached_property
    def judge(self) -> ExportJudge:
        """The process that judges exports."""
        coordinator, adapter = self.coordinator, Path(self.written.name) / "adapter.safetensors"
        record, _ = read_global(coordinator.store, coordinator.keys, coordinator.config.rounds + 1)
        get_data_file(coordinator.store, record.adapter, adapter)
        return self._open.enter_context(ExportJudge(coordinator.config, adapter))

    @functools.cached_property
    def unquantized_loss(self) -> float:
        """Loss on the held-out set of the merged model at full precision, as the last round measured it."""
        coordinator = self.coordinator
        key = coordinator.keys.round_record(coordinator.config.rounds)
        return needed_record(coordinator.store, key, RoundRecord).metrics["loss"]

    @functools.cached_property
    def evaluations(self) -> Mapping[str, EdgeEvaluation]:
        """What the edges found the final adapter worth; nothing where they do not judge."""
        found = judged(self.coordinator, self.coordinator.config.rounds + 1)
        return found.evaluations if found else {}

    @property
    def name(self) -> str:
        """The registered model's name."""
        config = self.coordinator.config
        return config.release.model_name or config.name

    @property
    def registered(self) -> str:
        """The export that becomes the version."""
        return self.coordinator.config.release.registered

    def folder(self, scheme: str) -> Path:
        """Where an export lies before it goes to the store."""
        return Path(self.written.name) / scheme

    @functools.cached_property
    def adapter_sha256(self) -> str:
        """Hash of the adapter after the last round."""
        coordinator = self.coordinator
        return read_global(coordinator.store, coordinator.keys, coordinator.config.rounds + 1)[0].adapter.sha256

    @functools.cached_property
    def tuned(self) -> TunedModel:
        """The base and the adapter after the last round."""
        coordinator = self.coordinator
        _, adapter = read_global(coordinator.store, coordinator.keys, coordinator.config.rounds + 1)
        config, template = coordinator.config, chat_template(coordinator.config.data)
        dtype, names, form = config.release.dtype, coordinator.label_names, METHODS[config.method].form
        return TunedModel(coordinator.base, adapter, dtype, names, template, config.model.base, form)


@task(task_run_name="register", cache_policy=NO_CACHE)
def register(release: Release, exports: list[ExportRecord]) -> ModelVersion:
    """Register the model with its card and its answers on the held-out set; log the other exports beside it."""
    with progress.working("coordinator", "register"):
        card = _card(release, exports)
        _save_answers(release)
        for entry in exports:
            tracking.log_metrics(release.tracked, _tracked_numbers(entry))
            if entry.scheme != release.registered and entry.kept:  # the version itself holds that one
                tracking.log_folder(release.tracked, release.folder(entry.scheme), entry.scheme)
        files, tags = release.folder(release.registered), _tags(release)
        return registry.register_model(release.tracked, release.name, files, tags, card)


def _save_answers(release: Release) -> None:
    """Keep what the next version is compared with: answers on the coordinator's rows, and what the edges found."""
    if release.coordinator.config.coordinator_judges:
        tracking.save_predictions(release.tracked, release.predictions[release.registered])
    if release.evaluations:
        tracking.save_evaluations(release.tracked, release.evaluations)


def _tracked_numbers(entry: ExportRecord) -> dict[str, float]:
    """An export's numbers under names that MLflow takes."""
    numbers: dict[str, float | None] = {
        **entry.metrics,
        "bytes": float(entry.bytes),
        "load_seconds": entry.load_seconds,
        "loss_increase": entry.loss_increase,
        "agreement": entry.agreement,
        "latency_ratio": entry.latency.ratio if entry.latency else None,
    }
    scheme = entry.scheme.replace("+", "-")
    return {f"export/{scheme}/{name}": value for name, value in numbers.items() if value is not None}


def publish(release: Release, report: ReleaseReport) -> None:
    """Keep what a release came to beside its exports, and the run's page in MLflow."""
    coordinator = release.coordinator
    coordinator.store.put(coordinator.keys.release("report.json"), report.model_dump_json(indent=1).encode())
    rows = [{"version": report.model.version, **row} for row in gate_rows(report)]
    tracking.log_table(release.tracked, rows, "release/gate.json")
    page = render_page(read_facts(coordinator.store, coordinator.keys))
    tracking.log_text(release.tracked, page, "report.html")


def _tags(release: Release) -> dict[str, str]:
    coordinator, keys = release.coordinator, release.coordinator.keys
    put_record(coordinator.store, keys.manifest, release.manifest)
    return {
        registry.ADAPTER_TAG: release.adapter_sha256,
        registry.BASE_TAG: coordinator.base.sha256,
        registry.CONFIG_TAG: needed_record(coordinator.store, keys.federation, FederationRecord).config_sha256,
        registry.MANIFEST_TAG: hashlib.sha256(coordinator.store.get(keys.manifest)).hexdigest(),
        tracking.RUN_TAG: keys.run,
        tracking.STORE_TAG: lasting_root(coordinator.store),
    }


def _card(release: Release, exports: list[ExportRecord]) -> str:
    coordinator = release.coordinator
    keys, config, answers = coordinator.keys, coordinator.config, release.predictions.get(release.registered)
    rounds = [
        needed_record(coordinator.store, keys.round_record(index + 1), RoundRecord) for index in range(config.rounds)
    ]
    confidence = config.release.confidence or 0.95
    return render_card(
        CardFacts(
            model_name=release.name,
            task=config.model.task,
            base=config.model.base,
            base_license=license_of(coordinator.base.folder),
            federation=needed_record(coordinator.store, keys.federation, FederationRecord),
            profiles=read_profiles(coordinator),
            plan=plan_at(coordinator.store, keys, config.rounds),
            rounds=rounds,
            adapter_sha256=release.adapter_sha256,
            evaluation_sha256=answers.evaluation_sha256 if answers else None,
            baseline=release.baseline,
            metrics={name: metric_interval(answers, name, confidence, config.seed) for name in answers.metrics}
            if answers
            else {},
            exports=exports,
            evaluations=release.evaluations,
        )
    )
