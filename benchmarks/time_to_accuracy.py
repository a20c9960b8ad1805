"""What automatic configuration is worth: simulated time to a target accuracy, against uniform federated LoRA.

Run `python benchmarks/time_to_accuracy.py [--json] [--quick] [--seeds N] [--deal NAME] [--only NAME ...]`. CLINC150 and
MiniLM on five edges, 1, 1, 2, 4 and 8 times slower than a core of this machine, with memory and links to match; each
holds domains of its own, or rows dealt at random. Every method gets the same simulated time, profiling and planning
charged; each ablation takes one decision away from FedPipe. Runs are kept under `benchmarks/results`, so a second call
only prints; `--quick` keeps nothing.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from common import Check, at_least, at_most, finish, markdown_table, parser
from federations import FOLDER, IMAGES, INTENTS, Run, config_hash, results_of
from simulated_clock import Setting, core_of, simulate, spread, time_to

from fedpipe_core.config import FederationConfig
from fedpipe_core.config_file import load_config

TARGET = 0.85  # accuracy
BUDGET_SECONDS = 90.0
SEEDS = (0, 1, 2)
# Slowdown, GiB and Mbit/s of every edge, and its domains.
EDGES: dict[str, tuple[float, float, float, list[str]]] = {
    "campus": (1, 1.0, 200, ["banking", "credit_cards"]),
    "clinic": (1, 0.6, 100, ["home", "kitchen_and_dining"]),
    "branch": (2, 0.3, 50, ["auto_and_commute", "travel"]),
    "plant": (4, 0.22, 20, ["small_talk", "meta"]),
    "mast": (8, 0.16, 10, ["work", "utility"]),
}
SLOWDOWNS = {edge_id: edge[0] for edge_id, edge in EDGES.items()}
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
    "planning.profile_steps": 20,
    "planning.profile_batch_size": 8,
    "aggregation.rank_cap": 16,
}
UNIFORM = {"method": "fedlora", "aggregation.rule": "fedavg", "planning.importance": "uniform"}
SPECTRUM = {"planning.importance": "gradient_spectrum", "planning.profile_steps": 5, "planning.profile_batch_size": 4}
METHODS: dict[str, dict[str, Any]] = {
    "fedpipe": SPECTRUM,
    "fedlora": UNIFORM,
    "fedlora, rank 4": {**UNIFORM, "planning.ranks": [4]},
    "adalora importance": {"planning.importance": "adalora"},
    "random weights": {"planning.importance": "random"},
    "last layers": {"planning.importance": "last_layers"},
    "uniform importance": {"planning.importance": "uniform"},
    "parameters for nothing": {**SPECTRUM, "planning.parameter_price": 0.0},
    "one rank": {**SPECTRUM, "planning.ranks": [8]},
    "one batch size": {**SPECTRUM, "planning.batch_sizes": [16]},
    "32-bit bases only": {**SPECTRUM, "model.bits": [32]},
    "averaged factors": {**SPECTRUM, "aggregation.rule": "fedavg"},
}
FEDPIPE, FEDLORA = "fedpipe", "fedlora"
BY_DOMAIN, AT_RANDOM = "by domain", "at random"
DEALS: dict[str, dict[str, Any]] = {BY_DOMAIN: {}, AT_RANDOM: {"data.partition": {"by": "iid"}}}


@dataclass(frozen=True)
class Row:
    """One method over the seeds: medians, and the range of the final accuracy."""

    method: str
    seeds: int
    seconds_to_target: float | None
    accuracy: float
    lowest_accuracy: float
    highest_accuracy: float
    loss: float
    rounds: int
    round_spread: float
    profile_share: float
    trained_parameters: int
    mib_moved: float


def make_config(method: str, seed: int, deal: str = BY_DOMAIN) -> FederationConfig:
    """The config of a method, for rows dealt by domain or at random."""
    edges = [
        {
            "edge_id": edge_id,
            **({"values": domains} if deal == BY_DOMAIN else {}),
            "resources": {"memory_gib": gib, "bandwidth_mbit": mbit, "tokens_per_second": 1000 / slowdown},
        }
        for edge_id, (slowdown, gib, mbit, domains) in EDGES.items()
    ]
    document = {"seed": seed, "edges": edges, **DEALS[deal], **COMMON, **METHODS[method]}
    return load_config(INTENTS, [f"{key}={json.dumps(value)}" for key, value in document.items()])


def make_row(method: str, runs: Sequence[Run]) -> Row:
    """Medians over seeds."""
    times = [time_to(run, "accuracy", TARGET) for run in runs]
    accuracies = [run["final"]["accuracy"] for run in runs]
    return Row(
        method=method,
        seeds=len(runs),
        seconds_to_target=None if None in times else median(t for t in times if t is not None),
        accuracy=median(accuracies),
        lowest_accuracy=min(accuracies),
        highest_accuracy=max(accuracies),
        loss=median(run["final"]["loss"] for run in runs),
        rounds=round(median(len(run["rounds"]) for run in runs)),
        round_spread=median(spread(run) for run in runs),
        profile_share=median((r["profile_seconds"] + r["planning_seconds"]) / r["rounds"][-1]["clock"] for r in runs),
        trained_parameters=round(median(_mean_parameters(run) for run in runs)),
        mib_moved=median(sum(r["upload_bytes"] + r["download_bytes"] for r in run["rounds"]) for run in runs) / 2**20,
    )


def _mean_parameters(run: Run) -> float:
    return sum(plan["trained_parameters"] for plan in run["plan"].values()) / len(run["plan"])


def checks(rows: dict[str, Row]) -> list[Check]:
    """What the claim is, where both methods were run."""
    if not {FEDPIPE, FEDLORA} <= set(rows):
        return []
    ours, uniform = rows[FEDPIPE], rows[FEDLORA]
    found = [
        at_least("accuracy_over_fedlora", ours.accuracy / uniform.accuracy, 1.0),
        at_most("trained_parameters_over_fedlora", ours.trained_parameters / uniform.trained_parameters, 1.0),
        at_most("profiling_and_planning_share", ours.profile_share, 0.05),
    ]
    if ours.seconds_to_target and uniform.seconds_to_target:
        found.append(at_least("fedlora_time_over_ours", uniform.seconds_to_target / ours.seconds_to_target, 2.0))
    return found


def table(rows: Sequence[Row]) -> str:
    """The table in Markdown."""
    head = ["method", "seeds", f"s to {TARGET:.0%}", "accuracy", "range", "loss", "rounds", "spread in a round"]
    head += ["profiling", "parameters an edge", "MiB moved"]
    cells = [
        [
            row.method,
            str(row.seeds),
            "not reached" if row.seconds_to_target is None else f"{row.seconds_to_target:.0f}",
            f"{row.accuracy:.3f}",
            f"{row.lowest_accuracy:.3f}–{row.highest_accuracy:.3f}",
            f"{row.loss:.3f}",
            str(row.rounds),
            f"{row.round_spread:.0%}",
            f"{row.profile_share:.1%}",
            f"{row.trained_parameters:,}",
            f"{row.mib_moved:.1f}",
        ]
        for row in rows
    ]
    return markdown_table(head, cells)


def plot(runs: dict[str, list[Run]]) -> None:
    """Accuracy against simulated time, one line a seed."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.2))
    for color, method in zip(("#1f6feb", "#d1242f"), (FEDPIPE, FEDLORA), strict=True):
        for number, run in enumerate(runs.get(method, [])):
            clock, accuracy = zip(*((found["clock"], found["accuracy"]) for found in run["rounds"]), strict=True)
            axes.plot(clock, accuracy, color=color, linewidth=1.4, label=None if number else method)
    axes.axhline(TARGET, color="#888888", linestyle=":", linewidth=1)
    axes.set(xlabel="simulated seconds, profiling and planning included", ylabel="held-out accuracy")
    axes.set_title("CLINC150, MiniLM, five edges 1, 1, 2, 4 and 8 times slower", fontsize=10)
    axes.legend()
    figure.tight_layout()
    IMAGES.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGES / "time_to_accuracy.png", dpi=110)


