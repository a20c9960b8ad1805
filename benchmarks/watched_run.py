"""A federation that runs in the benchmark's own process, and what can be seen of it: phases and calls, with seconds."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedpipe_core.config_file import load_config
from fedpipe_core.result_schemas import RunResult
from flows.all_edges import edge_sessions
from flows.federation import federated_finetune
from tasks import edge, progress
from tasks.coordinator import Coordinator
from tasks.edge import EdgeSession
from tasks.records import RunKeys
from tasks.storage import open_store

RUN = "watched"


@dataclass
class Timeline:
    """A progress listener that keeps how long everything took, in order of its end, and the process's CPU time."""

    done: list[tuple[str, float, float]] = field(default_factory=list)
    _cpu_before: dict[str, float] = field(default_factory=dict)

    def started(self, who: str, what: str, steps: int | None) -> None:
        """Remember what the process had used."""
        self._cpu_before[who] = time.process_time()

    def advanced(self, who: str) -> None:
        """Steps are not counted."""

    def finished(self, who: str, what: str, seconds: float) -> None:
        """Keep what it took."""
        self.done.append((what, seconds, time.process_time() - self._cpu_before[who]))

    def noted(self, text: str) -> None:
        """Notes take no time."""

    def seconds(self, what: str) -> list[float]:
        """How long each time took that something of this name was done."""
        return [seconds for name, seconds, _ in self.done if name == what]

    def cpu_seconds(self, what: str) -> float:
        """CPU time of the whole process while it was done."""
        return sum(cpu_seconds for name, _, cpu_seconds in self.done if name == what)


@dataclass(frozen=True)
class Call:
    """A call that was watched."""

    arguments: tuple[Any, ...]
    seconds: float


@dataclass(frozen=True)
class Watched:
    """A federation that ran here, and what was seen meanwhile."""

    coordinator: Coordinator
    sessions: list[EdgeSession]
    result: RunResult
    timeline: Timeline
    loads: list[Call]
    memory_probes: list[Call]

    @property
    def rounds_seconds(self) -> float:
        """Wall time of the rounds, with all that belongs to them."""
        return sum(record.seconds for record in self.result.rounds)

    @property
    def at_once(self) -> int:
        """How many edges work at the same time."""
        return self.coordinator.config.concurrency or min(len(self.sessions), os.cpu_count() or 1)


def run_watched(example: Path, overrides: Sequence[str], folder: Path) -> Watched:
    """Run a federation in this process, without its release, with its store in `folder`."""
    config = load_config(example, [*overrides, f"store={folder / 'store'}"])
    timeline = Timeline()
    with progress.listening(timeline), calls("load_base") as loads, calls("training_memory_bytes") as probes:
        result = federated_finetune(config, RUN, release=False)
    coordinator = Coordinator(config, open_store(config.store), RunKeys(RUN))
    return Watched(coordinator, edge_sessions(coordinator), result, timeline, loads, probes)


@contextmanager
def calls(name: str) -> Iterator[list[Call]]:
    """Watch the calls of a function that edges use, while the block runs."""
    found: list[Call] = []
    function = vars(edge)[name]

    def watched(*arguments: Any) -> Any:
        started = time.perf_counter()
        result = function(*arguments)
        found.append(Call(arguments, time.perf_counter() - started))
        return result

    vars(edge)[name] = watched
    try:
        yield found
    finally:
        vars(edge)[name] = function
