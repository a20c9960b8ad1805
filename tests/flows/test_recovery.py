"""Runs that are killed or interrupted, in processes of their own, end where an undisturbed run ends."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from commands import Command, FinishedRun, running

PATIENCE_SECONDS = 240


def is_record(name: str) -> bool:
    return name.endswith(".json") and not name.startswith("release/")


def records(run: Path) -> dict[str, tuple[int, bytes]]:
    """Every record of a run: when it was written, and what it says."""
    paths = [path for path in run.rglob("*.json") if is_record(path.relative_to(run).as_posix())]
    return {path.relative_to(run).as_posix(): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    """Wait until an object is in the store."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not path.exists():
        assert process.poll() is None, "the command ended before it wrote the object"
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.005)


@pytest.mark.slow
def test_run_killed_again_and_again_ends_in_the_same_adapter_and_repeats_nothing(
    finished: FinishedRun, environment: dict[str, str], fedpipe: Command, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    arguments = ("run", finished.folder / "federation.yaml", "--run", "killed", "--set", f"store={store}", "--json")
    chance = random.Random(time.time_ns())
    seen: dict[str, tuple[int, bytes]] = {}
    for name in ("profiles/east.json", "rounds/0001/updates/north.json", "rounds/0003/global.json"):
        resume = ("--resume",) if seen else ()
        with running(environment, tmp_path, *arguments, *resume) as process:
            wait_for(store / "killed" / name, process)
            time.sleep(chance.uniform(0, 0.3))
            process.kill()
        now = records(store / "killed")
        assert {key: now[key] for key in seen} == seen
        seen = now
    resumed = fedpipe(*arguments, "--resume")
    now = records(store / "killed")
    assert {key: now[key] for key in seen} == seen
    assert resumed.document["adapter_sha256"] == finished.result["adapter_sha256"]
    assert [entry["metrics"] for entry in resumed.document["rounds"]] == [
        entry["metrics"] for entry in finished.result["rounds"]
    ]


@pytest.mark.slow
def test_ctrl_c_ends_a_run_without_a_server_within_seconds_and_leaves_it_resumable(
    finished: FinishedRun, environment: dict[str, str], fedpipe: Command, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    arguments = ("run", finished.folder / "federation.yaml", "--run", "stopped", "--set", f"store={store}", "--json")
    alone = {name: value for name, value in environment.items() if name != "PREFECT_API_URL"}
    alone["PREFECT_HOME"] = str(tmp_path / "prefect")
    with running(alone, tmp_path, *arguments) as process:
        wait_for(store / "stopped" / "rounds/0001/updates/north.json", process)
        os.killpg(process.pid, signal.SIGINT)
        interrupted = time.monotonic()
        stdout, _ = process.communicate(timeout=PATIENCE_SECONDS)
        seconds = time.monotonic() - interrupted
    said = [line for line in (tmp_path / "stderr").read_text().splitlines() if not line.startswith("[")]
    assert process.returncode == 130
    assert stdout == ""
    assert said == ["fedpipe: interrupted; what is finished is kept, --run NAME --resume continues it"]
    assert seconds < 20
    resumed = fedpipe(*arguments, "--resume")
    assert resumed.document["adapter_sha256"] == finished.result["adapter_sha256"]
