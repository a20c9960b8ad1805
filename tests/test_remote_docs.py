"""docs/remote.md step by step: its commands and files as they stand, but for names of hosts, folders and keys."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml
from prefect_processes import running
from remote_federation import SET_UP, START_WORKER
from tiny_federation import rows, write_federation, write_rows

pytestmark = pytest.mark.slow

TEXT = (Path(__file__).parents[1] / "docs" / "remote.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```console\n(.*?)```", TEXT, flags=re.DOTALL) for line in block.splitlines()]
DOCUMENTS = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.DOTALL)]
RUN_SECONDS = 300


def shown(beginning: str) -> str:
    """The one command that begins so."""
    (found,) = {command for command in COMMANDS if beginning in command}
    return found


def run(command: str, environment: dict[str, str], folder: Path) -> str:
    """Run a command of the page where /etc/fedpipe is a folder of the test's, and return what it prints."""
    words = shlex.split(command.replace("/etc/fedpipe", str(folder)))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        words, env=environment | {"PATH": path}, cwd=folder, capture_output=True, text=True, timeout=RUN_SECONDS,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return done.stdout


def test_every_command_is_run_here_or_by_the_tests_of_prefect_yaml() -> None:
    here = ("fedpipe edge keygen", "fedpipe edge check", "fedpipe edge worker", "fedpipe run", "export ")
    by_others = {f"prefect {command}" for command in SET_UP}
    by_others.add("prefect automation create --from-file infra/automations/free-places-of-dead-runs.yaml")
    rest = [command for command in COMMANDS if not command.startswith(here) and command not in by_others]
    assert rest == ["prefect server start --host 0.0.0.0", "mlflow server --backend-store-uri sqlite:///mlflow.db"]
    assert f"`prefect {START_WORKER}`" in TEXT


def test_engineer_who_follows_the_page_ends_with_a_finished_run(
    remote_environment: dict[str, str], s3_bucket: str, tmp_path: Path
) -> None:
    keygen, store = shown("fedpipe edge keygen"), f"s3://{s3_bucket}/{uuid4().hex}"
    public = {
        name: run(keygen.replace("clinic-a", name), remote_environment, tmp_path).strip()
        for name in ("clinic-a", "coordinator")
    }
    write_rows(tmp_path / "notes.jsonl", [{"note": row["text"], "label": row["label"]} for row in rows(60, seed=7)])
    own, edges, signing = DOCUMENTS[0], DOCUMENTS[1]["edges"], DOCUMENTS[2]["signing"]
    own |= {"coordinator_key": public["coordinator"], "store": store, "key": str(tmp_path / "clinic-a.pem")}
    own["data"]["train"] = str(tmp_path / "notes.jsonl")
    (tmp_path / "edge.yaml").write_text(yaml.safe_dump(own))
    edges[0]["public_key"], signing["coordinator_key"] = public["clinic-a"], public["coordinator"]
    write_federation(tmp_path, **{"edges": edges, "signing": signing, "store": store, "data.train": "here.jsonl"})
    write_rows(tmp_path / "here.jsonl", rows(60, seed=8))

    checked: dict[str, Any] = json.loads(run(shown("fedpipe edge check"), remote_environment, tmp_path))
    assert (checked["rows"], checked["public_key"], checked["store"]) == (60, public["clinic-a"], store)
    worker = shown("fedpipe edge worker").removeprefix("fedpipe ").replace("/etc/fedpipe", str(tmp_path))
    coordinator = remote_environment | {"FEDPIPE_SIGNING_KEY": str(tmp_path / "coordinator.pem")}
    with running(shlex.split(worker), remote_environment, tmp_path / "worker" / "log", module="flows"):
        run(shown("fedpipe run"), coordinator, tmp_path)
    reported = json.loads(run(f"{shown('fedpipe edge check')} --run first", remote_environment, tmp_path))
    assert reported["profile"]["num_examples"] == 54
    assert shown("FEDPIPE_SIGNING_KEY=").endswith("/etc/fedpipe/coordinator.pem")
