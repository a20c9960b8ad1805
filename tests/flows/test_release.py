"""The released folders, read by programs that know nothing of this project."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Command, FinishedRun, Outcome, invoke
from tiny_federation import rows, write_federation, write_rows
from tiny_models import LABELS

from tasks import registry
from tasks.mlflow_client import connect
from tasks.storage import open_store

READER = """
import json, sys
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

kind, folder, rows = sys.argv[1:]
if kind == "adapter":
    from peft import AutoPeftModelForSequenceClassification
    labels = {labels}
    model = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=labels)
else:
    model = AutoModelForSequenceClassification.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
examples = [json.loads(line) for line in open(rows)]
batch = tokenizer([example["text"] for example in examples], padding=True, return_tensors="pt")
with torch.inference_mode():
    answers = model.eval()(**batch).logits.argmax(dim=-1).tolist()
right = sum(answer == example["label"] for answer, example in zip(answers, examples))
print(json.dumps({
    "accuracy": right / len(examples),
    "names": [model.config.id2label[index] for index in range(4)],
    "ours": [name for name in sys.modules if name.split(".")[0] in ("flows", "tasks", "fedpipe_core")],
}))
"""


def read(kind: str, run: Path, test_rows: Path, working_directory: Path) -> dict[str, object]:
    """What a program that knows the library alone makes of an export."""
    command = [sys.executable, "-P", "-c", READER.replace("{labels}", str(LABELS)), kind]
    arguments = [str(run / "release" / kind), str(test_rows)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=working_directory, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_merged_folder_loads_with_transformers_alone(finished: FinishedRun, tmp_path: Path) -> None:
    found = read("merged", finished.store, finished.folder / "test.jsonl", tmp_path)
    assert found["accuracy"] == pytest.approx(finished.result["metrics"]["accuracy"])
    assert found["names"] == [f"share {label}" for label in range(4)]
    assert found["ours"] == []


def test_adapter_folder_loads_with_peft_alone(finished: FinishedRun, tmp_path: Path) -> None:
    found = read("adapter", finished.store, finished.folder / "test.jsonl", tmp_path)
    assert found["accuracy"] == pytest.approx(finished.result["metrics"]["accuracy"])
    assert found["ours"] == []


def test_run_without_release_is_released_later(finished: FinishedRun, fedpipe: Command, tmp_path: Path) -> None:
    config, store = finished.folder / "federation.yaml", tmp_path / "store"
    fedpipe("run", config, "--run", "later", "--set", f"store={store}", "--set", "name=later", "--no-release")
    outcome = fedpipe("release", "later", "--store", store, "--json")
    assert outcome.exit_code == 0, outcome.stderr
    assert outcome.document["model"]["decision"]["promoted"]
    assert {export["scheme"] for export in outcome.document["exports"]} == {"adapter", "merged"}


@pytest.mark.slow
def test_registry_that_is_away_costs_no_export_and_the_release_is_completed_later(
    finished: FinishedRun, fedpipe: Command, fedpipe_process: Command, tmp_path: Path
) -> None:
    config, store = finished.folder / "federation.yaml", tmp_path / "store"
    fedpipe("run", config, "--run", "away", "--set", f"store={store}", "--set", "name=away", "--no-release")
    outcome = fedpipe_process("release", "away", "--store", store, MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert outcome.exit_code == 1
    assert "MLflow at http://127.0.0.1:9 did not answer or refused" in outcome.stderr
    assert f"the exports are kept in {store}/away/release/, and `fedpipe release away` registers" in outcome.stderr
    assert (store / "away" / "release" / "merged" / "model.safetensors").is_file()
    assert not (store / "away" / "manifest.json").exists()
    assert fedpipe("release", "away", "--store", store, "--json").document["model"]["decision"]["promoted"]


@pytest.fixture(scope="module")
def unreleased(finished: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with run `kept`, whose rounds are done and whose model was never released."""
    config, store = finished.folder / "federation.yaml", tmp_path_factory.mktemp("unreleased") / "store"
    changes = (
        "--set",
        f"store={store}",
        "--set",
        "name=kept",
        "--set",
        f"tracking.uri={finished.result['tracking']['uri']}",
    )
    assert invoke("run", config, "--run", "kept", *changes, "--no-release").exit_code == 0
    return store


def remove(path: Path) -> None:
    path.unlink()


def alter(path: Path) -> None:
    """Flip a bit of data; count a record's number up."""
    if path.suffix == ".json":
        document = json.loads(path.read_bytes())
        name = next(name for name, value in document.items() if isinstance(value, int | float))
        path.write_text(json.dumps({**document, name: document[name] + 1}))
    else:
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


Damage = tuple[Callable[[Path], None], str, str]
DAMAGES: list[Damage] = [
    (remove, "rounds/0002/round.json", "is missing"),
    (remove, "rounds/0003/global.safetensors", "is missing"),
    (remove, "rounds/0001/updates/east.safetensors", "is missing"),
    (remove, "rounds/0001/updates/east.json", "is missing"),
    (alter, "rounds/0003/global.safetensors", "was altered"),
    (alter, "rounds/0001/updates/east.safetensors", "was altered"),
    (alter, "rounds/0001/updates/east.json", "was altered"),
    (alter, "rounds/0001/round.json", "and kept/result.json differ on round 1"),
    (alter, "rounds/0002/round.json", "and kept/result.json differ on round 2"),
    (alter, "profiles/west.json", "was altered"),
]


