"""A tiny federation before its first round, for the tests of single steps; no flow and no server runs."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.logging import disable_run_logger
from tiny_federation import write_federation
from tiny_steps import coordinator_at, finish_rounds, prepare, sessions_of

from fedpipe_core.config import FederationConfig
from fedpipe_core.config_file import load_config
from fedpipe_core.plan_schemas import FederationPlan
from tasks import progress
from tasks.coordinator import Coordinator
from tasks.edge import EdgeSession


@pytest.fixture
def run_logger_off() -> Iterator[None]:
    """Let tasks log although no run surrounds them."""
    with disable_run_logger():
        yield


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> FederationConfig:
    """A config whose model and rows lie on the disk; modules are not scored, which takes time."""
    quick = {"planning.importance": "uniform", "training.examples_per_round": 16}
    return load_config(write_federation(tmp_path_factory.mktemp("federation"), **quick))


@pytest.fixture
def coordinator(tiny_config: FederationConfig, tmp_path: Path, run_logger_off: None) -> Coordinator:
    """The coordinator of a run in an empty store."""
    return coordinator_at(tiny_config, tmp_path / "store")


@pytest.fixture
def sessions(coordinator: Coordinator) -> dict[str, EdgeSession]:
    """The edges' sessions, by edge."""
    return sessions_of(coordinator)


@pytest.fixture
def plan(coordinator: Coordinator, sessions: dict[str, EdgeSession]) -> FederationPlan:
    """The plan of a federation that is ready for round 1."""
    return prepare(coordinator, sessions)


@pytest.fixture(scope="session")
def finished_store(tiny_config: FederationConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a run whose rounds are done; in round 2 the update of `north` was refused. Copy it to change it."""
    root = tmp_path_factory.mktemp("finished") / "store"
    with disable_run_logger():
        coordinator = coordinator_at(tiny_config, root)
        sessions = sessions_of(coordinator)
        finish_rounds(coordinator, sessions, prepare(coordinator, sessions), foreign=("north", 2))
    return root


@pytest.fixture
def heard() -> Iterator[list[str]]:
    """What a person watching is told, line by line."""

    class Listener:
        def started(self, who: str, what: str, steps: int | None) -> None: ...
        def advanced(self, who: str) -> None: ...
        def finished(self, who: str, what: str, seconds: float) -> None: ...
        def stopped(self, who: str) -> None: ...
        def noted(self, text: str) -> None:
            lines.append(text)

    lines: list[str] = []
    with progress.listening(Listener()):
        yield lines
