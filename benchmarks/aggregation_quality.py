"""What the aggregation rules are worth on real data: CLINC150 and MiniLM, edges of ranks 2 to 16, domains of their own.

Run `python benchmarks/aggregation_quality.py [--json] [--quick] [--seeds N]`. Every rule trains the same federation
from three seeds on bases of 32 bits, and from one on bases of 4, 8 and 32 bits. Runs are kept under
`benchmarks/results`, so a second call only prints; the plot goes to `docs/images`. `--quick` trains hardly anything and
keeps nothing.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import mean, stdev

import torch
from common import Check, at_most, finish, markdown_table, parser
from federations import IMAGES, QUICK, Results, Run, Size, intents, results_of

from fedpipe_core.aggregation import RULES

DOMAINS = {
    "bank": ["banking", "credit_cards"],
    "household": ["home", "kitchen_and_dining", "utility"],
    "mobility": ["auto_and_commute", "travel"],
    "assistant": ["meta", "small_talk", "work"],
}
RANKS = dict(zip(DOMAINS, (2, 4, 8, 16), strict=True))
SAME_BITS = dict.fromkeys(DOMAINS, 32)
MIXED_BITS = {"bank": 4, "household": 8, "mobility": 32, "assistant": 32}
SEEDS = (0, 1, 2)
DEFAULT = "delta_svd"
# Two rules whose losses are nearer than this are not told apart by three seeds.
SLACK = 1.01


@dataclass(frozen=True)
class Row:
    """One rule's means over the seeds of one setting, and the deviation of its final loss."""

    rule: str
    bits: str
    seeds: int
    accuracy: float
    loss: float
    loss_deviation: float
    energy_beyond_smallest_rank: float
    largest_rank: int
    upload_mib: float
    losses: list[float]
    energies: list[float]


def run_rule(results: Results, size: Size, rule: str, bits: dict[str, int], seed: int) -> Run:
    """One federation under one rule."""
    edges = [
        {"edge_id": name, "values": values, "pin": size.pin(RANKS[name], bits[name])}
        for name, values in DOMAINS.items()
    ]
    config = intents(size, edges, {"seed": seed, "aggregation.rule": rule})
    return results.run(f"{rule}/{_bits_name(bits)}/seed {seed}", config)


def _bits_name(bits: dict[str, int]) -> str:
    return "-".join(str(width) for width in sorted(set(bits.values())))


def make_row(rule: str, bits: dict[str, int], runs: Sequence[Run]) -> Row:
    """Means over seeds."""
    last = [run["rounds"][-1] for run in runs]
    per_round = list(zip(*(run["rounds"] for run in runs), strict=True))
    losses = [found["loss"] for found in last]
    return Row(
        rule=rule,
        bits=_bits_name(bits),
        seeds=len(runs),
        accuracy=mean(found["accuracy"] for found in last),
        loss=mean(losses),
        loss_deviation=stdev(losses) if len(losses) > 1 else 0.0,
        energy_beyond_smallest_rank=mean(found["energy_beyond_smallest_rank"] for found in last),
        largest_rank=max(found["largest_rank"] for found in last),
        upload_mib=mean(found["upload_bytes"] for found in last) / 2**20,
        losses=[mean(found["loss"] for found in seeds) for seeds in per_round],
        energies=[mean(found["energy_beyond_smallest_rank"] for found in seeds) for seeds in per_round],
    )


def checks(rows: Sequence[Row]) -> list[Check]:
    """Whether the default's final loss is within 1 % of the best rule's, in each setting."""
    found = []
    for bits in dict.fromkeys(row.bits for row in rows):
        losses = {row.rule: row.loss for row in rows if row.bits == bits}
        name = f"{DEFAULT}_loss_over_best_rule_at_{bits}_bits"
        found.append(at_most(name, losses[DEFAULT] / min(losses.values()), SLACK))
    return found


def plot(rows: Sequence[Row]) -> None:
    """Loss and energy beyond the smallest rank, round by round, for every rule on bases of 32 bits."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    rounds = range(1, len(rows[0].losses) + 1)
    for row in rows:
        style = {"label": row.rule, "linewidth": 2.5 if row.rule == DEFAULT else 1.2}
        left.plot(rounds, row.losses, **style)
        right.plot(rounds, row.energies, **style)
    left.set(xlabel="round", ylabel="held-out loss (nats)", xticks=rounds)
    right.set(xlabel="round", ylabel=f"share of Σσ² beyond rank {min(RANKS.values())}", xticks=rounds)
    left.legend(fontsize=8)
    figure.suptitle(
        f"CLINC150, MiniLM, four edges of ranks 2, 4, 8 and 16, each with domains of its own; seeds: {rows[0].seeds}"
    )
    figure.tight_layout()
    IMAGES.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGES / "aggregation_quality.png", dpi=110)


def table(rows: Sequence[Row]) -> str:
    """The table in Markdown, best loss first in each setting."""
    head = ["rule", "base bits", "seeds", "accuracy", "loss", "± over seeds", "energy beyond rank 2", "largest rank"]
    head.append("MiB up a round")
    cells = [
        [
            f"`{row.rule}`",
            row.bits,
            str(row.seeds),
            f"{row.accuracy:.3f}",
            f"{row.loss:.3f}",
            f"{row.loss_deviation:.3f}" if row.seeds > 1 else "",
            f"{row.energy_beyond_smallest_rank:.3f}",
            str(row.largest_rank),
            f"{row.upload_mib:.2f}",
        ]
        for row in sorted(rows, key=lambda row: (row.bits != "32", row.loss))
    ]
    return markdown_table(head, cells)


def main() -> None:
    """Print the table and its checks."""
    options_parser = parser(__doc__)
    options_parser.add_argument("--quick", action="store_true", help="train hardly anything")
    options_parser.add_argument("--seeds", type=int, default=len(SEEDS), help="number of seeds on 32 bits")
    options = options_parser.parse_args()
    torch.set_num_threads(1)
    size, results = (QUICK if options.quick else Size()), results_of("aggregation_quality", options.quick)
    settings = (
        [(SAME_BITS, SEEDS[:1])] if options.quick else [(SAME_BITS, SEEDS[: options.seeds]), (MIXED_BITS, SEEDS[:1])]
    )
    runs = {
        (rule, _bits_name(bits), seed): run_rule(results, size, rule, bits, seed)
        for seed in SEEDS  # seed by seed, so that a killed benchmark has every rule at the first
        for bits, seeds in settings
        if seed in seeds
        for rule in RULES
    }
    rows = [
        make_row(rule, bits, [runs[rule, _bits_name(bits), seed] for seed in seeds])
        for bits, seeds in settings
        for rule in RULES
    ]
    if not options.quick:
        plot([row for row in rows if row.bits == _bits_name(SAME_BITS)])
    finish(options.json, {"size": asdict(size), "table": [asdict(row) for row in rows]}, checks(rows), table(rows))


if __name__ == "__main__":
    main()
