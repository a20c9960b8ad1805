"""What the tests of the pipeline share: one Prefect server, one finished run, and the command in and out of process."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Command, FinishedRun, Outcome, invoke, run_to_end
from prefect.settings import PREFECT_API_URL
from prefect.testing.utilities import prefect_test_harness
from tiny_federation import write_federation


@pytest.fixture(scope="session", autouse=True)
def prefect_api() -> Iterator[str]:
    """A Prefect server of the tests' own, for this process."""
    with prefect_test_harness(server_startup_timeout=120):
        yield PREFECT_API_URL.value()


@pytest.fixture(scope="session")
def finished(prefect_api: str, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """The tiny federation, run once; MLflow's database lies where it lies by default, beside the store."""
    folder = tmp_path_factory.mktemp("federation")
    config = write_federation(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        outcome = invoke("run", config, "--run", "first", "--json")
    assert outcome.exit_code == 0, outcome.stderr
    return FinishedRun(folder, outcome)


@pytest.fixture
def tracking_uri(finished: FinishedRun, monkeypatch: pytest.MonkeyPatch) -> str:
    """MLflow's database of the finished run, for other runs too: to make one takes longer than the run."""
    uri: str = finished.result["tracking"]["uri"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


@pytest.fixture
def fedpipe(tracking_uri: str) -> Command:
    """The command, called in this process."""
    return invoke


@pytest.fixture
def environment(prefect_api: str, tracking_uri: str) -> dict[str, str]:
    """What a command in a process of its own needs to report to the tests' servers."""
    return {**os.environ, "PREFECT_API_URL": prefect_api, "MLFLOW_TRACKING_URI": tracking_uri}


@pytest.fixture
def fedpipe_process(environment: dict[str, str], tmp_path: Path) -> Command:
    """The command in a process of its own, with changes to its environment as keywords; None takes a variable away."""

    def call(*arguments: object, **changes: str | None) -> Outcome:
        merged = {name: value for name, value in {**environment, **changes}.items() if value is not None}
        return run_to_end(merged, tmp_path, *arguments)

    return call
