"""The command itself: help, what it imports, what it prints, where progress goes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import Command, FinishedRun

HEAVY = ("torch", "transformers", "peft", "prefect", "mlflow", "boto3", "pyarrow", "scipy")
SDKS = ("prefect", "mlflow", "boto3", "botocore", "typer", "rich")


def imported_by(code: str, names: tuple[str, ...]) -> list[str]:
    """Which of these packages a fresh interpreter has imported after running `code`."""
    program = (
        f"import sys, json\n{code}\nprint(json.dumps([n for n in {names!r} if n in sys.modules]), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    found: list[str] = json.loads(done.stderr.splitlines()[-1])
    return found


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["plan", "--help"], ["schema"]])
def test_help_and_schema_import_nothing_heavy(arguments: list[str]) -> None:
    code = f"from flows.cli import app\ntry:\n    app({arguments!r})\nexcept SystemExit:\n    pass"
    assert imported_by(code, HEAVY) == []


def test_core_imports_no_orchestrator_tracker_or_store_sdk() -> None:
    code = (
        "import importlib, pkgutil, fedpipe_core\n"
        "for module in pkgutil.iter_modules(fedpipe_core.__path__, 'fedpipe_core.'):\n"
        "    importlib.import_module(module.name)"
    )
    assert imported_by(code, SDKS) == []


def test_help_lists_every_command(fedpipe: Command) -> None:
    outcome = fedpipe("--help")
    assert outcome.exit_code == 0
    for command in ("run", "plan", "status", "release", "rollback", "schema", "edge"):
        assert f"\n  {command} " in outcome.stdout


def test_unknown_option_is_refused_with_code_2(fedpipe: Command) -> None:
    assert fedpipe("run", "--speed", "9").exit_code == 2


def test_schema_is_the_configs_json_schema(fedpipe: Command) -> None:
    document = fedpipe("schema").document
    assert document["additionalProperties"] is False
    assert {"name", "model", "data", "edges"} == set(document["required"])


def test_status_tells_how_far_a_run_is(finished: FinishedRun, fedpipe: Command) -> None:
    outcome = fedpipe("status", "first", "--store", finished.result["store"], "--json")
    assert outcome.document["status"] == "completed"
    assert outcome.document["rounds_closed"] == outcome.document["rounds"] == 2
    assert outcome.document["adapter_sha256"] == finished.result["adapter_sha256"]


def test_status_lists_the_runs_of_a_store(finished: FinishedRun, fedpipe: Command) -> None:
    assert "first" in fedpipe("status", "--store", finished.result["store"], "--json").document["runs"]


def test_status_of_an_unknown_run_names_those_there_are(finished: FinishedRun, fedpipe: Command) -> None:
    outcome = fedpipe("status", "never", "--store", finished.result["store"])
    assert outcome.exit_code == 2
    assert "run never is not in" in outcome.stderr
    assert "first" in outcome.stderr


def test_status_of_a_store_that_is_not_there_is_refused(fedpipe: Command, tmp_path: Path) -> None:
    outcome = fedpipe("status", "--store", tmp_path / "none")
    assert outcome.exit_code == 2
    assert "there is no such folder; correct the address of the store" in outcome.stderr


def test_rollback_without_a_champion_is_refused(finished: FinishedRun, fedpipe: Command) -> None:
    outcome = fedpipe("rollback", "nobody", "--store", finished.result["store"])
    assert outcome.exit_code == 1
    assert "model nobody has no champion to roll back" in outcome.stderr


def test_command_in_a_process_reports_to_the_configured_server_and_keeps_stdout_clean(
    finished: FinishedRun, fedpipe_process: Command, tmp_path: Path
) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName

    config, store = finished.folder / "federation.yaml", f"store={tmp_path / 'store'}"
    quiet = {"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": None}  # what the command sets when nobody did
    outcome = fedpipe_process("run", config, "--run", "apart", "--set", store, "--json", **quiet)
    assert outcome.exit_code == 0, outcome.stderr
    assert outcome.stdout.count("\n") == 1
    assert outcome.document["adapter_sha256"] == finished.result["adapter_sha256"]
    assert [line for line in outcome.stderr.splitlines() if line and not line.startswith("[")] == []
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=["apart"])))
    assert [run.state.name for run in runs if run.state] == ["Completed"]


def test_what_a_library_below_python_prints_does_not_reach_stdout() -> None:
    code = (
        "import ctypes, sys; from flows import cli; cli.app = lambda: (ctypes.CDLL(None).puts(b'from C'), print('{}'));"
        "cli.main(); ctypes.CDLL(None).fflush(None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "{}\n"
    assert "from C" in done.stderr
