"""Whole runs whose edges judge: without a row at the coordinator, and beside the coordinator's rows."""

import html
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from commands import Command, FinishedRun, invoke, running
from tiny_federation import EDGES, ROUNDS, write_federation, write_writers_federation
from tiny_models import LABELS

from fedpipe_core.combined_metrics import combined_metrics
from fedpipe_core.evaluation_schemas import EdgeEvaluation
from tasks.mlflow_client import connect

METRICS = {"accuracy", "macro_f1", "loss"}
AT_EDGES = {"train": "{edge_id}.jsonl", "labels": LABELS}  # the tiny federation's rows, without a test file
PATIENCE_SECONDS = 240


@pytest.fixture(scope="module")
def at_edges(prefect_api: str, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """The tiny federation without a row at the coordinator, run and released once."""
    folder = tmp_path_factory.mktemp("edges")
    config = write_federation(folder, data=AT_EDGES, **{"release.exports": ["adapter", "merged", "int8"]})
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        outcome = invoke("run", config, "--run", "first", "--json")
    assert outcome.exit_code == 0, outcome.stderr
    return FinishedRun(folder, outcome)


def written(run: Path) -> dict[str, int]:
    """When every object of a run was written."""
    return {path.relative_to(run).as_posix(): path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}


def evaluations(entry: dict[str, Any]) -> dict[str, EdgeEvaluation]:
    return {edge_id: EdgeEvaluation.model_validate(found) for edge_id, found in entry["evaluations"].items()}


def test_every_round_and_the_final_adapter_are_judged_at_the_edges(at_edges: FinishedRun) -> None:
    result = at_edges.result
    assert set(result["metrics"]) == set(result["baseline_metrics"]) == METRICS
    assert result["metrics"]["loss"] < 0.8 * result["baseline_metrics"]["loss"]
    for entry in result["rounds"]:
        found = evaluations(entry)
        assert set(found) == set(EDGES)
        assert entry["metrics"] == combined_metrics(found)
        assert {edge.rows for edge in found.values()} == {6}
    assert result["metrics"] == result["rounds"][-1]["metrics"]
    last = json.loads((at_edges.store / f"rounds/{ROUNDS + 1:04d}/judged.json").read_bytes())
    assert last["global_sha256"] == result["adapter_sha256"]
    assert last["metrics"] == result["metrics"]
    assert f"round {ROUNDS}/{ROUNDS}: accuracy" in at_edges.outcome.stderr


def test_adapter_is_the_same_wherever_it_is_judged(at_edges: FinishedRun, finished: FinishedRun) -> None:
    assert at_edges.result["adapter_sha256"] == finished.result["adapter_sha256"]


def test_mlflow_holds_the_combined_metrics_and_every_edges_own(at_edges: FinishedRun) -> None:
    tracking, rounds = at_edges.result["tracking"], at_edges.result["rounds"]
    client = connect(tracking["uri"])
    history = {entry.step: entry.value for entry in client.get_metric_history(tracking["run_id"], "accuracy")}
    told = {entry["round"]: entry["metrics"]["accuracy"] for entry in rounds}
    assert history == {0: at_edges.result["baseline_metrics"]["accuracy"], **told}
    experiment = client.get_experiment_by_name(tracking["experiment"])
    children = client.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{tracking['run_id']}'")
    for child in children:
        own = {entry.step: entry.value for entry in client.get_metric_history(child.info.run_id, "loss")}
        judged = {e["round"]: e["evaluations"][child.info.run_name]["metrics"]["loss"] for e in rounds}
        assert own == {0: own[0], **judged}


def test_exports_are_compared_on_made_up_rows_and_say_so(at_edges: FinishedRun) -> None:
    exports = {entry["scheme"]: entry for entry in at_edges.result["exports"]}
    assert set(exports) == {"adapter", "merged", "int8"}
    for entry in exports.values():
        assert (entry["metrics"], entry["loss_increase"], entry["kept"]) == ({}, None, True)
        assert "its loss was not measured: the coordinator has no rows" in entry["reason"]
        assert entry["latency"]["pairs"] > 0
    assert exports["merged"]["agreement"] == exports["adapter"]["agreement"] == 1.0


def test_first_version_is_promoted_by_what_the_edges_found(at_edges: FinishedRun) -> None:
    decision, accuracy = at_edges.result["model"]["decision"], at_edges.result["metrics"]["accuracy"]
    assert decision["promoted"]
    assert f"no champion yet; accuracy is {accuracy:.4f} over 3 edges" in decision["reasons"]
    assert [check["name"] for check in decision["checks"]] == [
        *(f"agreement of {scheme}" for scheme in ("adapter", "merged", "int8")),
        "accuracy",
    ]


def test_card_report_status_and_verification_know_the_edges_values(
    at_edges: FinishedRun, fedpipe: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", at_edges.result["tracking"]["uri"])
    store, metrics = at_edges.result["store"], at_edges.result["metrics"]
    assert fedpipe("status", "first", "--store", store, "--json").document["metrics"] == metrics
    page = tmp_path / "page.html"
    assert fedpipe("report", "first", "--store", store, "--out", page).exit_code == 0
    assert "the global model on the edges' rows" in html.unescape(page.read_text(encoding="utf-8"))
    assert fedpipe("verify", "tiny@champion", "--json").document["verified"]
    version = connect(at_edges.result["tracking"]["uri"]).get_model_version_by_alias("tiny", "champion")
    assert "On rows that each edge kept out of training" in version.description
    assert f"| together | 18 | {metrics['accuracy']:.4f} |" in version.description


def test_a_forged_answer_of_an_edge_is_found_before_a_release(
    at_edges: FinishedRun, fedpipe: Command, tmp_path: Path
) -> None:
    copy = tmp_path / "store"
    subprocess.run(["cp", "-r", at_edges.result["store"], str(copy)], check=True)
    path = copy / f"first/rounds/{ROUNDS + 1:04d}/evaluations/west.json"
    path.write_text(path.read_text().replace('"rows": 6', '"rows": 5'))
    outcome = fedpipe("release", "first", "--store", copy)
    assert outcome.exit_code == 1
    assert f"rounds/{ROUNDS + 1:04d}/evaluations/west.json was altered since its round was closed" in outcome.stderr


def test_later_versions_are_held_against_the_champion_where_the_rows_are_the_same(
    at_edges: FinishedRun, fedpipe: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", at_edges.result["tracking"]["uri"])
    config = at_edges.folder / "federation.yaml"
    quick = ("--set", "release.exports=[merged]", "--set", "rounds=1", "--set", "training.examples_per_round=8")
    worse = fedpipe("run", config, "--run", "worse", *quick, "--json").document["model"]["decision"]
    other = fedpipe("run", config, "--run", "other-rows", *quick, "--set", "seed=9", "--json").document
    assert not worse["promoted"]
    assert "against the champion's" in worse["reasons"][0]
    assert any("of the 3 edges that judged both on the same rows" in check["reason"] for check in worse["checks"])
    assert not other["model"]["decision"]["promoted"]
    assert "none of the 3 edges judged the champion on the rows it has now" in other["model"]["decision"]["reasons"][0]


def test_run_that_died_during_the_final_judging_repeats_only_what_is_missing(
    at_edges: FinishedRun, fedpipe: Command, tmp_path: Path
) -> None:
    config, store = at_edges.folder / "federation.yaml", tmp_path / "store"
    arguments = ("run", config, "--run", "died", "--set", f"store={store}", "--no-release", "--json")
    whole = fedpipe(*arguments).document
    last = f"rounds/{ROUNDS + 1:04d}"
    left = ("result.json", f"rounds/{ROUNDS:04d}/round.json", f"{last}/judged.json", f"{last}/evaluations/west.json")
    for name in left:
        (store / "died" / name).unlink()
    before = written(store / "died")
    resumed = fedpipe(*arguments, "--resume")
    after = written(store / "died")
    assert set(after) - set(before) == set(left)
    assert {name: after[name] for name in before} == before
    assert "west: judge done" in resumed.stderr
    assert "east: judge done" not in resumed.stderr
    assert "train round" not in resumed.stderr
    assert resumed.document["metrics"] == whole["metrics"]
    assert resumed.document["baseline_metrics"] == whole["baseline_metrics"]


@pytest.mark.slow
def test_run_killed_before_the_final_judging_ends_as_an_undisturbed_one(
    at_edges: FinishedRun, environment: dict[str, str], fedpipe: Command, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    config = at_edges.folder / "federation.yaml"
    arguments = ("run", config, "--run", "killed", "--set", f"store={store}", "--no-release", "--json")
    made = store / "killed" / f"rounds/{ROUNDS + 1:04d}/global.json"
    with running(environment, tmp_path, *arguments) as process:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not made.exists():
            assert process.poll() is None, "the command ended before it wrote the last adapter"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
    before = written(store / "killed")
    resumed = fedpipe(*arguments, "--resume")
    after = written(store / "killed")
    assert {name: after[name] for name in before} == before
    assert resumed.document["adapter_sha256"] == at_edges.result["adapter_sha256"]
    assert resumed.document["metrics"] == at_edges.result["metrics"]


def test_both_stand_side_by_side_and_decide_as_the_coordinators_rows_alone(
    finished: FinishedRun, fedpipe: Command, tmp_path: Path
) -> None:
    config = finished.folder / "federation.yaml"
    at_both = ("--set", "evaluation.at=both", "--set", "name=beside", "--set", f"store={tmp_path}")
    outcome = fedpipe("run", config, "--run", "beside", *at_both, "--json")
    assert outcome.exit_code == 0, outcome.stderr
    result = outcome.document
    assert set(result["metrics"]) == set(result["baseline_metrics"]) == METRICS | {f"edges_{name}" for name in METRICS}
    assert {name: result["metrics"][name] for name in METRICS} == finished.result["metrics"]
    for entry in result["rounds"]:
        combined = combined_metrics(evaluations(entry))
        assert {f"edges_{name}": value for name, value in combined.items()}.items() <= entry["metrics"].items()
    assert {export["scheme"] for export in result["exports"]} == {"adapter", "merged"}
    assert all(set(export["metrics"]) == METRICS for export in result["exports"])
    client, run = connect(result["tracking"]["uri"]), result["tracking"]["run_id"]
    assert [entry.step for entry in client.get_metric_history(run, "edges_accuracy")] == [0, 1, 2]
    assert "predictions/edges.json" in {entry.path for entry in client.list_artifacts(run, "predictions")}


def test_language_models_loss_and_text_are_judged_at_the_edges(
    fedpipe: Command, tmp_path: Path, finished: FinishedRun
) -> None:
    rows = {"train": "{edge_id}.jsonl", "format": "completion", "validation_fraction": 0.2}
    training = {"training.learning_rate": 0.03, "training.examples_per_round": 240, "release.exports": ["merged"]}
    config = write_writers_federation(tmp_path, data=rows, name="writers-at-edges", **training)
    outcome = fedpipe("run", config, "--run", "first", "--json")
    assert outcome.exit_code == 0, outcome.stderr
    before, after, rounds = (outcome.document[key] for key in ("baseline_metrics", "metrics", "rounds"))
    written_by_model = {"bleu", "exact_match"}
    assert set(before) == set(after) == {"loss", "perplexity", "token_accuracy"} | written_by_model
    assert after["loss"] < before["loss"] / 2
    assert before["bleu"] < 5
    assert after["bleu"] > 30
    assert not written_by_model & set(rounds[0]["metrics"])
    assert all(found.counted["bleu"] == 12 for found in evaluations(rounds[-1]).values())
    assert outcome.document["exports"][0]["agreement"] == 1.0
    assert outcome.document["model"]["decision"]["promoted"]
