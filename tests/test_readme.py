"""README's commands do what it says: each is run here as it stands, or by the test that is named for it."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from remote_federation import SET_UP, START_WORKER

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"```console\n(.*?)```", README, flags=re.DOTALL)
    for line in block.splitlines()
    if line and not line.startswith("#")
]
RUN_SECONDS = 900


def test_every_command_is_of_a_kind_that_some_test_runs() -> None:
    assert {shlex.split(command)[0] for command in COMMANDS} <= {"make", "fedpipe", "prefect"}


def test_make_commands_exist() -> None:
    for command in COMMANDS:
        if command.startswith("make"):
            done = subprocess.run([*shlex.split(command), "-n"], cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr


def test_demo_runs_the_command_that_readme_names() -> None:
    shown = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "fedpipe run examples/intents/federation.yaml" in shown


def test_prefect_commands_are_those_that_the_tests_of_prefect_yaml_run() -> None:
    shown = {command.removeprefix("prefect ") for command in COMMANDS if command.startswith("prefect")}
    assert shown - {"server start"} == {*SET_UP, START_WORKER}


@pytest.mark.slow
@pytest.mark.timeout(2 * RUN_SECONDS)
def test_fedpipe_commands_run_one_after_another_as_they_stand(tmp_path: Path) -> None:
    """In a folder that holds the examples and nothing else; the first one is the demo."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path / "prefect"), "PATH": _path_with_environment()}
    for variable in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "FEDPIPE_STORE"):
        environment.pop(variable, None)
    for command in [command for command in COMMANDS if command.startswith("fedpipe")]:
        done = subprocess.run(
            shlex.split(command), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=RUN_SECONDS,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        if command.endswith("--json"):
            assert json.loads(done.stdout)["status"] == "completed"
    result = json.loads((tmp_path / ".fedpipe" / "store" / "monday" / "result.json").read_text())
    assert result["baseline_metrics"]["accuracy"] <= 0.02
    assert result["metrics"]["accuracy"] >= 0.80
    assert result["model"]["decision"]["promoted"]


def _path_with_environment() -> str:
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
