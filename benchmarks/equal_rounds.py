"""Whether edges of unequal speed finish a round together: five alike but one, which is throttled four times.

Run `python benchmarks/equal_rounds.py [--json] [--quick]`. CLINC150 and MiniLM, rows dealt at random, three seeds; the
spread of a round is (last edge to finish − first) / last, on the clock of `simulated_clock`, and the median over the
rounds counts. The uniform plan's spread stands beside it. Runs are kept under `benchmarks/results`, so a second call
only prints; `--quick` makes one seed and keeps nothing.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from common import Check, at_most, finish, markdown_table, parser
from federations import INTENTS, Run, config_hash, results_of
from planning_variants import FEDLORA, FEDPIPE, VARIANTS
from simulated_clock import Setting, core_of, simulate, spread

from fedpipe_core.config import FederationConfig
from fedpipe_core.config_file import load_config

SLOWDOWNS = {"east": 1.0, "north": 1.0, "south": 1.0, "west": 1.0, "mast": 4.0}
COMMON: dict[str, Any] = {
    "training.examples_per_round": 320,
    "training.learning_rate": 0.004,
    "training.head_rate_factor": 3,
    "evaluation.examples_per_round": 600,
    "data.validation_fraction": 0.0,
    "model.bits": [32, 8, 4],
    "planning.ranks": [1, 2, 4, 8, 16],
    "planning.batch_sizes": [8, 16, 32],
    "planning.parameter_price": 0.3,
    "aggregation.rank_cap": 16,
}
SEEDS = (0, 1, 2)
BUDGET_SECONDS = 45.0
MOST_SPREAD = 0.25


@dataclass(frozen=True)
class Row:
    """One method: spread of a round, predicted and measured, and each edge's seconds in the median round."""

    method: str
    seeds: int
    predicted_spread: float
    spread: float
    lowest: float
    highest: float
    edge_seconds: dict[str, float]


def make_config(method: str, seed: int) -> FederationConfig:
    """The config of a method."""
    edges = [
        {"edge_id": e, "resources": {"memory_gib": 1.0, "bandwidth_mbit": 100, "tokens_per_second": 1000 / slowdown}}
        for e, slowdown in SLOWDOWNS.items()
    ]
    document = {"seed": seed, "edges": edges, "data.partition": {"by": "iid"}, **COMMON, **VARIANTS[method]}
    return load_config(INTENTS, [f"{key}={json.dumps(value)}" for key, value in document.items()])


def make_row(method: str, runs: Sequence[Run]) -> Row:
    """Medians over the seeds."""
    predicted = [[plan["predicted_seconds"] for plan in run["plan"].values()] for run in runs]
    spreads = [spread(run) for run in runs]
    seconds = {e: median(found["edge_seconds"][e] for run in runs for found in run["rounds"]) for e in runs[0]["plan"]}
    return Row(
        method=method,
        seeds=len(runs),
        predicted_spread=median((max(found) - min(found)) / max(found) for found in predicted),
        spread=median(spreads),
        lowest=min(spreads),
        highest=max(spreads),
        edge_seconds=seconds,
    )


def table(rows: Sequence[Row]) -> str:
    """The table in Markdown."""
    head = ["method", "seeds", "spread predicted", "measured", "over seeds", *(f"{e}, s" for e in SLOWDOWNS)]
    cells = [
        [
            row.method,
            str(row.seeds),
            f"{row.predicted_spread:.1%}",
            f"{row.spread:.1%}",
            f"{row.lowest:.1%}–{row.highest:.1%}",
            *(f"{row.edge_seconds[e]:.2f}" for e in SLOWDOWNS),
        ]
        for row in rows
    ]
    return markdown_table(head, cells)


def main() -> None:
    """Print the table and its check."""
    options_parser = parser(__doc__)
    options_parser.add_argument("--quick", action="store_true", help="one seed, and less time")
    options = options_parser.parse_args()
    torch.set_num_threads(1)
    results = results_of("equal_rounds", options.quick)
    setting = Setting(20.0 if options.quick else BUDGET_SECONDS, SLOWDOWNS, *core_of(make_config(FEDPIPE, 0), results))
    rows = []
    for method in (FEDPIPE, FEDLORA):
        configs = [make_config(method, seed) for seed in (SEEDS[:1] if options.quick else SEEDS)]
        runs = [
            results.kept(f"{method}/seed {config.seed}", config_hash(config), lambda c=config: simulate(c, setting))  # type: ignore[misc]
            for config in configs
        ]
        rows.append(make_row(method, runs))
    verdicts: list[Check] = [at_most("spread_with_one_edge_throttled_4x", rows[0].spread, MOST_SPREAD)]
    finish(options.json, {"table": [asdict(row) for row in rows]}, verdicts, table(rows))


if __name__ == "__main__":
    main()
