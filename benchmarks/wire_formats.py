"""What shorter number formats cost: bytes of every round, final loss and accuracy of one federation in each format.

Run `python benchmarks/wire_formats.py [--json] [--quick]`. The federation is that of `aggregation_quality` under
delta_svd, from one seed. The global adapter travels in the format of the updates, as int8 where these are nf4, or as
nf4 too.
Runs are kept under `benchmarks/results`, so a second call only prints. `--quick` trains hardly anything and keeps
nothing.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from aggregation_quality import DOMAINS, RANKS
from common import Check, at_most, finish, markdown_table, parser
from federations import QUICK, Results, Run, Size, intents, results_of

FORMATS: dict[str, dict[str, Any]] = {
    "fp32": {"exchange.dtype": "fp32"},
    "bf16": {"exchange.dtype": "bf16"},
    "bf16, energy 0.9": {"exchange.dtype": "bf16", "exchange.energy": 0.9},
    "int8": {"exchange.dtype": "int8"},
    "nf4": {"exchange.dtype": "nf4"},
    "nf4 both ways": {"exchange.dtype": "nf4", "exchange.global_dtype": "nf4"},
}
MOST_NF4_BYTES = 0.15
MOST_NF4_LOSS = 1.01


@dataclass(frozen=True)
class Row:
    """One format: bytes of a round from and to all edges, and what the last round ends with."""

    format: str
    upload_bytes: float
    download_bytes: float
    loss: float
    accuracy: float
    losses: list[float]


def run_format(results: Results, size: Size, name: str, changes: Mapping[str, Any]) -> Row:
    """The federation with its updates in one format."""
    edges = [
        {"edge_id": edge_id, "values": values, "pin": size.pin(RANKS[edge_id])} for edge_id, values in DOMAINS.items()
    ]
    rounds: list[Run] = results.run(name, intents(size, edges, {"seed": 0, **changes}))["rounds"]
    return Row(
        format=name,
        upload_bytes=sum(found["upload_bytes"] for found in rounds) / len(rounds),
        download_bytes=sum(found["download_bytes"] for found in rounds) / len(rounds),
        loss=rounds[-1]["loss"],
        accuracy=rounds[-1]["accuracy"],
        losses=[found["loss"] for found in rounds],
    )


def checks(rows: Mapping[str, Row]) -> list[Check]:
    """What 4 bits may cost."""
    return [
        at_most("nf4_bytes_over_fp32", rows["nf4"].upload_bytes / rows["fp32"].upload_bytes, MOST_NF4_BYTES),
        at_most("nf4_loss_over_fp32", rows["nf4"].loss / rows["fp32"].loss, MOST_NF4_LOSS),
    ]


def table(rows: Mapping[str, Row]) -> str:
    """The table in Markdown; shares are of fp32's."""
    full = rows["fp32"]
    cells = [
        [
            row.format,
            f"{row.upload_bytes / 2**20:.2f}",
            f"{row.upload_bytes / full.upload_bytes:.1%}",
            f"{row.download_bytes / 2**20:.2f}",
            f"{row.loss:.4f}",
            f"{row.loss / full.loss - 1:+.1%}",
            f"{row.accuracy:.3f}",
        ]
        for row in rows.values()
    ]
    head = ["updates as", "MiB up a round", "of fp32", "MiB down a round", "final loss", "against fp32", "accuracy"]
    return markdown_table(head, cells)


def main() -> None:
    """Print the table and its checks."""
    options_parser = parser(__doc__)
    options_parser.add_argument("--quick", action="store_true", help="train hardly anything")
    options = options_parser.parse_args()
    torch.set_num_threads(1)
    size, results = (QUICK if options.quick else Size()), results_of("wire_formats", options.quick)
    rows = {name: run_format(results, size, name, changes) for name, changes in FORMATS.items()}
    finish(
        options.json,
        {"size": asdict(size), "table": [asdict(row) for row in rows.values()]},
        checks(rows),
        table(rows),
    )


if __name__ == "__main__":
    main()
