import pytest

from fedpipe_core.errors import ReleaseError
from fedpipe_core.plan_schemas import FederationPlan
from tasks import federation, release
from tasks.coordinator import Coordinator
from tasks.release import Release
from tasks.tracking import TrackedRun


def nowhere() -> TrackedRun:
    """No step of these tests speaks to MLflow."""
    return TrackedRun("sqlite:////nowhere/mlflow.db", "experiment", "run")


def test_release_of_an_unfinished_run_says_what_is_missing(coordinator: Coordinator, plan: FederationPlan) -> None:
    step = Release(coordinator, nowhere, {})
    step.predictions["merged"] = federation.evaluate.fn(coordinator, 1, whole=True)
    with step.written, pytest.raises(ReleaseError, match=r"rounds/0001/round.json is missing in .*finish it with"):
        release.register.fn(step, [])


def test_models_name_is_the_configured_one_or_the_federations(coordinator: Coordinator) -> None:
    assert Release(coordinator, nowhere, {}).name == "tiny"
    named = coordinator.config.release.model_copy(update={"model_name": "intents"})
    config = coordinator.config.model_copy(update={"release": named})
    assert Release(Coordinator(config, coordinator.store, coordinator.keys), nowhere, {}).name == "intents"
