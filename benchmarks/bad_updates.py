"""What one bad edge of five does to the final loss, beside the same run in which that edge does not answer at all.

Run `python benchmarks/bad_updates.py [--json] [--quick]`. From the first round on one edge sends NaN, infinities, its
change times 1,000, or its change with the sign flipped; the other four are honest. Rows are dealt at random, or each
edge holds domains, and so labels, of its own. Runs are kept under `benchmarks/results`, so a second call only prints.
`--quick` trains hardly anything and keeps nothing.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from common import Check, at_most, finish, markdown_table, parser
from federations import QUICK, Attack, Results, Size, intents, results_of

DOMAINS = {
    "money": ["banking", "credit_cards"],
    "house": ["home", "kitchen_and_dining"],
    "road": ["auto_and_commute", "travel"],
    "talk": ["small_talk", "meta"],
    "office": ["work", "utility"],
}
BAD = "road"
RANK = 4
ATTACKS: dict[str, Attack | None] = {
    "no answer": Attack(BAD, None),
    "honest": None,
    "NaN": Attack(BAD, lambda change: torch.full_like(change, math.nan)),
    "infinities": Attack(BAD, lambda change: torch.full_like(change, math.inf)),
    "times 1,000": Attack(BAD, lambda change: 1000 * change),
    "sign flipped": Attack(BAD, lambda change: -change),
}
LEFT_OUT = "no answer"
MOST_LOSS = 1.05


@dataclass(frozen=True)
class Row:
    """One behaviour of the fifth edge, and what it did to the final loss."""

    dealt: str
    sends: str
    loss: float
    accuracy: float
    rounds_refused: int
    honest_refused: int


def run_attack(results: Results, size: Size, dealt: str, sends: str) -> Row:
    """Five edges, one of which behaves as named."""
    by_domain = dealt == "by domain"
    edges = [
        {"edge_id": edge_id, "pin": size.pin(RANK), **({"values": values} if by_domain else {})}
        for edge_id, values in DOMAINS.items()
    ]
    partition = {"by": "column", "column": "domain"} if by_domain else {"by": "iid"}
    config = intents(size, edges, {"seed": 0, "data.partition": partition})
    rounds = results.run(f"{dealt}/{sends}", config, ATTACKS[sends])["rounds"]
    return Row(
        dealt=dealt,
        sends=sends,
        loss=rounds[-1]["loss"],
        accuracy=rounds[-1]["accuracy"],
        rounds_refused=sum(BAD in found["dropped"] for found in rounds),
        honest_refused=sum(len(set(found["dropped"]) - {BAD}) for found in rounds),
    )


def checks(rows: Mapping[tuple[str, str], Row]) -> list[Check]:
    """Every attack's final loss over that without the edge, and no honest edge refused."""
    found = []
    for (dealt, sends), row in rows.items():
        if sends not in (LEFT_OUT, "honest"):
            name = f"{sends}_{dealt}_loss_over_{LEFT_OUT}".replace(" ", "_").replace(",", "")
            found.append(at_most(name, row.loss / rows[dealt, LEFT_OUT].loss, MOST_LOSS))
    refused = sum(row.honest_refused + (row.rounds_refused if row.sends == "honest" else 0) for row in rows.values())
    return [*found, at_most("honest_updates_refused", refused, 0)]


def table(rows: Mapping[tuple[str, str], Row], rounds: int) -> str:
    """The table in Markdown."""
    cells = [
        [
            row.sends,
            row.dealt,
            f"{row.rounds_refused} of {rounds}",
            str(row.honest_refused),
            f"{row.loss:.4f}",
            f"{row.loss / rows[row.dealt, LEFT_OUT].loss - 1:+.1%}",
            f"{row.accuracy:.3f}",
        ]
        for row in rows.values()
    ]
    head = ["the fifth edge sends", "rows dealt", "rounds it did not count", "honest updates refused", "final loss"]
    return markdown_table([*head, "against no answer", "accuracy"], cells)


def main() -> None:
    """Print the table and its checks."""
    options_parser = parser(__doc__)
    options_parser.add_argument("--quick", action="store_true", help="train hardly anything")
    options = options_parser.parse_args()
    torch.set_num_threads(1)
    size, results = (QUICK if options.quick else Size()), results_of("bad_updates", options.quick)
    rows = {
        (dealt, sends): run_attack(results, size, dealt, sends)
        for dealt in ("at random", "by domain")
        for sends in ATTACKS
    }
    results_json = {"size": asdict(size), "table": [asdict(row) for row in rows.values()]}
    finish(options.json, results_json, checks(rows), table(rows, size.rounds))


if __name__ == "__main__":
    main()
