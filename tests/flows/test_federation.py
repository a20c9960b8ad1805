"""A whole run: what it prints, what it leaves in the store, and what both UIs know of it."""

import json
from pathlib import Path
from typing import Any

from commands import Command, FinishedRun, Outcome
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterName,
)
from prefect.client.schemas.sorting import FlowRunSort
from tiny_federation import EDGES, ROUNDS

from fedpipe_core.result_schemas import RunResult
from tasks.mlflow_client import connect

COST = {"peak_memory_bytes", "round_seconds", "upload_bytes", "download_bytes"}
METRICS = {"accuracy", "macro_f1", "loss"}


def objects(store: Path) -> set[str]:
    return {path.relative_to(store).as_posix() for path in store.rglob("*") if path.is_file()}


def flow_run(name: str) -> Any:
    """The first flow run of a name; other tests resume the finished run, and each of those is a flow run too."""
    chosen = FlowRunFilter(name=FlowRunFilterName(any_=[name]))
    with get_client(sync_client=True) as client:
        return client.read_flow_runs(flow_run_filter=chosen, sort=FlowRunSort.START_TIME_ASC)[0]


def test_result_has_exactly_the_keys_that_were_promised(finished: FinishedRun) -> None:
    result = finished.result
    assert set(result) == {
        *("run", "store", "status", "seconds", "adapter_sha256", "rounds", "plan", "metrics", "baseline_metrics"),
        *("exports", "model", "tracking"),
    }
    assert set(result["metrics"]) == set(result["baseline_metrics"]) == METRICS
    assert set(result["model"]) == {"name", "version", "alias", "decision"}
    assert set(result["model"]["decision"]) == {"promoted", "reasons", "checks"}
    assert set(result["tracking"]) == {"uri", "experiment", "run_id"}


def test_result_tells_every_round_and_every_edges_plan(finished: FinishedRun) -> None:
    result = finished.result
    assert [entry["round"] for entry in result["rounds"]] == list(range(1, ROUNDS + 1))
    for entry in result["rounds"]:
        assert entry["participants"] == sorted(EDGES)
        assert entry["dropped"] == {}
        assert set(entry["train_seconds"]) == set(EDGES)
        assert {"seconds", "upload_bytes", "download_bytes"} < set(entry)
    assert set(result["plan"]) == set(EDGES)
    for plan in result["plan"].values():
        assert {"ranks", "batch_size", "local_steps", "base_bits", "binding"} < set(plan)
        assert set(plan["predicted"]) == set(plan["measured"]) == COST


def test_run_learns_and_ends_with_the_last_rounds_adapter_and_metrics(finished: FinishedRun) -> None:
    result = finished.result
    assert result["metrics"]["accuracy"] > result["baseline_metrics"]["accuracy"] + 0.2
    assert result["metrics"] == result["rounds"][-1]["metrics"]
    assert result["adapter_sha256"] == result["rounds"][-1]["adapter_sha256"]


def test_exports_have_the_metrics_of_the_last_round(finished: FinishedRun) -> None:
    exports = {entry["scheme"]: entry for entry in finished.result["exports"]}
    assert set(exports) == {"adapter", "merged"}
    for entry in exports.values():
        assert entry["metrics"]["accuracy"] == finished.result["metrics"]["accuracy"]
        assert entry["bytes"] == sum(path.stat().st_size for path in Path(entry["path"]).rglob("*") if path.is_file())


def test_json_is_one_object_on_stdout_and_the_file_result_json(finished: FinishedRun) -> None:
    assert finished.outcome.stdout.count("\n") == 1
    kept = RunResult.model_validate_json((finished.store / "result.json").read_bytes())
    assert kept.model_dump(mode="json") == finished.result


def test_progress_goes_to_stderr(finished: FinishedRun) -> None:
    assert f"round {ROUNDS}/{ROUNDS}: accuracy" in finished.outcome.stderr
    assert "before training: accuracy" in finished.outcome.stderr
    assert "Warning" not in finished.outcome.stderr


