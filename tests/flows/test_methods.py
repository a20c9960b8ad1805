"""Whole runs of the baselines that train something else than adapters."""

from pathlib import Path

import pytest
from commands import Command, FinishedRun


def test_a_run_that_trains_everything_is_released_and_verified(
    finished: FinishedRun, fedpipe: Command, tmp_path: Path
) -> None:
    changes = ("--set", "method=full", "--set", "name=full", "--set", f"store={tmp_path / 'store'}")
    outcome = fedpipe("run", finished.folder / "federation.yaml", "--run", "full", *changes, "--json")
    assert outcome.exit_code == 0, outcome.stderr
    result = outcome.document
    assert result["metrics"]["loss"] < 0.9 * result["baseline_metrics"]["loss"]
    assert all(not edge["ranks"] for edge in result["plan"].values())
    (merged,) = result["exports"]
    assert merged["scheme"] == "merged"
    assert merged["metrics"]["loss"] == pytest.approx(result["metrics"]["loss"], rel=1e-4)
    assert result["model"]["decision"]["promoted"]
    verified = fedpipe("verify", "full@champion")
    assert verified.exit_code == 0, verified.stdout


def test_a_run_with_trials_is_planned_with_them_and_says_that_it_has_no_release(
    finished: FinishedRun, fedpipe: Command, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    changes = ("--set", "method=fedadapter", "--set", "name=trials", "--set", f"store={store}")
    config = finished.folder / "federation.yaml"
    planned = fedpipe("plan", config, *changes, "--json").document
    first = max(edge["predicted"]["round_seconds"] for edge in planned["plan"].values())
    assert planned["totals"]["trial_rounds"] == 1
    assert planned["totals"]["seconds"] > 2 * first
    refused = fedpipe("run", config, *changes)
    assert refused.exit_code == 2
    assert "run it with --no-release" in refused.stderr
    outcome = fedpipe("run", config, "--run", "trials", *changes, "--no-release")
    assert outcome.exit_code == 0, outcome.stderr
    assert "model      has no release: its bottlenecks" in outcome.stdout
