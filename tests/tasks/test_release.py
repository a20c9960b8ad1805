from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_steps import finish_rounds

from fedpipe_core.errors import ReleaseError
from fedpipe_core.export import folder_sha256
from fedpipe_core.schemas import FederationPlan
from tasks import federation, release
from tasks.edge import EdgeSession
from tasks.federation import Coordinator
from tasks.release import Release
from tasks.tracking import TrackedRun

NOWHERE = TrackedRun("sqlite:////nowhere/mlflow.db", "experiment", "run")


@pytest.fixture
def trained(coordinator: Coordinator, sessions: dict[str, EdgeSession], plan: FederationPlan) -> Coordinator:
    """A run whose rounds are done."""
    finish_rounds(coordinator, sessions, plan)
    return coordinator


@pytest.mark.parametrize("scheme", ["adapter", "merged"])
def test_export_in_the_store_is_what_was_written_and_judged(trained: Coordinator, scheme: str) -> None:
    step = Release(trained, NOWHERE, {})
    with step.written:
        record = release.export.fn(step, scheme)
        folder = Path(record.path)
        assert folder == Path(trained.store.root, "run", "release", scheme)
        assert record.sha256 == folder_sha256(folder) == folder_sha256(step.folder(scheme))
        assert record.bytes == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        assert set(record.metrics) == {"accuracy", "macro_f1", "loss"}
        assert len(step.predictions[scheme].labels) == len(trained.held_out)


def test_repeated_export_writes_the_same_bytes(trained: Coordinator) -> None:
    step = Release(trained, NOWHERE, {})
    with step.written:
        first, second = (release.export.fn(step, "merged") for _ in range(2))
    assert first.sha256 == second.sha256
    assert load_file(Path(first.path) / "model.safetensors")


def test_release_of_an_unfinished_run_says_what_is_missing(coordinator: Coordinator, plan: FederationPlan) -> None:
    step = Release(coordinator, NOWHERE, {})
    step.predictions["merged"] = federation.evaluate.fn(coordinator, 1, whole=True)
    with step.written, pytest.raises(ReleaseError, match=r"rounds/0001/round.json is missing in .*finish it with"):
        release.register.fn(step, [])


def test_models_name_is_the_configured_one_or_the_federations(coordinator: Coordinator) -> None:
    assert Release(coordinator, NOWHERE, {}).name == "tiny"
    named = coordinator.config.release.model_copy(update={"model_name": "intents"})
    config = coordinator.config.model_copy(update={"release": named})
    assert Release(Coordinator(config, coordinator.store, coordinator.keys), NOWHERE, {}).name == "intents"