def test_store_holds_the_whole_layout_and_nothing_else(finished: FinishedRun) -> None:
    expected = {
        "federation.json",
        "plan.json",
        "manifest.json",
        "result.json",
        *(f"profiles/{edge}.json" for edge in EDGES),
    }
    for index in range(1, ROUNDS + 1):
        folder = f"rounds/{index:04d}"
        expected |= {f"{folder}/{name}" for name in ("global.json", "global.safetensors", "round.json")}
        expected |= {f"{folder}/updates/{edge}.{suffix}" for edge in EDGES for suffix in ("json", "safetensors")}
    expected |= {f"rounds/{ROUNDS + 1:04d}/{name}" for name in ("global.json", "global.safetensors")}
    found = objects(finished.store)
    release = {name for name in found if name.startswith("release/")}
    assert found - release == expected
    assert {"release/merged/config.json", "release/merged/model.safetensors"} < release
    assert {"release/adapter/adapter_config.json", "release/adapter/adapter_model.safetensors"} < release


def test_store_holds_no_pickle(finished: FinishedRun) -> None:
    suffixes = {Path(name).suffix for name in objects(finished.store)}
    assert suffixes <= {".json", ".safetensors", ".md", ".txt"}


def test_task_runs_are_named_after_edge_and_round(finished: FinishedRun) -> None:
    run_ids = {flow_run("first").id, flow_run("release first").id}
    with get_client(sync_client=True) as client:
        found = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=list(run_ids))))
    names = {entry.name for entry in found}
    assert {f"profile {edge}" for edge in EDGES} <= names
    assert {f"round {index + 1} train {edge}" for index in range(ROUNDS) for edge in EDGES} <= names
    assert {f"round {index + 1} aggregate" for index in range(ROUNDS)} <= names
    assert {"plan", "publish the first adapter", "export adapter", "export merged", "register", "promote"} <= names
    assert {entry.state.name for entry in found} == {"Completed"}


def test_plan_rounds_and_release_are_artifacts(finished: FinishedRun) -> None:
    run_ids = [flow_run("first").id, flow_run("release first").id]
    with get_client(sync_client=True) as client:
        chosen = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=run_ids))
        artifacts = {entry.key: entry.data for entry in client.read_artifacts(artifact_filter=chosen)}
    assert set(artifacts) == {"plan", "rounds", "gate", "release"}
    assert [row["edge"] for row in json.loads(artifacts["plan"])] == sorted(EDGES)
    assert [row["round"] for row in json.loads(artifacts["rounds"])] == list(range(1, ROUNDS + 1))
    assert "promoted to champion" in artifacts["release"]


