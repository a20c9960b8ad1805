"""What FedPipe costs beside a plain PyTorch and PEFT loop that does the same local steps.

Run `python benchmarks/overhead.py [--json] [--quick]`. The federation of examples/intents runs as `fedpipe run` runs
it, without the release; `plain_loop` then does the steps of its plan again and nothing else: edge after edge with all
of torch's threads, and as many edges at once as the federation with a thread each. Start-up is measured in processes of
its own, beside the rounds. A second, short federation with edges of three bit widths counts how often a base is loaded.
`--quick` trains a few steps, too few to judge ratios.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.update(  # as `fedpipe` sets them, but for the home: nobody wants Prefect's records of these runs
    PREFECT_HOME=tempfile.mkdtemp(prefix="fedpipe-overhead-"),
    PREFECT_LOGGING_LEVEL="WARNING",
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    DO_NOT_TRACK="1",
    MLFLOW_DISABLE_TELEMETRY="true",
    TORCHDYNAMO_DISABLE="1",
    TOKENIZERS_PARALLELISM="false",
)

from common import Check, at_most, finish, markdown_table, parser
from plain_loop import PlainRun, run_plainly
from prefect import flow, task
from prefect.task_runners import ThreadPoolTaskRunner
from watched_run import Watched, run_watched

from flows.local_api import start_api
from tasks import federation

INTENTS = Path(__file__).parent.parent / "examples" / "intents" / "federation.yaml"
MOST_RATIO = 1.15
MOST_PROFILING = 0.05
ALONE, TOGETHER, OURS = "plain loop, one edge at a time", "plain loop, as many edges at once", "FedPipe, rounds"
JUDGING = VALIDATION, EVALUATION = "validation at the edges", "evaluation at the coordinator"
SHORT = ("planning.profile_steps=5", "evaluation.examples_per_round=64")
QUICK = ("rounds=2", "training.examples_per_round=64", *SHORT)
MIXED_BITS = (32, 8, 4, 4)
MIXED = (
    *("rounds=1", "training.examples_per_round=16", "model.bits=[32, 8, 4]", *SHORT),
    *(f"edges.{index}.pin.base_bits={bits}" for index, bits in enumerate(MIXED_BITS)),
)

# What a process does before its flow begins: each part in a process of its own, then all as `fedpipe run` does it.
LOAD_BASE = (
    "from tasks.edge import dense_base; from fedpipe_core.config_file import load_config; dense_base(load_config({!r}))"
)
STARTUP = {
    "imports": "import flows.pipeline",
    "imports and base": LOAD_BASE.format(str(INTENTS)),
    "Prefect's API": "from flows.local_api import start_api; start_api()()",
    "all, overlapped": "from flows.local_api import start_api; wait = start_api()\n"
    f"import flows.pipeline; {LOAD_BASE.format(str(INTENTS))}; wait()",
}


def startup_seconds() -> dict[str, float]:
    """Wall time of each part of a start in a fresh process, interpreter included."""
    _run_alone(STARTUP["Prefect's API"])  # the first start of all makes the database, and fills the disk's cache
    return {name: _run_alone(code) for name, code in STARTUP.items()}


def _run_alone(code: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, stdout=subprocess.DEVNULL, timeout=600)
    return time.perf_counter() - started


@task
def nothing() -> None:
    """An empty task: what it costs is Prefect's."""


@flow
def many_nothings(count: int, at_once: int) -> float:
    """Wall seconds per task of many empty ones."""
    started = time.perf_counter()
    with ThreadPoolTaskRunner[None](max_workers=at_once) as runner:
        for future in [runner.submit(nothing, {}) for _ in range(count)]:
            future.result()
    return (time.perf_counter() - started) / count


def shares(watched: Watched, plain: PlainRun) -> dict[str, float]:
    """Wall seconds of the rounds by where they went; what edges do at the same time counts by its part of the wall."""
    coordinator, timeline, rounds = watched.coordinator, watched.timeline, watched.result.rounds
    updates = [u for r in rounds for u in federation.round_updates(coordinator, r.round).values()]
    training = sum(update.train_seconds for update in updates)
    validating = sum(sum(timeline.seconds(f"train round {r.round}")) for r in rounds) - training
    in_edges = {
        "local steps, as in the plain loop": plain.thread_seconds,
        "local steps, frozen tail and checks": training - plain.thread_seconds,
        VALIDATION: validating,
        "loading, encoding, publishing at the edges": sum(u.round_seconds for u in updates) - training - validating,
        "measuring the edges' memory, once": sum(call.seconds for call in watched.memory_probes),
    }
    found = {name: seconds / watched.at_once for name, seconds in in_edges.items()}
    found["aggregation"] = sum(timeline.seconds("aggregate"))
    found[EVALUATION] = sum(timeline.seconds("evaluate")[1:])  # the first is before training
    task_runs = len(rounds) * (len(watched.sessions) + 2)
    found[f"Prefect, {task_runs} task runs"] = task_runs * many_nothings(task_runs, watched.at_once)
    return found | {"records, waiting for the last edge": watched.rounds_seconds - sum(found.values())}


