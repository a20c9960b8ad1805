"""Registered versions served where nothing of this project can be imported: the base copied, and the base named."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from prefect_processes import running, wait_for
from tiny_models import LABELS, WORDS, random_adapter, save_tiny_model

from fedpipe_core.architecture import adaptable_modules
from fedpipe_core.base_folder import base_sha256
from fedpipe_core.config import ModelSpec
from fedpipe_core.export import EXPORT_SCHEMES, TunedModel, merge
from fedpipe_core.model import load_base
from tasks import registry
from tasks.mlflow_client import connect
from tasks.registry import ADAPTER_TAG, BASE_TAG
from tasks.serving_model import base_sha256 as served_base_sha256
from tasks.tracking import TrackedRun, open_run

pytestmark = pytest.mark.slow

TEXTS = [" ".join(WORDS[start : start + 4]) for start in (0, 17, 40)]
NAMES = [f"share {label}" for label in range(LABELS)]
REFUSE_OUR_CODE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("fedpipe_core", "tasks", "flows"):
            raise ImportError("imported " + name)
sys.meta_path.insert(0, Refuse())
"""
ASK = """
import json, sys
import mlflow, pandas
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
texts = json.loads(sys.argv[3])
answers = model.predict(texts)
assert answers.equals(model.predict(pandas.DataFrame({"text": texts})))
print(json.dumps(answers.to_dict("records")))
"""


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> TunedModel:
    folder = save_tiny_model(tmp_path_factory.mktemp("base"), "bert")
    base = load_base(ModelSpec(base=str(folder)), LABELS, 32, seed=0)
    return TunedModel(base, random_adapter(base.model, dict.fromkeys(adaptable_modules(base.model), 2)), "fp32", NAMES)


@pytest.fixture(scope="module")
def run(tuned: TunedModel, tmp_path_factory: pytest.TempPathFactory) -> TrackedRun:
    """An MLflow run with models `merged` and `adapter`, each with a champion."""
    folder = tmp_path_factory.mktemp("mlflow")
    opened = open_run(f"sqlite:///{folder / 'mlflow.db'}", "served", "run-1", {}, {})
    for scheme in ("merged", "adapter"):
        EXPORT_SCHEMES[scheme].write(tuned, folder / scheme)
        tags = {ADAPTER_TAG: "a", BASE_TAG: tuned.base.sha256}
        version = registry.register_model(opened, scheme, folder / scheme, tags, "# Card")
        registry._set_alias(version, registry.CHAMPION)
    return opened


@pytest.fixture
def elsewhere(tmp_path: Path) -> dict[str, str]:
    """The environment of a process that can import nothing of this project."""
    (tmp_path / "sitecustomize.py").write_text(REFUSE_OUR_CODE)
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    return {**os.environ, "PATH": path, "PYTHONPATH": str(tmp_path), "GIT_PYTHON_REFRESH": "quiet"}


def expected(tuned: TunedModel) -> list[dict[str, Any]]:
    """What the model merged in memory answers."""
    tokens = tuned.base.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        scores, labels = merge(tuned.base.model, tuned.adapter)(**tokens).logits.softmax(-1).max(-1)
    return [
        {"label": label, "label_name": NAMES[label], "score": pytest.approx(score, abs=1e-5)}
        for label, score in zip(labels.tolist(), scores.tolist(), strict=True)
    ]


def ask(run: TrackedRun, name: str, environment: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", ASK, run.uri, f"models:/{name}@champion", json.dumps(TEXTS)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)


@pytest.mark.parametrize("name", ["merged", "adapter"])
def test_champion_is_loaded_and_answers_like_the_merged_model(
    run: TrackedRun, tuned: TunedModel, name: str, elsewhere: dict[str, str], tmp_path: Path
) -> None:
    done = ask(run, name, elsewhere, tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == expected(tuned)


def test_server_of_mlflow_answers_over_http(
    run: TrackedRun, tuned: TunedModel, elsewhere: dict[str, str], tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["models", "serve", "--model-uri", "models:/merged@champion", "--env-manager", "local", "--port"]
    environment = {**elsewhere, "MLFLOW_TRACKING_URI": run.uri}
    log = tmp_path / "serve.log"
    with (
        running([*command, str(port)], environment, log, module="mlflow"),
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):

        def pinged() -> bool | None:
            try:
                return client.get("/ping").is_success or None
            except httpx.TransportError:
                return None

        wait_for(pinged, 240, "the server's answer", log)
        answer = client.post("/invocations", json={"inputs": TEXTS}).raise_for_status().json()
    assert answer["predictions"] == expected(tuned)


def test_adapters_version_holds_no_base_and_names_it_by_id_and_hash(run: TrackedRun, tuned: TunedModel) -> None:
    def files(name: str) -> dict[str, Path]:
        location = connect(run.uri).get_model_version_download_uri(name, "1").removeprefix("file://")
        return {str(path.relative_to(location)): path for path in Path(location).rglob("*") if path.is_file()}

    adapter, merged = files("adapter"), files("merged")
    assert not any(name.endswith("model.safetensors") and "adapter_model" not in name for name in adapter)
    (reference,) = (path for name, path in adapter.items() if name.endswith("base.json"))
    found = json.loads(reference.read_text())
    assert (found["base"], found["sha256"]) == (str(tuned.base.folder), tuned.base.sha256)
    sizes = [sum(p.stat().st_size for n, p in kept.items() if n.endswith(".safetensors")) for kept in (adapter, merged)]
    assert sizes[0] < sizes[1] / 2
    assert "peft==" in adapter["requirements.txt"].read_text()


def test_adapter_refuses_another_base(
    run: TrackedRun, tuned: TunedModel, elsewhere: dict[str, str], tmp_path: Path
) -> None:
    other = save_tiny_model(tmp_path / "other", "bert", hidden_size=64)
    done = ask(run, "adapter", {**elsewhere, "FEDPIPE_BASE": str(other)}, tmp_path)
    assert done.returncode == 1
    assert f"the adapter was trained on {tuned.base.sha256}; set FEDPIPE_BASE" in done.stderr


def test_served_code_hashes_a_base_as_a_release_does(tuned: TunedModel) -> None:
    assert served_base_sha256(tuned.base.folder) == base_sha256(tuned.base.folder)
