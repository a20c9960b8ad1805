"""What of a federation is recorded in MLflow, and how: runs, metrics per round, artifacts.

A run is continued by its id, which any thread or process may hold. How MLflow is reached is `tasks.mlflow_client`'s
matter, model files are `tasks.logged_model`'s.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

from fedpipe_core.config import TrackingSpec
from fedpipe_core.errors import IntegrityError
from fedpipe_core.evaluation_schemas import EdgeEvaluation
from fedpipe_core.predictions import Answers
from fedpipe_core.token_predictions import read_answers
from tasks.mlflow_client import SQLITE, connect, speaking_to

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Metrics = Mapping[str, float]

RUN_TAG = "fedpipe.run"
STORE_TAG = "fedpipe.store"
EDGE_TAG = "fedpipe.edge"
_EVALUATIONS = "predictions/edges.json"
_PARAMS_PER_CALL = 100  # MLflow's limits of one batch
_METRICS_PER_CALL = 1000


@dataclass(frozen=True)
class TrackedRun:
    """Where one federation is recorded; a plain value, so that any thread or process can go on logging."""

    uri: str
    experiment: str
    run_id: str


def tracking_uri(spec: TrackingSpec, store_root: str) -> str:
    """Return the config's URI, else MLFLOW_TRACKING_URI, else a SQLite file beside the store.

    A store on S3 has no folder to put the file beside; `.fedpipe/` of the working directory takes it.
    """
    configured = spec.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if configured:
        return configured
    folder = Path(".fedpipe") if "://" in store_root else Path(store_root).absolute().parent
    return f"{SQLITE}{folder.absolute() / 'mlflow.db'}"


def open_run(
    uri: str, experiment: str, run_name: str, tags: Mapping[str, str], params: Mapping[str, object]
) -> TrackedRun:
    """Start the MLflow run of a federation, or continue the one of the same name and store.

    Creates and migrates a SQLite file once, here, before anything runs in parallel. Nested params get dotted names.
    Raises TrackingError when MLflow cannot be reached.
    """
    with speaking_to(uri):
        mlflow = connect(uri)
        experiment_id = _experiment_id(uri, experiment)
        run_id = _find_run(uri, experiment_id, run_name, tags.get(STORE_TAG))
        if run_id is None:
            run_id = mlflow.create_run(experiment_id, tags={**tags, RUN_TAG: run_name}, run_name=run_name).info.run_id
        mlflow.update_run(run_id, status="RUNNING")
    run = TrackedRun(uri, experiment, run_id)
    log_params(run, params)
    return run


def log_params(run: TrackedRun, params: Mapping[str, object]) -> None:
    """Record parameters that are not recorded yet; nested ones get dotted names."""
    from mlflow.entities import Param

    with speaking_to(run.uri):
        known = connect(run.uri).get_run(run.run_id).data.params
        new = [Param(key, value) for key, value in _flatten(params) if key not in known]
        for start in range(0, len(new), _PARAMS_PER_CALL):
            connect(run.uri).log_batch(run.run_id, params=new[start : start + _PARAMS_PER_CALL])


def log_round(
    run: TrackedRun, round_index: int, metrics: Mapping[str, float], edge_metrics: Mapping[str, Mapping[str, float]]
) -> None:
    """Record a round's metrics at step `round_index`, and each edge's in a child run of its own.

    A round that is already recorded is left as it is, so a resumed run may log its rounds again.
    """
    log_rounds(run, {round_index: (metrics, edge_metrics)})


def log_rounds(run: TrackedRun, rounds: Mapping[int, tuple[Metrics, Mapping[str, Metrics]]]) -> None:
    """`log_round` for several rounds, each with its index: one request for all that is new of an edge."""
    edges = sorted({edge_id for _, edge_metrics in rounds.values() for edge_id in edge_metrics})
    with speaking_to(run.uri):
        _log_steps(run.uri, run.run_id, {index: metrics for index, (metrics, _) in rounds.items()})
        experiment_id = connect(run.uri).get_run(run.run_id).info.experiment_id
        children = _edge_runs(run) if edges else {}
        for edge_id in edges:
            steps = {index: found[edge_id] for index, (_, found) in rounds.items() if edge_id in found}
            known = edge_id in children
            child = children[edge_id] if known else _start_edge_run(run, experiment_id, edge_id)
            _log_steps(run.uri, child, steps, new=not known)


def log_metrics(run: TrackedRun, metrics: Mapping[str, float]) -> None:
    """Record numbers that belong to no round; a later value stands beside an earlier one."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    with speaking_to(run.uri):
        entries = [Metric(name, value, now, 0) for name, value in metrics.items()]
        connect(run.uri).log_batch(run.run_id, metrics=entries)


def log_json(run: TrackedRun, document: object, path: str) -> None:
    """Keep a JSON document as artifact `path` of the run."""
    log_text(run, json.dumps(document, indent=2, sort_keys=True), path)


def log_text(run: TrackedRun, text: str, path: str) -> None:
    """Keep a text as artifact `path` of the run."""
    with speaking_to(run.uri):
        connect(run.uri).log_text(run.run_id, text, path)


def log_table(run: TrackedRun, rows: Sequence[Mapping[str, object]], path: str) -> None:
    """Keep rows with equal keys as artifact `path` (.json), which the UI shows as a table; a later call adds rows."""
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    with speaking_to(run.uri):
        connect(run.uri).log_table(run.run_id, columns, path)


def log_figure(run: TrackedRun, figure: "Figure", path: str) -> None:
    """Keep a matplotlib figure as artifact `path` (.png, .svg or .html) of the run."""
    with speaking_to(run.uri):
        connect(run.uri).log_figure(run.run_id, figure, path)