@dataclass(frozen=True)
class Cost:
    """What something took; CPU time, of the whole process, is steadier on a machine that is not quiet."""

    wall_seconds: float
    cpu_seconds: float


@dataclass(frozen=True)
class Report:
    """Cost of the loops and of our rounds; wall seconds by part of our rounds and of a start; bases loaded; losses.

    `profiling_share` is of the whole run's time, from reading data to the last evaluation.
    """

    table: dict[str, Cost]
    shares: dict[str, float]
    profiling_share: float
    startup: dict[str, float]
    loads: list[dict[int, int]]
    losses: dict[str, float]


def measure(quick: bool) -> Report:
    """Run everything, one after the other."""
    startup = startup_seconds()
    start_api()()
    with tempfile.TemporaryDirectory() as folder:
        watched = run_watched(INTENTS, QUICK if quick else (), Path(folder, "whole"))
        alone = run_plainly(watched.sessions, 1, os.cpu_count() or 1)
        together = run_plainly(watched.sessions, watched.at_once, watched.sessions[0].threads)
        parts = shares(watched, together)
        mixed = run_watched(INTENTS, MIXED, Path(folder, "mixed"))
    table = {
        ALONE: Cost(alone.wall_seconds, alone.cpu_seconds),
        TOGETHER: Cost(together.wall_seconds, together.cpu_seconds),
        OURS: Cost(watched.rounds_seconds, watched.timeline.cpu_seconds("rounds")),
    }
    loads = [dict(Counter(call.arguments[2] for call in run.loads)) for run in (watched, mixed)]
    profiling = sum(watched.timeline.seconds("profile")) / watched.at_once / watched.result.seconds
    return Report(table, parts, profiling, startup, loads, losses(watched, alone))


def losses(watched: Watched, plain: PlainRun) -> dict[str, float]:
    """Mean training loss of round 1, which both start from the same base with adapters of no effect."""
    record = watched.result.rounds[0]
    steps = {session.edge_id: session.plan.local_steps for session in watched.sessions}
    total = sum(record.train_loss[edge_id] * count for edge_id, count in steps.items())
    return {"FedPipe": total / sum(steps.values()), "plain loop": plain.first_round_loss}


def verdicts(report: Report, quick: bool) -> list[Check]:
    """The claims; a quick run is too short to judge ratios.

    The plain loops judge nothing. Beside the one that people write, edge after edge, our rounds count as they are;
    beside the one with our concurrency, they count without the validation and evaluation the config asks for.
    """
    ours = report.table[OURS].wall_seconds
    unjudged = ours - sum(report.shares[part] for part in JUDGING)
    ratios = [
        at_most(f"{OURS} over {ALONE}", ours / report.table[ALONE].wall_seconds, MOST_RATIO),
        at_most(f"{OURS} without judging over {TOGETHER}", unjudged / report.table[TOGETHER].wall_seconds, MOST_RATIO),
    ]
    loads = [
        at_most(f"loads of a base per bit width, {len(found)} in use by 4 edges", max(found.values()), 1)
        for found in report.loads
    ]
    profiling = at_most("profiling over the run's time", report.profiling_share, MOST_PROFILING)
    return loads if quick else [*ratios, profiling, *loads]


def as_text(report: Report) -> str:
    """Three tables: walls, shares of the rounds, start-up."""
    ours = report.table[OURS]
    costs = [
        (
            name,
            f"{cost.wall_seconds:.1f}",
            f"{cost.cpu_seconds:.1f}",
            f"{ours.wall_seconds / cost.wall_seconds:.3f}",
            f"{ours.cpu_seconds / cost.cpu_seconds:.3f}",
        )
        for name, cost in report.table.items()
    ]
    parts = [(name, f"{seconds:.2f}", f"{seconds / ours.wall_seconds:.1%}") for name, seconds in report.shares.items()]
    starts = [(name, f"{seconds:.1f}") for name, seconds in report.startup.items()]
    tables = [
        markdown_table(("the same local steps", "wall s", "CPU s", "FedPipe ÷ it, wall", "CPU"), costs),
        markdown_table(("where the rounds' time goes", "wall s", "share"), parts),
        markdown_table(("start-up of a process", "wall s"), starts),
    ]
    means = ", ".join(f"{name} {loss:.3f}" for name, loss in report.losses.items())
    profiling = f"profiling: {report.profiling_share:.1%} of the run's time"
    return "\n\n".join([*tables, f"mean training loss of round 1: {means}; {profiling}"])


def main() -> None:
    """Measure and print."""
    arguments = parser(__doc__)
    arguments.add_argument("--quick", action="store_true", help="a few steps, about two minutes")
    options = arguments.parse_args()
    warnings.filterwarnings("ignore", module="torch.jit")
    try:
        report = measure(options.quick)
    finally:
        shutil.rmtree(os.environ["PREFECT_HOME"], ignore_errors=True)
    finish(options.json, asdict(report), verdicts(report, options.quick), as_text(report))


if __name__ == "__main__":
    main()
