"""Model files as MLflow keeps and serves them: a python-function model that needs no code of ours.

Which of them is a version, and which version is champion, is `tasks.registry`'s matter.
"""

import json
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fedpipe_core.base_folder import BASE_FILE
from fedpipe_core.errors import ReleaseError
from tasks.mlflow_client import connect, speaking_to
from tasks.tracking import TrackedRun

_SERVING_CODE = Path(__file__).with_name("serving_model.py")
_SERVING_PACKAGES = ("mlflow", "torch", "transformers", "safetensors")
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


def fetch_files(uri: str, location: str, folder: Path) -> Path:
    """Download the files at an artifact location. Raises TrackingError when MLflow cannot deliver them."""
    import mlflow

    with speaking_to(uri):
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=location, dst_path=str(folder), tracking_uri=uri))


def serving_requirements(is_adapter: bool) -> list[str]:
    """Return what a server has to install, pinned to what is installed here without build suffixes like `+cpu`."""
    packages = (*_SERVING_PACKAGES, "peft") if is_adapter else _SERVING_PACKAGES
    return [f"{name}=={installed_version(name).partition('+')[0]}" for name in packages]


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

    # A column without a name takes a list of texts and a table with one column; a named one refuses the list.
    inputs = Schema([ColSpec("string")])
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
