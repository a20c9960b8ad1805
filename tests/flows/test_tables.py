"""What people read: the summary of a run, and the plan as a table."""

import sys
from pathlib import Path
from typing import Any

import pytest
from commands import FinishedRun

from fedpipe_core.result_schemas import RunResult
from flows import tables

COST = {"peak_memory_bytes": 300 * 2**20, "round_seconds": 12.34, "upload_bytes": 2**20, "download_bytes": 2**20}
EDGE = {"ranks": {"a": 8, "b": 4, "c": 4}, "base_bits": 32, "batch_size": 16, "local_steps": 80, "binding": "memory"}


def with_tracking(result: RunResult, uri: str) -> RunResult:
    return result.model_copy(update={"tracking": result.tracking.model_copy(update={"uri": uri})})


@pytest.fixture
def result(finished: FinishedRun) -> RunResult:
    return RunResult.model_validate(finished.result)


def test_summary_tells_quality_before_and_after(result: RunResult) -> None:
    before, after = result.baseline_metrics["accuracy"], result.metrics["accuracy"]
    assert f"accuracy   {before:.4f} before training, {after:.4f} after" in tables.result_summary(result)


def test_paths_below_the_working_directory_are_relative(
    result: RunResult, finished: FinishedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished.folder)
    lines = tables.result_summary(result).splitlines()
    assert "model      out/store/first/release/merged" in lines
    assert any("ui --backend-store-uri sqlite:///out/mlflow.db  # experiment tiny" in line for line in lines)


def test_programs_that_the_shell_does_not_find_are_named_by_their_path(
    result: RunResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    monkeypatch.setenv("PATH", "/nowhere")
    beside = Path(sys.executable).with_name("mlflow").relative_to("/")
    assert f"MLflow     {beside} ui" in tables.result_summary(result)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert "MLflow     mlflow ui" in tables.result_summary(result)


def test_mlflow_server_is_named_by_its_address(result: RunResult) -> None:
    assert "MLflow     http://mlflow:5000  # experiment tiny" in tables.result_summary(
        with_tracking(result, "http://mlflow:5000")
    )


def test_password_of_a_tracking_database_is_not_shown(result: RunResult) -> None:
    summary = tables.result_summary(with_tracking(result, "postgresql://me:secret@host/db"))
    assert "MLflow     postgresql://host/db" in summary
    assert "secret" not in summary


def test_unreleased_run_says_how_to_release_it(result: RunResult) -> None:
    unreleased = result.model_copy(update={"model": None, "exports": []})
    assert f"`fedpipe release first --store {result.store}` does it" in tables.result_summary(unreleased)
    without = tables.result_summary(unreleased, "nothing loads it")
    assert "model      has no release: nothing loads it" in without
    assert "fedpipe release" not in without


def test_prefect_server_of_the_run_is_named(result: RunResult, prefect_api: str) -> None:
    assert f"Prefect    {prefect_api.removesuffix('/api')}" in tables.result_summary(result)


def plan_document(**changes: Any) -> dict[str, Any]:
    totals = {"seconds": 37.0, "upload_bytes": 2**22, "download_bytes": 2**22, "deadline_seconds": 12.5}
    return {
        "run": "plan",
        "plan": {"household": {**EDGE, "predicted": COST}},
        "infeasible": {},
        "totals": totals,
        **changes,
    }


def test_plan_is_a_table_with_the_runs_totals() -> None:
    header, row, _, totals = tables.plan_table(plan_document()).splitlines()
    assert header.split() == [
        "edge",
        "bits",
        "batch",
        "steps",
        "modules×rank",
        "memory",
        "MiB",
        "round",
        "s",
        "up",
        "MiB",
        "limited",
        "by",
    ]
    assert row.split() == ["household", "32", "16", "80", "2×4", "1×8", "300", "12.3", "1.00", "memory"]
    assert totals == "deadline of a round 12.5 s; whole run 37.0 s, 4.0 MiB up, 4.0 MiB down"


def test_totals_of_a_plan_with_trials_say_what_they_take_for_granted() -> None:
    document = plan_document()
    document["totals"]["trial_rounds"] = 2
    assert tables.plan_table(document).endswith(
        "4.0 MiB down, if the largest size wins in each of 2 rounds with trials"
    )


def test_an_edge_that_is_left_out_is_named_below_the_plan() -> None:
    document = plan_document(infeasible={"bank": "bank: memory: too little"})
    assert tables.plan_table(document).endswith("left out, since no plan fits:\n  bank: memory: too little")


def test_infeasible_edges_are_listed_with_their_reasons() -> None:
    document = plan_document(plan={}, infeasible={"bank": "bank: memory: too little"}, totals=None)
    assert tables.plan_table(document) == "No feasible plan for:\n  bank: memory: too little"
