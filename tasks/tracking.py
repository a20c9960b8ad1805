"""What of a federation is recorded in MLflow, and how: runs, metrics per round, artifacts, model files.

The only module that imports mlflow, and not before it is needed. It speaks to `MlflowClient` with explicit run ids:
the fluent API's active run is state of a thread and is lost in parallel tasks. Which version is champion is
`tasks.registry`'s matter.
"""

import fcntl
import functools
import json
import logging
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import shorten
from typing import TYPE_CHECKING, Any, Literal

from fedpipe_core.base_folder import BASE_FILE
from fedpipe_core.config import TrackingSpec
from fedpipe_core.errors import IntegrityError, ReleaseError, TrackingError
from fedpipe_core.predictions import Answers
from fedpipe_core.token_predictions import read_answers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Metrics = Mapping[str, float]

RUN_TAG = "fedpipe.run"
STORE_TAG = "fedpipe.store"
EDGE_TAG = "fedpipe.edge"
_SQLITE = "sqlite:///"
_SERVING_CODE = Path(__file__).with_name("serving_model.py")
_SERVING_PACKAGES = ("mlflow", "torch", "transformers", "safetensors")
_PARAMS_PER_CALL = 100  # MLflow's limits of one batch
_METRICS_PER_CALL = 1000
_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",  # the default of 7 lets an unreachable server hang for minutes
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # stdout belongs to the command's result
}


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
    return f"{_SQLITE}{folder.absolute() / 'mlflow.db'}"


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


def connect_early(uri: str) -> None:
    """Import MLflow and open its database in a thread, while other work goes on; `open_run` tells what fails."""

    def work() -> None:
        with suppress(Exception):
            connect(uri)

    threading.Thread(target=work, name="MLflow", daemon=True).start()


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


MODEL_PARENT = "artifacts"  # a logged version keeps its model folder below, under the name it had when logged


@dataclass(frozen=True)
class LoggedModel:
    """Model files that MLflow holds, not yet registered."""

    model_id: str
    location: str


def log_model(run: TrackedRun, name: str, model_folder: Path, card: str) -> LoggedModel:
    """Log a merged model, or an adapter that names its base, as a python-function model that needs no code of ours.

    The serving code travels as text; requirements are the installed versions of what it imports; the card is README.md.
    Raises ReleaseError when the folder holds no model.
    """
    if not any((model_folder / name).is_file() for name in ("config.json", BASE_FILE)):
        raise ReleaseError(
            f"{model_folder} holds no config.json; a model to register is a folder in Hugging Face format"
        )
    from mlflow.entities import LoggedModelOutput

    with speaking_to(run.uri), TemporaryDirectory() as folder:
        client = connect(run.uri)
        experiment_id = client.get_run(run.run_id).info.experiment_id
        logged = client.create_logged_model(experiment_id, name=name, source_run_id=run.run_id)
        files = Path(folder) / "model"
        _write_model_files(files, model_folder, logged, run.run_id)
        (files / "README.md").write_text(card, encoding="utf-8")
        _upload_model(client, logged.model_id, files)
        client.log_outputs(run.run_id, [LoggedModelOutput(logged.model_id, step=0)])
    return LoggedModel(logged.model_id, logged.artifact_location)


@functools.lru_cache(maxsize=8)
def connect(uri: str) -> Any:
    """Return the `MlflowClient` of a tracking server or database, whose registry lies at the same place."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    with _sole_migration(uri):
        from mlflow import MlflowClient

        for noisy in ("mlflow", "alembic"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.search_experiments(max_results=1)  # creates and migrates a SQLite file
        return client


@contextmanager
def speaking_to(uri: str) -> Iterator[None]:
    """Turn what MLflow raises inside the block into one TrackingError with the start of the reason."""
    try:
        yield
    except Exception as error:
        if not _is_trackers_fault(error):
            raise
        shown = re.sub(r"//[^/@]*@", "//", uri)  # a database URI may carry a password
        reason = shorten(str(error) or repr(error), 300)
        raise TrackingError(
            f"MLflow at {shown} did not answer or refused: {reason}; check tracking.uri or MLFLOW_TRACKING_URI"
        ) from error


def _is_trackers_fault(error: Exception) -> bool:
    origin = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError) or origin in ("mlflow", "sqlalchemy", "requests", "boto3", "botocore")


@contextmanager
def _sole_migration(uri: str) -> Iterator[None]:
    """Let one process at a time open a SQLite file: concurrent first migrations break each other."""
    if not uri.startswith(_SQLITE):
        yield
        return
    database = Path(uri.removeprefix(_SQLITE))
    database.parent.mkdir(parents=True, exist_ok=True)
    with database.with_name(f"{database.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed, and when the process dies
        yield


def _experiment_id(uri: str, experiment: str) -> str:
    """Return the experiment's id; a new one on SQLite keeps its artifacts beside the database."""
    client = connect(uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        location = None
        if uri.startswith(_SQLITE):
            location = (Path(uri.removeprefix(_SQLITE)).absolute().parent / "mlartifacts" / experiment).as_uri()
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


def _write_model_files(files: Path, model_folder: Path, logged: Any, run_id: str) -> None:
    from mlflow.models import Model
    from mlflow.pyfunc import save_model

    is_adapter = (model_folder / BASE_FILE).is_file()
    described = model_folder / (BASE_FILE if is_adapter else "config.json")
    architectures = json.loads(described.read_text(encoding="utf-8")).get("architectures", [])
    classifies = any(str(name).endswith("ForSequenceClassification") for name in architectures)
    save_model(
        files,
        mlflow_model=Model(
            artifact_path=logged.artifact_location, model_uuid=logged.model_id, run_id=run_id, model_id=logged.model_id
        ),
        python_model=str(_SERVING_CODE),
        artifacts={"model": str(model_folder)},
        signature=_signature(classifies),
        input_example=["where is my parcel", "set a timer for ten minutes"],
        pip_requirements=serving_requirements(is_adapter),
    )


def _signature(classifies: bool) -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    inputs = Schema(
        [ColSpec("string")]
    )  # takes a list of texts and a table with one column; named, it refuses the list
    if classifies:
        outputs = [ColSpec("long", "label"), ColSpec("string", "label_name"), ColSpec("double", "score")]
        return ModelSignature(inputs=inputs, outputs=Schema(outputs))
    longest = ParamSchema([ParamSpec("max_new_tokens", "integer", 128)])
    return ModelSignature(inputs=inputs, outputs=Schema([ColSpec("string", "text")]), params=longest)


def _upload_model(client: Any, model_id: str, files: Path) -> None:
    try:
        client.log_model_artifacts(model_id, str(files))
    except Exception:
        client.finalize_logged_model(model_id, "FAILED")
        raise
    client.finalize_logged_model(model_id, "READY")


def serving_requirements(is_adapter: bool) -> list[str]:
    """Return what a server has to install, pinned to what is installed here without build suffixes like `+cpu`."""
    packages = (*_SERVING_PACKAGES, "peft") if is_adapter else _SERVING_PACKAGES
    return [f"{name}=={installed_version(name).partition('+')[0]}" for name in packages]


def fetch_files(uri: str, location: str, folder: Path) -> Path:
    """Download the files at an artifact location. Raises TrackingError when MLflow cannot deliver them."""
    import mlflow

    with speaking_to(uri):
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=location, dst_path=str(folder), tracking_uri=uri))
