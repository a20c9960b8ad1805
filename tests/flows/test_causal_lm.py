"""A whole run of a causal language model, and what programs that know nothing of this project make of its release."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import Command, invoke
from tiny_federation import EDGES, write_writers_federation

from tasks.mlflow_client import connect

READER = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

kind, folder, rows = sys.argv[1:]
if kind == "adapter":
    from peft import AutoPeftModelForCausalLM as AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
total = tokens = 0
for line in open(rows):
    row = json.loads(line)
    asked = [{"role": "user", "content": row["prompt"]}]
    answered = [*asked, {"role": "assistant", "content": row["completion"]}]
    prompt, whole = (tokenizer.apply_chat_template(said, return_dict=False) for said in (asked, answered))
    labels = [-100] * len(prompt) + whole[len(prompt) :]
    with torch.inference_mode():
        loss = model(input_ids=torch.tensor([whole]), labels=torch.tensor([labels])).loss.item()
    learned = len(whole) - len(prompt)
    total, tokens = total + loss * learned, tokens + learned
ours = [name for name in sys.modules if name.split(".")[0] in ("flows", "tasks", "fedpipe_core")]
print(json.dumps({"loss": total / tokens, "ours": ours}))
"""
METRICS = {"loss", "perplexity", "token_accuracy"}
WRITTEN = {"bleu", "exact_match"}


@pytest.fixture(scope="module")
def run(prefect_api: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a federation of language models, and what its one run printed."""
    folder = tmp_path_factory.mktemp("writers")
    training = {"training.learning_rate": 0.03, "training.examples_per_round": 240}
    config = write_writers_federation(folder, **training, **{"release.slice_column": "name"})
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        outcome = invoke("run", config, "--run", "first", "--json")
    assert outcome.exit_code == 0, outcome.stderr
    return folder, outcome.document


def test_model_learns_to_answer_and_text_is_written_before_and_after(run: tuple[Path, dict[str, Any]]) -> None:
    _, result = run
    before, after = result["baseline_metrics"], result["metrics"]
    assert set(before) == set(after) == METRICS | WRITTEN
    assert after["loss"] < before["loss"] / 2
    assert before["bleu"] < 5
    assert after["bleu"] > 50
    assert set(result["rounds"][0]["metrics"]) == METRICS
    for entry in result["rounds"]:
        assert {edge_id: set(values) for edge_id, values in entry["edge_metrics"].items()} == dict.fromkeys(
            EDGES, METRICS
        )


def test_first_version_is_promoted_by_its_loss(run: tuple[Path, dict[str, Any]]) -> None:
    _, result = run
    decision = result["model"]["decision"]
    assert decision["promoted"]
    assert any("no champion yet; loss is" in reason for reason in decision["reasons"])


def test_every_export_is_judged_like_the_final_model(run: tuple[Path, dict[str, Any]]) -> None:
    _, result = run
    assert [export["scheme"] for export in result["exports"]] == ["adapter", "merged"]
    for export in result["exports"]:
        assert export["metrics"] == pytest.approx(result["metrics"], rel=1e-3)


@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_released_folder_has_the_same_loss_without_this_project(
    run: tuple[Path, dict[str, Any]], kind: str, tmp_path: Path
) -> None:
    folder, result = run
    released = Path(result["store"]) / result["run"] / "release" / kind
    command = [sys.executable, "-P", "-c", READER, kind, str(released), str(folder / "test.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["loss"] == pytest.approx(result["metrics"]["loss"], rel=1e-4)
    assert found["ours"] == []


def test_registered_version_writes_text_and_says_what_it_is(run: tuple[Path, dict[str, Any]]) -> None:
    import mlflow

    folder, result = run
    client = connect(result["tracking"]["uri"])
    source = client.get_model_version(result["model"]["name"], str(result["model"]["version"])).source
    model = mlflow.pyfunc.load_model(source)
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    written = model.predict([row["prompt"] for row in rows], params={"max_new_tokens": 6})["text"]
    right = sum(text == row["completion"] for text, row in zip(written, rows, strict=True))
    assert right / len(rows) == pytest.approx(result["metrics"]["exact_match"], abs=0.15)
    card = next(Path(source.removeprefix("file://")).rglob("README.md")).read_text()
    assert "pipeline_tag: text-generation" in card
    assert "AutoModelForCausalLM" in card


def test_a_second_run_is_held_against_the_champion_text_by_text(
    run: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, result = run
    monkeypatch.setenv("MLFLOW_TRACKING_URI", result["tracking"]["uri"])
    fedpipe: Command = invoke
    changes = ("--set", "release.metric=bleu", "--set", "training.examples_per_round=16")
    second = fedpipe("run", folder / "federation.yaml", "--run", "second", *changes, "--json").document
    assert not second["model"]["decision"]["promoted"]
    assert second["model"]["decision"]["reasons"][0].startswith("bleu is ")
