"""What a federation of 10, 100 and 1,000 simulated edges costs beside its training, and how that grows.

Run `python benchmarks/scale.py [--json] [--edges N ...]`. Each size is one `fedpipe run` in local mode: three rounds of
a tiny classifier, two steps of eight rows per edge and round. Coordinator overhead is the command's wall time in the
rounds less the edges' local steps, which run on all cores: records, updates, checks, aggregation, evaluation, Prefect,
MLflow. Peak memory is that of all processes of the run, summed. Linux alone.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from common import Check, at_most, finish, markdown_table, parser
from peers.environment import CACHE, ROOT, environment
from peers.systems import run_to_end
from peers.usage import watching

sys.path.append(str(ROOT / "tests" / "support"))
from tiny_federation import rows, write_rows
from tiny_models import LABELS, save_tiny_model

SIZES = (10, 100, 1000)
ROUNDS, STEPS, BATCH, ROWS_PER_EDGE = 3, 2, 8, 16
MOST_TIME_GROWTH = 1.1  # overhead per edge and round at the largest size, as a multiple of that at a tenth of it
MOST_MEMORY_GROWTH = 1.25  # peak memory at the largest size, as a multiple of that at the smallest
MIB = 2**20


@dataclass(frozen=True)
class Row:
    """One federation. Overhead is per edge and round; `outside_seconds` is wall time before and after the rounds."""

    edges: int
    wall_seconds: float
    outside_seconds: float
    round_seconds: float
    overhead_seconds: float
    cpu_seconds: float
    peak_memory_mib: float
    loss: float


def measure(edges: int) -> Row:
    """One run."""
    folder = Path(tempfile.mkdtemp(prefix=f"scale-{edges}-"))
    try:
        config = write_federation(folder, edges)
        variables = environment(folder, folder, PREFECT_HOME=str(CACHE / "prefect"))
        variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{variables['PATH']}"
        with watching() as usage:
            output = run_to_end(
                ["fedpipe", "run", config, "--run", "scale", "--no-release", "--json"], variables, folder
            )
        if copy := os.environ.get("SCALE_LOG"):
            shutil.copy(folder / "run.log", f"{copy}-{edges}.log")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return make_row(edges, json.loads(output), usage.cpu_seconds, usage.peak_memory_bytes)


def make_row(edges: int, result: dict[str, Any], cpu_seconds: float, peak_memory_bytes: int) -> Row:
    """What a run came to."""
    at_once = min(edges, os.cpu_count() or 1)
    counted = [len(record["participants"]) for record in result["rounds"]]
    if counted != [edges] * ROUNDS:
        raise RuntimeError(f"edges that counted, by round: {counted}; needed {edges} in each of {ROUNDS}")
    in_rounds = sum(record["seconds"] for record in result["rounds"])
    training = sum(sum(record["train_seconds"].values()) for record in result["rounds"]) / at_once
    return Row(
        edges=edges,
        wall_seconds=round(result["seconds"], 2),
        outside_seconds=round(result["seconds"] - in_rounds, 2),
        round_seconds=round(in_rounds / ROUNDS, 3),
        overhead_seconds=round((in_rounds - training) / ROUNDS / edges, 5),
        cpu_seconds=round(cpu_seconds, 1),
        peak_memory_mib=round(peak_memory_bytes / MIB),
        loss=round(result["metrics"]["loss"], 4),
    )


def write_federation(folder: Path, edges: int) -> Path:
    """Model, rows and config of a federation; every choice is pinned, so that what is measured is not the planner."""
    save_tiny_model(folder / "model", "bert")
    write_rows(folder / "train.jsonl", rows(edges * ROWS_PER_EDGE, seed=1))
    write_rows(folder / "test.jsonl", rows(120, seed=0))
    resources = {"memory_gib": 1.0, "tokens_per_second": 20000, "bandwidth_mbit": 100}
    attention = [f"bert.encoder.layer.{layer}.attention.self.{name}" for layer in (0, 1) for name in ("query", "value")]
    pin = {"ranks": dict.fromkeys(attention, 4), "batch_size": BATCH, "local_steps": STEPS, "base_bits": 32}
    document = {
        "name": "scale",
        "rounds": ROUNDS,
        "store": str(folder / "store"),
        "model": {"base": "model", "max_tokens": 16, "bits": [32]},
        "data": {
            **{"train": "train.jsonl", "test": "test.jsonl", "labels": LABELS, "partition": {"by": "iid"}},
            "validation_fraction": 0.0,
        },
        "edges": [{"edge_id": f"edge-{number:04d}", "resources": resources, "pin": pin} for number in range(edges)],
        "training": {"learning_rate": 0.01, "examples_per_round": STEPS * BATCH},
        "planning": {
            "importance": "uniform",
            "ranks": [4],
            "batch_sizes": [BATCH],
            "probe_rank": 4,
            "solver": "greedy",
        },
    }
    path = folder / "federation.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


def verdicts(table: Sequence[Row]) -> list[Check]:
    """Growth from the smallest federation to the largest."""
    if len(table) < 2:
        return []
    small, before, large = table[0], table[-2], table[-1]
    return [
        at_most(
            f"overhead per edge and round, {large.edges} edges over {before.edges}",
            large.overhead_seconds / before.overhead_seconds,
            MOST_TIME_GROWTH,
        ),
        at_most(
            f"peak memory, {large.edges} edges over {small.edges}",
            large.peak_memory_mib / small.peak_memory_mib,
            MOST_MEMORY_GROWTH,
        ),
    ]


def as_text(table: Sequence[Row]) -> str:
    """The table."""
    head = ("edges", "wall s", "outside rounds s", "round s", "overhead ms per edge and round", "CPU s", "peak MiB")
    cells = [
        (
            str(row.edges),
            f"{row.wall_seconds:.1f}",
            f"{row.outside_seconds:.1f}",
            f"{row.round_seconds:.2f}",
            f"{1000 * row.overhead_seconds:.1f}",
            f"{row.cpu_seconds:.1f}",
            f"{row.peak_memory_mib:.0f}",
        )
        for row in table
    ]
    return markdown_table(head, cells)


def main() -> None:
    """Measure and print."""
    options_parser = parser(__doc__)
    options_parser.add_argument("--edges", type=int, nargs="+", default=SIZES, help="sizes of the federations")
    options = options_parser.parse_args()
    CACHE.mkdir(parents=True, exist_ok=True)
    table = []
    for edges in sorted(options.edges):
        table.append(measure(edges))
        print(table[-1], file=sys.stderr, flush=True)
    finish(options.json, {"table": [asdict(row) for row in table]}, verdicts(table), as_text(table))


if __name__ == "__main__":
    main()
