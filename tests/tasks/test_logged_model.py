"""Model files in MLflow; how they are served is in `test_serving_model`."""

from pathlib import Path

import pytest
from tiny_models import save_tiny_model

from fedpipe_core.errors import ReleaseError
from tasks import registry, tracking
from tasks.mlflow_client import connect
from tasks.registry import ADAPTER_TAG, BASE_TAG
from tasks.tracking import TrackedRun, open_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrackedRun:
    return open_run(f"sqlite:///{tmp_path_factory.mktemp('logged') / 'mlflow.db'}", "intents", "run-1", {}, {})


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), "bert")


def test_version_carries_card_signature_and_pinned_requirements(run: TrackedRun, model_folder: Path) -> None:
    tags = {ADAPTER_TAG: "a-1", BASE_TAG: "base"}
    registered = registry.register_model(run, "files", model_folder, tags, "# Card of intents")
    client = connect(run.uri)
    kept = client.get_model_version("files", str(registered.version))
    assert kept.description == "# Card of intents"
    assert kept.run_id == run.run_id
    location = Path(client.get_model_version_download_uri("files", str(registered.version)).removeprefix("file://"))
    files = {str(path.relative_to(location)) for path in location.rglob("*") if path.is_file()}
    assert {"MLmodel", "README.md", "serving_model.py", "input_example.json"} <= files
    assert any(name.startswith("artifacts/") and name.endswith("model.safetensors") for name in files)
    requirements = (location / "requirements.txt").read_text().split()
    assert {line.partition("==")[0] for line in requirements} == {"mlflow", "torch", "transformers", "safetensors"}
    assert not any("+" in line for line in requirements)


def test_folder_without_a_model_is_refused(run: TrackedRun, tmp_path: Path) -> None:
    with pytest.raises(ReleaseError, match=r"missing holds no config\.json"):
        registry.register_model(run, "failed", tmp_path / "missing", {ADAPTER_TAG: "a", BASE_TAG: "b"}, "# Card")
    assert registry.versions(run.uri, "failed") == []


def test_nothing_is_left_in_the_working_directory(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls that name no address make MLflow open a database of its own there."""
    working, elsewhere = tmp_path / "working", tmp_path / "elsewhere"
    working.mkdir()
    monkeypatch.chdir(working)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = open_run(f"sqlite:///{elsewhere / 'mlflow.db'}", "tidy", "run-1", {}, {"rounds": 1})
    tracking.log_round(run, 1, {"loss": 0.5}, {"edge-0": {"loss": 0.5}})
    for _ in range(2):
        tracking.log_table(run, [{"check": "loss", "verdict": "passed"}], "release/gate.json")
    version = registry.register_model(run, "tidy", model_folder, {ADAPTER_TAG: "a", BASE_TAG: "b"}, "# Card")
    assert (registry.fetch_model(version, tmp_path / "fetched") / "config.json").is_file()
    assert registry.find_version(run.uri, "tidy@1") == version
    tracking.close_run(run, "FINISHED")
    assert list(working.iterdir()) == []
