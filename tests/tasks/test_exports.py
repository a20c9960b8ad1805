import resource
import shutil
from pathlib import Path

import pytest
from tiny_steps import finish_rounds

from fedpipe_core.errors import IntegrityError, ReleaseError
from fedpipe_core.export import ExportScheme, TunedModel, folder_sha256
from fedpipe_core.plan_schemas import FederationPlan
from tasks import exports
from tasks.coordinator import Coordinator
from tasks.edge import EdgeSession
from tasks.export_judge import SCHEMES
from tasks.release import Release
from tasks.tracking import TrackedRun


def nowhere() -> TrackedRun:
    """No step of these tests speaks to MLflow."""
    return TrackedRun("sqlite:////nowhere/mlflow.db", "experiment", "run")


@pytest.fixture
def trained(coordinator: Coordinator, sessions: dict[str, EdgeSession], plan: FederationPlan) -> Coordinator:
    """A run whose rounds are done."""
    finish_rounds(coordinator, sessions, plan)
    return coordinator


@pytest.mark.slow
def test_exports_are_judged_in_a_fresh_process_and_kept_only_within_the_limit_on_their_loss(
    trained: Coordinator,
) -> None:
    with Release(trained, nowhere, {}) as step:
        records = {scheme: exports.export.fn(step, scheme) for scheme in ("adapter", "merged")}
        for scheme, record in records.items():
            folder = Path(record.path)
            assert folder == Path(trained.store.root, "run", "release", scheme)
            assert record.sha256 == folder_sha256(folder) == folder_sha256(step.folder(scheme))
            assert record.bytes == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            assert set(record.metrics) == {"accuracy", "macro_f1", "loss"}
            assert record.agreement == 1
            assert record.loss_increase == pytest.approx(0, abs=1e-4)
            assert record.load_seconds > 0
            assert record.latency
            assert record.latency.ratio_low <= record.latency.ratio <= record.latency.ratio_high
            assert len(step.predictions[scheme].labels) == len(trained.held_out)
        step.unquantized_loss = 2 * records["merged"].metrics["loss"]  # as if its record had been altered
        with pytest.raises(
            IntegrityError, match=r"an export is never better: .*rounds/0002/round.json, .* was altered"
        ):
            exports.export.fn(step, "merged")
        step.unquantized_loss = records["merged"].metrics["loss"] / 2  # as if the exports had lost much
        shutil.rmtree(records["adapter"].path)
        refused = exports.export.fn(step, "adapter")
        assert (refused.kept, refused.path) == (False, "")
        assert refused.reason.endswith("+100.0%; beyond the allowed +5.0%")
        assert not Path(records["adapter"].path).exists()
        with pytest.raises(ReleaseError, match=r"export merged has loss .* beyond the allowed \+5.0%; nothing is reg"):
            exports.export.fn(step, "merged")


@pytest.mark.slow
def test_export_that_cannot_be_loaded_again_is_told_and_a_dead_judge_too(
    trained: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_nonsense(tuned: TunedModel, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    broken = ExportScheme(write_nonsense, SCHEMES["nf4"].load)
    monkeypatch.setitem(SCHEMES, "nf4", broken)
    with Release(trained, nowhere, {}) as step:
        record = exports.export.fn(step, "nf4")
        assert not record.kept
        assert record.metrics == {}
        assert record.reason.startswith("export nf4 could not be used after reloading it: ")
        step.judge._process.kill()
        step.judge._process.wait()
        with pytest.raises(ReleaseError, match="the process that judges export merged ended with -9"):
            exports.export.fn(step, "merged")


def test_disk_that_fills_is_told_and_leaves_nothing_in_the_store(trained: Coordinator) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    step = Release(trained, nowhere, {})
    step.tuned  # noqa: B018  loaded before the limit
    with step.written:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        try:
            with pytest.raises(ReleaseError, match=r"export merged cannot be written to .* nothing was registered"):
                exports.export.fn(step, "merged")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert trained.store.list("run/release") == []


def test_repeated_export_writes_the_same_bytes(trained: Coordinator, tmp_path: Path) -> None:
    tuned = Release(trained, nowhere, {}).tuned
    for name in ("first", "second"):
        SCHEMES["merged"].write(tuned, tmp_path / name)
    assert folder_sha256(tmp_path / "first") == folder_sha256(tmp_path / "second")