def log_folder(run: TrackedRun, folder: Path, artifact_path: str) -> None:
    """Copy a folder, an adapter for example, into the run's artifacts under `artifact_path`."""
    with speaking_to(run.uri):
        connect(run.uri).log_artifacts(run.run_id, str(folder), artifact_path)


def close_run(run: TrackedRun, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
    """End the run and its edges' child runs; `open_run` can continue it all the same."""
    with speaking_to(run.uri):
        for run_id in (*_edge_runs(run).values(), run.run_id):
            connect(run.uri).set_terminated(run_id, status)


def save_predictions(run: TrackedRun, predictions: Answers) -> None:
    """Keep the released model's answers, under the hash of the evaluation set they belong to."""
    log_text(run, predictions.to_json(), _predictions_path(predictions.evaluation_sha256))


def load_predictions(uri: str, run_id: str, evaluation_sha256: str) -> Answers | None:
    """Return the answers kept in a run for this evaluation set; with None the model has to be evaluated on it.

    Raises IntegrityError when what was kept belongs to another evaluation set or cannot be read.
    """
    path = _predictions_path(evaluation_sha256)
    with speaking_to(uri), TemporaryDirectory() as folder:
        client = connect(uri)
        if path not in {kept.path for kept in client.list_artifacts(run_id, str(Path(path).parent))}:
            return None
        text = Path(client.download_artifacts(run_id, path, folder)).read_text(encoding="utf-8")
    predictions = read_answers(text)
    if predictions.evaluation_sha256 != evaluation_sha256:
        raise IntegrityError(
            f"predictions kept as {path} belong to evaluation set {predictions.evaluation_sha256}; "
            "evaluate the model again"
        )
    return predictions


def save_evaluations(run: TrackedRun, evaluations: Mapping[str, EdgeEvaluation]) -> None:
    """Keep what the edges found the released model worth."""
    log_json(run, {edge_id: found.model_dump(mode="json") for edge_id, found in evaluations.items()}, _EVALUATIONS)


def load_evaluations(uri: str, run_id: str) -> dict[str, EdgeEvaluation]:
    """What the edges found a run's model worth; nothing where that was not kept.

    Raises IntegrityError when what was kept cannot be read.
    """
    with speaking_to(uri), TemporaryDirectory() as folder:
        client = connect(uri)
        if _EVALUATIONS not in {kept.path for kept in client.list_artifacts(run_id, str(Path(_EVALUATIONS).parent))}:
            return {}
        text = Path(client.download_artifacts(run_id, _EVALUATIONS, folder)).read_text(encoding="utf-8")
    try:
        return {edge_id: EdgeEvaluation.model_validate(found) for edge_id, found in json.loads(text).items()}
    except (ValueError, AttributeError) as error:
        raise IntegrityError(
            f"{_EVALUATIONS} of MLflow run {run_id} cannot be read ({' '.join(str(error).split())[:200]}); remove it, "
            "and the next release is compared with nothing"
        ) from None


def _experiment_id(uri: str, experiment: str) -> str:
    """Return the experiment's id; a new one on SQLite keeps its artifacts beside the database."""
    client = connect(uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        location = None
        if uri.startswith(SQLITE):
            location = (Path(uri.removeprefix(SQLITE)).absolute().parent / "mlartifacts" / experiment).as_uri()
        try:
            return str(client.create_experiment(experiment, artifact_location=location))
        except Exception as error:
            found = client.get_experiment_by_name(experiment)  # another process may have been first
            if found is None:
                raise error
    return str(found.experiment_id)


def _find_run(uri: str, experiment_id: str, run_name: str, store: str | None) -> str | None:
    found = connect(uri).search_runs([experiment_id], filter_string=f"tags.`{RUN_TAG}` = '{run_name}'")
    matches = [run.info.run_id for run in found if run.data.tags.get(STORE_TAG) == store]
    return matches[0] if matches else None


def _edge_runs(run: TrackedRun) -> dict[str, str]:
    """Return the id of every edge's child run."""
    client = connect(run.uri)
    experiment_id = client.get_run(run.run_id).info.experiment_id
    condition, token, children = f"tags.`mlflow.parentRunId` = '{run.run_id}'", None, {}
    while True:
        page = client.search_runs([experiment_id], filter_string=condition, page_token=token)
        children.update({child.data.tags.get(EDGE_TAG, ""): child.info.run_id for child in page})
        token = page.token
        if not token:
            return children


def _start_edge_run(run: TrackedRun, experiment_id: str, edge_id: str) -> str:
    tags = {"mlflow.parentRunId": run.run_id, EDGE_TAG: edge_id}
    return str(connect(run.uri).create_run(experiment_id, tags=tags, run_name=edge_id).info.run_id)


def _log_steps(uri: str, run_id: str, steps: Mapping[int, Metrics], new: bool = False) -> None:
    """Record the metrics of each step that has not been recorded; a step's metrics go in one transaction."""
    from mlflow.entities import Metric

    client, now = connect(uri), int(time.time() * 1000)
    names = sorted({name for metrics in steps.values() for name in metrics})
    if not names:
        return
    known = set() if new else {kept.step for kept in client.get_metric_history(run_id, names[0])}
    at_once = max(1, _METRICS_PER_CALL // len(names))
    missing = [step for step in steps if step not in known]
    for start in range(0, len(missing), at_once):
        chosen = missing[start : start + at_once]
        entries = [Metric(name, value, now, step) for step in chosen for name, value in steps[step].items()]
        client.log_batch(run_id, metrics=entries)


def _flatten(params: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in params.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, default=str)


def _predictions_path(evaluation_sha256: str) -> str:
    return f"predictions/{evaluation_sha256}.json"
