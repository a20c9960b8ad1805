"""The claims on public data: FedPipe beside full fine-tuning, uniform LoRA and FedAdapter, at equal simulated time.

Run `python benchmarks/evidence.py [--task NAME ...] [--part main|overview|rates|spread|edges|ablations|importance]
[--setting NAME ...] [--partition NAME ...] [--seeds N] [--results FOLDER] [--json]`. The protocol is docs/evidence.md.
Every run is kept under `benchmarks/results/evidence-TASK.json` as soon as it is done, so a set that was stopped goes on
where it was, and a second call only prints; pictures lie in `.fedpipe`. The overview is the main part in one table.
`--reduced` is what `make evidence` runs: all but the lowest rate, kept in `.fedpipe`, and of the main part, unless told
otherwise, CLINC150 by domain on unequal edges with one seed. `--quick` keeps nothing.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from common import Check, finish, parser
from evidence_cases import HETEROGENEOUS, SEEDS, SETTINGS, TUNED, Task, read_task
from evidence_checks import ablation_checks, checks, importance_checks, lead_checks
from evidence_plots import draw, draw_overview
from evidence_rows import Bench, Row, ablation_rows, edge_rows, importance_rows, main_rows, rate_rows, spread_rows
from evidence_table import overview, table
from federations import FOLDER, Results

QUICK = {"budget_seconds": 12.0, "rates": (0.004,)}
QUICK_CHANGES = {"training.examples_per_round": 16, "evaluation.examples_per_round": 40}
TASKS = ("clinc150", "snips", "e2e")
PARTS: dict[str, tuple[Callable[[Bench], list[Row]], Callable[[Task, Sequence[Row]], list[Check]]]] = {
    "rates": (rate_rows, lambda task, rows: []),
    "spread": (spread_rows, lead_checks),
    "edges": (edge_rows, lambda task, rows: []),
    "ablations": (ablation_rows, ablation_checks),
    "importance": (importance_rows, importance_checks),
}  # beside the main part: their rows, and the verdicts over them
OVERVIEW = "overview"  # the main part in one table
PICTURES = Path(".fedpipe")


@dataclass(frozen=True)
class Section:
    """What one task comes to in one part."""

    bench: Bench
    rows: list[Row]
    checks: list[Check]


def sections(options: argparse.Namespace, kept_only: bool = False) -> Iterator[Section]:
    """Every task's rows and checks. With `kept_only` a run that is not kept is a LookupError and not made."""
    for name in options.task or (["clinc150"] if options.quick or options.reduced else TASKS):
        task = _sized(read_task(name), options)
        file = None if options.quick else options.results / f"evidence-{task.name}.json"
        bench = Bench(task, Results(file), kept_only)
        if options.part in {"main", OVERVIEW}:
            rows = _main_rows(bench, options)
            found = checks(task, rows)
        else:
            make_rows, verdicts = PARTS[options.part]
            rows = make_rows(bench)
            found = verdicts(task, rows)
        yield Section(bench, rows, found)


@dataclass(frozen=True)
class Piece:
    """What is shown together: a table, its verdicts, and the files of its pictures."""

    table: str
    checks: list[Check]
    pictures: list[Path]


def pieces(part: str, made: Sequence[Section], folder: Path) -> list[Piece]:
    """What a part shows, one for all tasks or one a task; pictures are written into the folder."""
    if part == OVERVIEW:
        rows = [(section.bench.task, section.rows) for section in made]
        text = overview([(section.bench.task, section.rows, section.checks) for section in made])
        return [Piece(text, [], [draw_overview(rows, folder)])]
    return [Piece(table(s.bench.task, s.rows), s.checks, draw(s.bench, part, s.rows, folder)) for s in made]


def _main_rows(bench: Bench, options: argparse.Namespace) -> list[Row]:
    small = options.quick or options.reduced
    settings = options.setting or ([HETEROGENEOUS] if small else list(SETTINGS))
    partitions = options.partition or ([TUNED] if small else list(bench.task.partitions))
    return main_rows(bench, settings, partitions, options.seeds or (1 if small else SEEDS))


def _sized(task: Task, options: argparse.Namespace) -> Task:
    if options.quick:
        return replace(task, **QUICK, changes={**task.changes, **QUICK_CHANGES})
    return replace(task, name=f"{task.name}-reduced", rates=task.rates[1:]) if options.reduced else task


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line asks for."""
    options = parser(__doc__)
    options.add_argument("--task", nargs="+", default=[], help="names or files of tasks; all, or clinc150 when reduced")
    options.add_argument("--part", choices=("main", OVERVIEW, *PARTS), default="main")
    options.add_argument("--seeds", type=int, help=f"number of seeds of the main part: {SEEDS}, or 1 of a reduced set")
    options.add_argument("--setting", nargs="+", choices=SETTINGS, default=[], help="of the main part; both by default")
    options.add_argument("--partition", nargs="+", default=[], help="of the main part; all of a task when left out")
    options.add_argument("--results", type=Path, help="folder of the runs that are kept; .fedpipe of a reduced set")
    options.add_argument("--reduced", action="store_true", help="one task and setting in less than 30 minutes")
    options.add_argument("--quick", action="store_true", help="train hardly anything, keep nothing")
    found = options.parse_args(arguments)
    found.results = found.results or (Path(".fedpipe") if found.reduced else FOLDER / "results")
    return found


def main() -> None:
    """Print each task's table and checks."""
    options = parse()
    torch.set_num_threads(1)
    made = list(sections(options))
    with TemporaryDirectory() as folder:
        shown = pieces(options.part, made, Path(folder) if options.quick else PICTURES)
    document = {"part": options.part, "tasks": {s.bench.task.name: [asdict(row) for row in s.rows] for s in made}}
    verdicts = [check for piece in shown for check in piece.checks]
    finish(options.json, document, verdicts, "\n\n".join(piece.table for piece in shown))


if __name__ == "__main__":
    main()
