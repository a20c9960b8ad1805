"""One run of the equal job by each system: the commands a user would give, and what was seen of them."""

import json
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers.environment import APPS, peers_bin, peers_environment
from peers.make_job import EDGES, ROUNDS
from peers.usage import Usage

LIMIT_SECONDS = 600
SUPERLINK_PORT = 39500
Marks = list[dict[str, Any]]


@dataclass
class Seen:
    """When services were started, when they were up and the job was handed over, and when its result was at hand.

    `trained` holds every edge's end of training and its seconds, by round.
    """

    started: float
    ready: float
    done: float
    loss: float
    trained: dict[int, list[tuple[float, float]]] = field(default_factory=dict)

    @property
    def steady_round_seconds(self) -> float:
        """From the end of one round's training to the end of the next one's, first round apart."""
        ends = [max(end for end, _ in self.trained[index]) for index in range(1, ROUNDS + 1)]
        return (ends[-1] - ends[0]) / (ROUNDS - 1)

    @property
    def overhead_seconds(self) -> float:
        """A steady round's length beyond its slowest edge's training."""
        slowest = [max(seconds for _, seconds in self.trained[index]) for index in range(2, ROUNDS + 1)]
        return self.steady_round_seconds - sum(slowest) / len(slowest)


@dataclass(frozen=True)
class Place:
    """Where one run happens: a folder of its own, the job's folder, and who watches."""

    folder: Path
    job: Path
    usage: Usage

    def marks(self) -> Marks:
        """What the processes of the run noted."""
        path = self.folder / "marks.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def plain_loop(place: Place) -> Seen:
    """One process, one thread."""
    environment = _environment(place)
    started = time.time()
    run_to_end([peers_bin() / "python", APPS / "plain_job.py"], environment, place.folder)
    return _seen(place, environment, started, started, time.time())


def flower_simulation(place: Place) -> Seen:
    """Flower's simulation on Ray, two clients at once."""
    environment = _flower_environment(place)
    started = time.time()
    run_to_end(["flwr", "run", APPS / "flower", "local", "--stream"], environment, place.folder)
    return _seen(place, environment, started, started, time.time())


def flower_deployed(place: Place) -> Seen:
    """Flower's SuperLink and four SuperNodes, each a process, then the job."""
    environment = _flower_environment(place)
    started = time.time()
    link = ["--insecure", "--host", "127.0.0.1", "--port", str(SUPERLINK_PORT), "--database", ":flwr-in-memory:"]
    with running(["flower-superlink", *link], environment, place.folder / "superlink.log"):
        await_port(SUPERLINK_PORT)
        for number in range(EDGES):
            config = f"partition-id={number} num-partitions={EDGES}"
            node = [
                "--insecure",
                "--superlink",
                f"127.0.0.1:{SUPERLINK_PORT}",
                "--port",
                str(SUPERLINK_PORT + 20 + number),
            ]
            start(["flower-supernode", *node, "--node-config", config], environment, place.folder / f"node{number}.log")
        for number in range(EDGES):
            await_port(SUPERLINK_PORT + 20 + number)
        ready = time.time()
        run_to_end(["flwr", "run", APPS / "flower", "dep", "--stream"], environment, place.folder)
    return _seen(place, environment, started, ready, time.time())


def nvflare_simulator(place: Place) -> Seen:
    """NVFlare's simulator, a thread per edge."""
    return _nvflare(place, "simulator")


def nvflare_poc(place: Place) -> Seen:
    """NVFlare's server and four clients, provisioned and started by its POC mode, then the job."""
    return _nvflare(place, "poc")


def _nvflare(place: Place, mode: str) -> Seen:
    environment = _environment(place, NVFLARE_POC_WORKSPACE=str(place.folder / "poc"))
    started = time.time()
    run_to_end(["python", "job.py", mode, place.folder / "workspace"], environment, APPS / "nvflare")
    at = {mark["event"]: mark["at"] for mark in place.marks()}
    done = at["done"] if mode == "poc" else time.time()  # the services stop afterwards, as everyone's would
    return _seen(place, environment, started, at.get("ready", started), done)