def test_mlflow_holds_parameters_and_every_rounds_metrics(finished: FinishedRun) -> None:
    tracking = finished.result["tracking"]
    client = connect(tracking["uri"])
    run = client.get_run(tracking["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["rounds"] == str(ROUNDS)
    assert run.data.params["aggregation.rule"] == "delta_svd"
    history = {entry.step: entry.value for entry in client.get_metric_history(tracking["run_id"], "accuracy")}
    rounds = {entry["round"]: entry["metrics"]["accuracy"] for entry in finished.result["rounds"]}
    assert history == {0: finished.result["baseline_metrics"]["accuracy"], **rounds}


def test_mlflow_holds_a_child_run_for_every_edge(finished: FinishedRun) -> None:
    tracking = finished.result["tracking"]
    client = connect(tracking["uri"])
    experiment = client.get_experiment_by_name(tracking["experiment"])
    children = client.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{tracking['run_id']}'")
    assert {child.info.run_name for child in children} == set(EDGES)
    for child in children:
        assert [entry.step for entry in client.get_metric_history(child.info.run_id, "train_loss")] == [1, 2]


def test_mlflow_holds_plots_adapter_folder_and_result(finished: FinishedRun) -> None:
    tracking = finished.result["tracking"]
    client = connect(tracking["uri"])
    kept = {
        entry.path
        for folder in ("", "plots", "adapter", "release")
        for entry in client.list_artifacts(tracking["run_id"], folder)
    }
    assert {"result.json", "plots/rounds.png", "plots/ranks.png", "release/decision.json"} < kept
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} < kept


def test_gate_is_a_table_in_mlflow(finished: FinishedRun) -> None:
    run = finished.result["tracking"]
    # Not by `load_table`, which asks whatever address is set for the process, and makes a database where none is.
    table = json.loads(Path(connect(run["uri"]).download_artifacts(run["run_id"], "release/gate.json")).read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    checks = finished.result["model"]["decision"]["checks"]
    assert [row["check"] for row in rows] == [check["name"] for check in checks]
    assert {row["verdict"] for row in rows} == {"passed"}


def test_registered_version_is_champion_and_knows_where_it_comes_from(finished: FinishedRun) -> None:
    model = finished.result["model"]
    assert (model["alias"], model["decision"]["promoted"]) == ("champion", True)
    version = connect(finished.result["tracking"]["uri"]).get_model_version_by_alias(model["name"], "champion")
    federation = json.loads((finished.store / "federation.json").read_bytes())
    assert int(version.version) == model["version"]
    assert version.tags["fedpipe.run"] == "first"
    assert version.tags["fedpipe.store"] == finished.result["store"]
    assert version.tags["fedpipe.adapter_sha256"] == finished.result["adapter_sha256"]
    assert version.tags["fedpipe.base_sha256"] == federation["base_sha256"]
    assert version.tags["fedpipe.config_sha256"] == federation["config_sha256"]


def test_worse_model_is_registered_but_not_promoted(finished: FinishedRun, fedpipe: Command) -> None:
    config = finished.folder / "federation.yaml"
    worse = ("--set", "training.examples_per_round=8", "--set", "rounds=1")
    outcome: Outcome = fedpipe("run", config, "--run", "worse", *worse, "--json")
    model = outcome.document["model"]
    assert outcome.exit_code == 0
    assert model["version"] > finished.result["model"]["version"]
    assert (model["alias"], model["decision"]["promoted"]) == ("challenger", False)
    assert "against the champion's" in " ".join(model["decision"]["reasons"])
    champion = connect(finished.result["tracking"]["uri"]).get_model_version_by_alias("tiny", "champion")
    assert int(champion.version) == finished.result["model"]["version"]


def test_same_config_and_seed_end_in_the_same_adapter(finished: FinishedRun, fedpipe: Command, tmp_path: Path) -> None:
    outcome = fedpipe(
        "run", finished.folder / "federation.yaml", "--set", f"store={tmp_path}", "--no-release", "--json"
    )
    assert outcome.document["adapter_sha256"] == finished.result["adapter_sha256"]
    assert outcome.document["run"].startswith("tiny-")


def test_saved_plan_takes_the_place_of_profiling(finished: FinishedRun, fedpipe: Command, tmp_path: Path) -> None:
    config, plan = finished.folder / "federation.yaml", tmp_path / "plan.json"
    planned = fedpipe("plan", config, "--save", plan, "--json", "--set", f"store={tmp_path / 'store'}")
    assert planned.exit_code == 0
    assert set(planned.document) == {"run", "plan", "infeasible", "totals"}
    assert {"seconds", "upload_bytes", "download_bytes"} < set(planned.document["totals"])
    assert objects(tmp_path / "store") == {".fedpipe"}
    outcome = fedpipe("run", config, "--plan", plan, "--set", f"store={tmp_path / 'store'}", "--no-release", "--json")
    assert "profile" not in outcome.stderr
    assert outcome.document["adapter_sha256"] == finished.result["adapter_sha256"]


def test_summary_for_people_names_quality_model_and_both_uis(
    finished: FinishedRun, fedpipe: Command, prefect_api: str
) -> None:
    outcome = fedpipe("run", finished.folder / "federation.yaml", "--run", "first", "--resume")
    accuracy = finished.result["metrics"]["accuracy"]
    assert f"before training, {accuracy:.4f} after" in outcome.stdout
    assert str(finished.store / "release" / "merged") in outcome.stdout
    assert f"mlflow ui --backend-store-uri {finished.result['tracking']['uri']}" in outcome.stdout
    assert f"Prefect    {prefect_api.removesuffix('/api')}" in outcome.stdout


def test_resuming_a_finished_run_prints_its_result_again(finished: FinishedRun, fedpipe: Command) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.store.rglob("*")}
    outcome = fedpipe("run", finished.folder / "federation.yaml", "--run", "first", "--resume", "--json")
    assert outcome.exit_code == 0
    assert outcome.document == finished.result
    assert {path: path.stat().st_mtime_ns for path in finished.store.rglob("*")} == before


def test_same_run_on_s3_ends_in_the_same_adapter(
    finished: FinishedRun, fedpipe: Command, s3_root: str, tmp_path: Path
) -> None:
    named = ("run", finished.folder / "federation.yaml", "--set", "name=tiny-s3", "--json")
    local = fedpipe(*named, "--set", f"store={tmp_path}", "--no-release")
    remote = fedpipe(*named, "--set", f"store={s3_root}", "--run", "remote")
    assert remote.exit_code == 0, remote.stderr
    assert remote.document["adapter_sha256"] == local.document["adapter_sha256"]
    assert remote.document["exports"][0]["path"].startswith(s3_root)
