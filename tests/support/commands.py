"""The `fedpipe` command in this process or in one of its own, and how it ended."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from flows.cli import app

RUN_SECONDS = 300


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def document(self) -> dict[str, Any]:
        """The one JSON object on stdout."""
        found: dict[str, Any] = json.loads(self.stdout)
        return found


@dataclass(frozen=True)
class FinishedRun:
    """A run that went through without a disturbance."""

    folder: Path
    outcome: Outcome

    @property
    def result(self) -> dict[str, Any]:
        """What it printed."""
        return self.outcome.document

    @property
    def store(self) -> Path:
        """The run's folder in the store."""
        return Path(self.result["store"]) / self.result["run"]


Command = Callable[..., Outcome]


def command_line(*arguments: object) -> list[str]:
    """The command as a shell would call it."""
    return [str(Path(sys.executable).with_name("fedpipe")), *map(str, arguments)]


def run_to_end(environment: dict[str, str], folder: Path, *arguments: object, seconds: float | None = None) -> Outcome:
    """The command in a process of its own; fails when it is not done in time."""
    done = subprocess.run(
        command_line(*arguments), env=environment, cwd=folder, capture_output=True, text=True, timeout=seconds,
        check=False,
    )  # fmt: skip
    return Outcome(done.returncode, done.stdout, done.stderr)


@contextmanager
def running(environment: dict[str, str], folder: Path, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """The command in a session of its own, as a terminal would have started it."""
    with (folder / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            command_line(*arguments),
            env=environment,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
            preexec_fn=hear_interrupts,  # noqa: PLW1509  it makes one system call
        )
        with process:
            yield process


def wait_until(
    there: Callable[[], bool], what: str, seconds: float, process: subprocess.Popen[str] | None = None
) -> None:
    """Return as soon as something is there; fails when it is not in time, or when the process ends before."""
    deadline = time.monotonic() + seconds
    while not there():
        assert process is None or process.poll() is None, f"the command ended before {what} was there"
        assert time.monotonic() < deadline, f"{what} did not appear"
        time.sleep(0.003)


def wait_for_object(path: Path, process: subprocess.Popen[str] | None = None) -> None:
    """`wait_until` an object lies in a store that is a folder."""
    wait_until(path.exists, str(path), RUN_SECONDS, process)


def hear_interrupts() -> None:
    """Tests that were themselves started in the background inherit a SIGINT that is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def invoke(*arguments: object) -> Outcome:
    """Call the command in this process."""
    called = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="fedpipe")
    if called.exception is not None and not isinstance(called.exception, SystemExit):
        raise called.exception
    return Outcome(called.exit_code, called.stdout, called.stderr)
