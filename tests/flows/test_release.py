"""The released folders, read by programs that know nothing of this project."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import Command, FinishedRun
from tiny_federation import rows, write_federation, write_rows
from tiny_models import LABELS

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


@pytest.mark.parametrize("removed", ["rounds/0002/round.json", "rounds/0003/global.safetensors"])
def test_unfinished_or_damaged_run_is_refused_before_anything_is_registered(
    finished: FinishedRun, fedpipe: Command, tmp_path: Path, removed: str
) -> None:
    store = Path(shutil.copytree(finished.store.parent, tmp_path / "store"))
    (store / "first" / removed).unlink()
    before = fedpipe("lineage", "tiny@challenger").stdout
    outcome = fedpipe("release", "first", "--store", store)
    assert outcome.exit_code == 1
    assert f"first/{removed}" in outcome.stderr
    assert fedpipe("lineage", "tiny@challenger").stdout == before


def test_unknown_export_is_refused(finished: FinishedRun, fedpipe: Command) -> None:
    outcome = fedpipe("run", finished.folder / "federation.yaml", "--set", "release.exports=[merged, q5_k]")
    assert outcome.exit_code == 2
    assert "release.exports.1: " in outcome.stderr


def test_release_of_an_unknown_run_is_refused(finished: FinishedRun, fedpipe: Command) -> None:
    outcome = fedpipe("release", "nothing", "--store", finished.result["store"])
    assert outcome.exit_code == 1
    assert "run nothing is not in" in outcome.stderr


def test_champion_is_judged_anew_on_a_new_held_out_set(finished: FinishedRun, fedpipe: Command, tmp_path: Path) -> None:
    config, store = write_federation(tmp_path, name="rejudged"), tmp_path / "out" / "store"
    first = fedpipe("run", config, "--run", "before", "--json").document
    write_rows(tmp_path / "test.jsonl", rows(100, seed=99))
    second = fedpipe("run", config, "--run", "after", "--set", "training.examples_per_round=8", "--json").document
    assert first["model"]["decision"]["promoted"]
    assert not second["model"]["decision"]["promoted"]
    reasons = " ".join(second["model"]["decision"]["reasons"])
    champion = float(reasons.split("against the champion's ")[1].split(",")[0])
    found = read("merged", store / "before", tmp_path / "test.jsonl", tmp_path)
    assert champion == pytest.approx(found["accuracy"], abs=1e-4)