def assert_refused_whole(outcome: Outcome, store: Path, uri: str, key: str, words: str) -> None:
    """One sentence that names the object, and neither exports nor a manifest nor a model of that name."""
    said = [line for line in outcome.stderr.splitlines() if not line.startswith("[")]
    assert outcome.exit_code == 1
    assert len(said) == 1, outcome.stderr
    assert f"kept/{key}" in said[0]
    assert words in said[0]
    assert not (store / "kept" / "release").exists()
    assert not (store / "kept" / "manifest.json").exists()
    assert registry.versions(uri, "kept") == []
    assert connect(uri).search_registered_models(filter_string="name = 'kept'") == []


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: f"{damage[1]} {damage[2]}")
def test_missing_or_altered_object_is_named_and_nothing_is_registered(
    unreleased: Path, fedpipe: Command, tracking_uri: str, tmp_path: Path, damage: Damage
) -> None:
    spoil, key, words = damage
    store = Path(shutil.copytree(unreleased, tmp_path / "store"))
    spoil(store / "kept" / key)
    outcome = fedpipe("release", "kept", "--store", store)
    assert_refused_whole(outcome, store, tracking_uri, key, words)


@pytest.mark.parametrize("spoil", [remove, alter])
def test_missing_or_altered_object_of_a_bucket_is_named_too(
    unreleased: Path, fedpipe: Command, tracking_uri: str, s3_root: str, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:  # fmt: skip
    key, words = "rounds/0001/updates/east.safetensors", "is missing" if spoil is remove else "was altered"
    store = Path(shutil.copytree(unreleased, tmp_path / "store"))
    spoil(store / "kept" / key)
    bucket = open_store(s3_root)
    for path in store.rglob("*"):
        if path.is_file() and path.name != ".fedpipe":
            bucket.put_file(path.relative_to(store).as_posix(), path)
    outcome = fedpipe("release", "kept", "--store", s3_root)
    assert_refused_whole(outcome, store, tracking_uri, key, words)
    assert not [name for name in bucket.list("kept") if "/release/" in name or name.endswith("manifest.json")]


def test_unknown_export_is_refused(finished: FinishedRun, fedpipe: Command) -> None:
    outcome = fedpipe("run", finished.folder / "federation.yaml", "--set", "release.exports=[merged, q5_k]")
    assert outcome.exit_code == 2
    assert "release.exports.1: " in outcome.stderr


def test_release_of_an_unknown_run_is_refused(finished: FinishedRun, fedpipe: Command) -> None:
    outcome = fedpipe("release", "nothing", "--store", finished.result["store"])
    assert outcome.exit_code == 1
    assert "run nothing is not in" in outcome.stderr


@pytest.mark.slow
@pytest.mark.parametrize("registered", ["merged", "adapter"])
def test_champion_is_judged_anew_on_a_new_held_out_set(
    finished: FinishedRun, fedpipe: Command, tmp_path: Path, registered: str
) -> None:
    changes = {"name": f"rejudged-{registered}", "release.registered": registered}
    config, store = write_federation(tmp_path, **changes), tmp_path / "out" / "store"
    first = fedpipe("run", config, "--run", "before", "--json").document
    write_rows(tmp_path / "test.jsonl", rows(100, seed=99))
    second = fedpipe("run", config, "--run", "after", "--set", "training.examples_per_round=8", "--json").document
    assert first["model"]["decision"]["promoted"]
    assert not second["model"]["decision"]["promoted"]
    reasons = " ".join(second["model"]["decision"]["reasons"])
    champion = float(reasons.split("against the champion's ")[1].split(",")[0])
    found = read(registered, store / "before", tmp_path / "test.jsonl", tmp_path)
    assert champion == pytest.approx(found["accuracy"], abs=1e-4)
    assert found["accuracy"] != pytest.approx(first["metrics"]["accuracy"], abs=1e-4)


def test_run_that_registers_its_adapter_ends_in_a_champion_that_mlflow_loads(
    finished: FinishedRun, fedpipe: Command, tracking_uri: str, tmp_path: Path
) -> None:
    import mlflow

    config = finished.folder / "federation.yaml"
    changes = ("name=light", "release.registered=adapter", "release.exports=[adapter]", f"store={tmp_path / 'store'}")
    options = [part for change in changes for part in ("--set", change)]
    result = fedpipe("run", config, "--run", "light", *options, "--json").document
    assert (result["model"]["alias"], result["model"]["decision"]["promoted"]) == ("champion", True)
    source = connect(tracking_uri).get_model_version_by_alias("light", "champion").source
    files = [path for path in Path(source.removeprefix("file://")).rglob("*") if path.is_file()]
    assert {"base.json", "adapter_model.safetensors"} < {path.name for path in files}
    assert not any(path.name == "model.safetensors" for path in files)
    model = mlflow.pyfunc.load_model("models:/light@champion")  # at MLFLOW_TRACKING_URI
    examples = [json.loads(line) for line in (finished.folder / "test.jsonl").read_text().splitlines()]
    answers = model.predict([example["text"] for example in examples])
    right = sum(label == example["label"] for label, example in zip(answers["label"], examples, strict=True))
    assert right / len(examples) == pytest.approx(result["metrics"]["accuracy"])
    assert set(answers["label_name"]) <= {f"share {label}" for label in range(LABELS)}
