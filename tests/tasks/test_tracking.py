import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from fedpipe_core.config import TrackingSpec
from fedpipe_core.errors import IntegrityError
from fedpipe_core.evaluation_schemas import EdgeEvaluation
from fedpipe_core.predictions import Predictions
from tasks import tracking
from tasks.mlflow_client import connect
from tasks.tracking import TrackedRun, open_run


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One migrated SQLite database for the module; tests use experiments of their own."""
    return f"sqlite:///{tmp_path_factory.mktemp('tracking') / 'mlflow.db'}"


@pytest.fixture
def run(uri: str, request: pytest.FixtureRequest) -> TrackedRun:
    return open_run(uri, request.node.name, "run-1", {"kind": "test"}, {"rounds": 3})


def history(run: TrackedRun, run_id: str, metric: str) -> dict[int, float]:
    return {entry.step: entry.value for entry in connect(run.uri).get_metric_history(run_id, metric)}


def child_runs(run: TrackedRun) -> dict[str, str]:
    client = connect(run.uri)
    experiment_id = client.get_run(run.run_id).info.experiment_id
    found = client.search_runs([experiment_id], f"tags.`mlflow.parentRunId` = '{run.run_id}'")
    return {child.info.run_name: child.info.run_id for child in found}


def test_config_decides_the_uri_before_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert tracking.tracking_uri(TrackingSpec(uri="http://other:5000"), str(tmp_path)) == "http://other:5000"
    assert tracking.tracking_uri(TrackingSpec(), str(tmp_path)) == "http://server:5000"


def test_sqlite_file_lies_beside_a_local_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    beside = f"sqlite:///{tmp_path / '.fedpipe' / 'mlflow.db'}"
    assert tracking.tracking_uri(TrackingSpec(), ".fedpipe/store") == beside
    assert tracking.tracking_uri(TrackingSpec(), "s3://bucket/prefix") == beside


def test_run_is_recorded_with_tags_and_dotted_params(uri: str) -> None:
    params = {"name": "intents", "training": {"learning_rate": 0.001}, "ranks": [2, 4], "deadline": None}
    run = open_run(uri, "params", "run-1", {"commit": "abc"}, params)
    data = connect(uri).get_run(run.run_id).data
    assert data.params == {"name": "intents", "training.learning_rate": "0.001", "ranks": "[2, 4]"}
    assert data.tags["commit"] == "abc"


def test_artifacts_lie_beside_the_sqlite_file(run: TrackedRun) -> None:
    tracking.log_json(run, {"b": 1}, "plan.json")
    folder = Path(run.uri.removeprefix("sqlite:///")).parent / "mlartifacts" / run.experiment
    assert json.loads((folder / run.run_id / "artifacts" / "plan.json").read_text()) == {"b": 1}


def test_resumed_run_continues_the_one_of_the_same_name(run: TrackedRun) -> None:
    tracking.close_run(run, "KILLED")
    resumed = open_run(run.uri, run.experiment, "run-1", {"kind": "test"}, {"rounds": 3})
    assert resumed == run
    assert connect(run.uri).get_run(run.run_id).info.status == "RUNNING"
    assert open_run(run.uri, run.experiment, "run-2", {}, {}).run_id != run.run_id


def test_run_of_the_same_name_in_another_store_is_another_run(uri: str) -> None:
    first = open_run(uri, "stores", "run-1", {tracking.STORE_TAG: "/data/o'neil"}, {})
    other = open_run(uri, "stores", "run-1", {tracking.STORE_TAG: "s3://bucket"}, {})
    assert first.run_id != other.run_id


def test_rounds_are_steps_and_edges_are_child_runs(run: TrackedRun) -> None:
    for round_index, accuracy in ((1, 0.4), (2, 0.7)):
        edges = {"edge-0": {"loss": 1 / round_index}, "edge-1": {"loss": 2 / round_index}}
        tracking.log_round(run, round_index, {"accuracy": accuracy, "seconds": 3.0}, edges)
    assert history(run, run.run_id, "accuracy") == {1: 0.4, 2: 0.7}
    children = child_runs(run)
    assert sorted(children) == ["edge-0", "edge-1"]
    assert history(run, children["edge-1"], "loss") == {1: 2.0, 2: 1.0}


def test_round_logged_again_after_a_resume_is_not_doubled(run: TrackedRun) -> None:
    for _ in range(2):
        tracking.log_round(run, 1, {"accuracy": 0.4}, {"edge-0": {"loss": 0.5}})
    assert len(connect(run.uri).get_metric_history(run.run_id, "accuracy")) == 1
    children = child_runs(run)
    assert len(children) == 1
    assert len(connect(run.uri).get_metric_history(children["edge-0"], "loss")) == 1


def test_rounds_logged_together_are_those_logged_one_by_one(run: TrackedRun) -> None:
    rounds = {index: ({"accuracy": index / 10}, {f"edge-{index % 2}": {"loss": 1 / index}}) for index in range(1, 5)}
    tracking.log_round(run, 1, *rounds[1])
    tracking.log_rounds(run, rounds)
    tracking.log_rounds(run, rounds)
    assert history(run, run.run_id, "accuracy") == {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4}
    children = child_runs(run)
    assert history(run, children["edge-1"], "loss") == {1: 1.0, 3: 1 / 3}
    assert history(run, children["edge-0"], "loss") == {2: 0.5, 4: 0.25}
    assert len(connect(run.uri).get_metric_history(children["edge-1"], "loss")) == 2


def test_closing_a_run_closes_its_edges(run: TrackedRun) -> None:
    tracking.log_round(run, 1, {"accuracy": 0.4}, {"edge-0": {"loss": 0.5}})
    tracking.close_run(run, "FINISHED")
    for run_id in (run.run_id, child_runs(run)["edge-0"]):
        assert connect(run.uri).get_run(run_id).info.status == "FINISHED"


def test_texts_figures_and_folders_become_artifacts(run: TrackedRun, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    figure = Figure()
    figure.subplots().plot([0, 1])
    tracking.log_text(run, "# Card", "README.md")
    tracking.log_figure(run, figure, "plots/accuracy.png")
    tracking.log_folder(run, tmp_path, "adapter")
    kept = {
        entry.path
        for folder in ("", "plots", "adapter")
        for entry in connect(run.uri).list_artifacts(run.run_id, folder)
    }
    assert {"README.md", "plots/accuracy.png", "adapter/adapter_config.json"} <= kept


def test_more_params_than_one_batch_takes_are_all_recorded(run: TrackedRun) -> None:
    tracking.log_params(run, {f"rank.{i}": i for i in range(250)})
    assert len(connect(run.uri).get_run(run.run_id).data.params) == 251


def test_threads_log_to_their_own_runs(uri: str) -> None:
    runs = [open_run(uri, "threads", f"run-{i}", {}, {}) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: tracking.log_round(runs[i], 1, {"index": float(i)}, {}), range(4)))
    assert [history(run, run.run_id, "index")[1] for run in runs] == [0.0, 1.0, 2.0, 3.0]


def predictions(evaluation: str) -> Predictions:
    return Predictions(evaluation, np.array([0, 1]), np.array([0, 0]), np.array([0.1, 2.5]))


def test_predictions_are_found_by_the_hash_of_their_evaluation_set(run: TrackedRun) -> None:
    assert tracking.load_predictions(run.uri, run.run_id, "a" * 64) is None
    tracking.save_predictions(run, predictions("a" * 64))
    kept = tracking.load_predictions(run.uri, run.run_id, "a" * 64)
    assert kept is not None
    assert np.array_equal(kept.losses, [0.1, 2.5])
    assert tracking.load_predictions(run.uri, run.run_id, "b" * 64) is None


def test_predictions_under_a_wrong_hash_are_refused(run: TrackedRun) -> None:
    tracking.log_text(run, predictions("a" * 64).to_json(), f"predictions/{'b' * 64}.json")
    with pytest.raises(IntegrityError, match="evaluate the model again"):
        tracking.load_predictions(run.uri, run.run_id, "b" * 64)


def test_what_edges_found_is_kept_with_the_run(run: TrackedRun) -> None:
    found = EdgeEvaluation(rows=3, rows_sha256="a" * 64, metrics={"loss": 0.1 + 0.2}, counted={"loss": 3})
    assert tracking.load_evaluations(run.uri, run.run_id) == {}
    tracking.save_evaluations(run, {"east": found})
    assert tracking.load_evaluations(run.uri, run.run_id) == {"east": found}
    tracking.log_text(run, '{"east": {"rows": 0}}', "predictions/edges.json")
    with pytest.raises(IntegrityError, match=r"predictions/edges.json of MLflow run .* cannot be read"):
        tracking.load_evaluations(run.uri, run.run_id)