def _flower_environment(place: Place) -> dict[str, str]:
    home = place.folder / "flower"
    home.mkdir()
    simulated = "\n".join(
        [
            '[superlink]\ndefault = "local"\n[superlink.local]\naddress = ":local:"',
            f"options.num-supernodes = {EDGES}",
            "options.backend.client-resources.num-cpus = 1\noptions.backend.client-resources.num-gpus = 0",
            "options.backend.init-args.num-cpus = 2",
        ]
    )
    deployed = f'[superlink.dep]\naddress = "127.0.0.1:{SUPERLINK_PORT}"\ninsecure = true'
    (home / "config.toml").write_text(f"{simulated}\n{deployed}\n")
    return _environment(place, FLWR_HOME=str(home))


def _environment(place: Place, **more: str) -> dict[str, str]:
    counts = {"EQUAL_JOB_EDGES": str(EDGES), "EQUAL_JOB_ROUNDS": str(ROUNDS)}
    return peers_environment(place.folder, place.job, **counts, **more)


def _seen(place: Place, environment: Mapping[str, str], started: float, ready: float, done: float) -> Seen:
    trained: dict[int, list[tuple[float, float]]] = {}
    for mark in place.marks():
        if mark["event"] == "trained":
            trained.setdefault(mark["round"], []).append((mark["at"], mark["seconds"]))
    counted = {index: len(edges) for index, edges in trained.items()}
    if counted != dict.fromkeys(range(1, ROUNDS + 1), EDGES):
        raise RuntimeError(f"edges that trained, by round: {counted}; needed {EDGES} in each of {ROUNDS}")
    return Seen(started, ready, done, _final_loss(place, environment), trained)


def _final_loss(place: Place, environment: Mapping[str, str]) -> float:
    """The loss of the adapter a system ended with, judged by the same program for all."""
    command = [peers_bin() / "python", APPS / "equal_job.py", environment["EQUAL_JOB_RESULT"]]
    done = subprocess.run(command, env=dict(environment), capture_output=True, text=True, check=True, timeout=120)
    return float(done.stdout)


def run_to_end(command: Sequence[object], environment: Mapping[str, str], folder: Path) -> str:
    """A command to its end; what it printed on stdout. Raises RuntimeError with the end of its log when it fails."""
    with Path(environment["EQUAL_JOB_MARKS"]).with_name("run.log").open("a+b") as log:
        process = subprocess.Popen(
            _found(command, environment), env=dict(environment), cwd=folder, stdout=subprocess.PIPE, stderr=log,
            stdin=subprocess.DEVNULL, text=True, start_new_session=True,
        )  # fmt: skip
        output, _ = process.communicate(timeout=LIMIT_SECONDS)
        if process.returncode:
            log.seek(0)
            said = (log.read()[-3000:] or output[-3000:].encode()).decode(errors="replace")
            raise RuntimeError(f"{' '.join(map(str, command))} ended with {process.returncode}:\n{said}")
    return output


def start(command: Sequence[object], environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    """A command that goes on, until the watcher ends it."""
    with log.open("wb") as output:
        return subprocess.Popen(
            _found(command, environment), env=dict(environment), cwd=log.parent, stdin=subprocess.DEVNULL,
            stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip


@contextmanager
def running(command: Sequence[object], environment: Mapping[str, str], log: Path) -> Iterator[None]:
    """A command that goes on while the block runs."""
    process = start(command, environment, log)
    try:
        yield
    finally:
        process.terminate()


def await_true(found: Callable[[], bool], what: str) -> None:
    """Wait until something is so. Raises RuntimeError when it does not come to be."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while not found():
        if time.monotonic() > deadline:
            raise RuntimeError(f"waited {LIMIT_SECONDS} s for {what}")
        time.sleep(0.1)


def await_port(port: int) -> None:
    """Wait until somebody listens on a port of loopback."""
    import socket

    def listens() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    await_true(listens, f"port {port}")


def _found(command: Sequence[object], environment: Mapping[str, str]) -> list[str]:
    """The command with its program looked for in the environment's PATH, not in this process's."""
    import shutil

    program, *arguments = map(str, command)
    return [shutil.which(program, path=environment["PATH"]) or program, *arguments]
