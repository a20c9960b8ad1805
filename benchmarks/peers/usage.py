"""What everything that this process started uses: CPU time, memory, bytes on the loopback device.

Processes that leave their parents come back to this one (a child subreaper, Linux alone), so none is missed and all
can be ended.
"""

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

PR_SET_CHILD_SUBREAPER = 36
SAMPLE_SECONDS = 0.2


@dataclass
class Usage:
    """CPU seconds and the highest sum of resident memory over all processes, and bytes that crossed loopback.

    Pages that processes share count once for each of them. What a process does within `SAMPLE_SECONDS` of its end is
    not seen.
    """

    peak_memory_bytes: int = 0
    wire_bytes: int = 0
    _cpu: dict[tuple[int, float], float] = field(default_factory=dict)

    @property
    def cpu_seconds(self) -> float:
        """User and system time of all processes so far."""
        return sum(self._cpu.values())

    def sample(self) -> None:
        """Look at every process once."""
        memory = 0
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error), process.oneshot():
                times = process.cpu_times()
                self._cpu[process.pid, process.create_time()] = times.user + times.system
                memory += process.memory_info().rss
        self.peak_memory_bytes = max(self.peak_memory_bytes, memory)


@contextmanager
def watching() -> Iterator[Usage]:
    """Watch all that is started in the block; what is left of it at the end is killed."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    usage, before, ending = Usage(), _loopback_bytes(), threading.Event()

    def watch() -> None:
        while not ending.wait(SAMPLE_SECONDS):
            usage.sample()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield usage
        usage.sample()
    finally:
        ending.set()
        thread.join()
        usage.wire_bytes = _loopback_bytes() - before
        _end_all()


def _loopback_bytes() -> int:
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[0])
    raise RuntimeError("/proc/net/dev has no device lo; this benchmark needs Linux")


def _end_all() -> None:
    deadline = time.monotonic() + 10
    while (left := psutil.Process().children(recursive=True)) and time.monotonic() < deadline:
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=1)