def main() -> None:
    """Print the table and its checks."""
    options_parser = parser(__doc__)
    options_parser.add_argument("--quick", action="store_true", help="train hardly anything")
    options_parser.add_argument("--seeds", type=int, default=len(SEEDS), choices=(1, 2, 3), help="number of seeds")
    options_parser.add_argument("--deal", default=BY_DOMAIN, choices=DEALS, help="how rows are dealt to the edges")
    options_parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS), help="methods to run")
    options = options_parser.parse_args()
    torch.set_num_threads(1)
    results = results_of("time_to_accuracy", options.quick)
    setting = Setting(10.0 if options.quick else BUDGET_SECONDS, SLOWDOWNS, *core_of(make_config(FEDPIPE, 0), results))
    runs: dict[str, list[Run]] = {}
    suffix = "" if options.deal == BY_DOMAIN else f"/{options.deal}"
    for seed in SEEDS[: 1 if options.quick else options.seeds]:
        for method in options.only:
            config = make_config(method, seed, options.deal)
            name = f"{method}/seed {seed}{suffix}"
            kept = results.kept(name, config_hash(config), lambda c=config: simulate(c, setting))  # type: ignore[misc]
            runs.setdefault(method, []).append(kept)
    rows = {method: make_row(method, found) for method, found in runs.items()}
    if not options.quick and options.deal == BY_DOMAIN:
        plot(runs)
    document = {"target": TARGET, "budget_seconds": setting.budget_seconds, "deal": options.deal, "folder": FOLDER.name}
    document["table"] = [asdict(row) for row in rows.values()]
    finish(options.json, document, checks(rows), table(list(rows.values())))


if __name__ == "__main__":
    main()
