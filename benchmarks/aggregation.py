"""What aggregation costs: each rule's seconds and peak memory beside the dense SVD and beside reading the updates once.

Run `python benchmarks/aggregation.py [--json] [--quick]`. Rules run on a sample of the modules of a large model, each
in a process of its own so that peak memory is its own; seconds are scaled to all modules. The last row aggregates
1,000 edges of a 768-wide model module by module from files. `--quick` shrinks everything to a few seconds.
"""

import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
from common import Check, at_least, at_most, finish, markdown_table, parser

from fedpipe_core.adapters import Adapter, split_for_edge
from fedpipe_core.aggregation import RULES, Update, aggregate
from fedpipe_core.config import AggregationSpec
from fedpipe_core.low_rank import LowRank, truncate_dense
from fedpipe_core.wire_updates import encode_update, open_update

GIB = 2**30
LEAST_SPEEDUP = 50.0
MOST_GIB = 2.0


@dataclass(frozen=True)
class Case:
    """A square model and the updates of one round."""

    width: int = 4096
    modules: int = 128
    edges: int = 5
    rank: int = 16
    global_rank: int = 32
    sample: int = 4


@dataclass(frozen=True)
class Row:
    """One line of the table; seconds are for all modules of the case."""

    name: str
    modules_measured: int
    module_seconds: float
    seconds: float
    added_gib: float
    peak_gib: float


LARGE = Case()
QUICK = Case(width=512, modules=4, sample=1)
CROWD = Case(width=768, modules=72, edges=1000, rank=8, global_rank=32, sample=2)
QUICK_CROWD = Case(width=64, modules=2, edges=50, rank=8, global_rank=32, sample=1)


def peak_gib() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def make_round(case: Case, shared_right: bool) -> tuple[Adapter, list[Update]]:
    """A global adapter and one update per edge; with `shared_right` the edges left A as it was."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / case.width**0.5

    factors = {
        f"module-{i}": LowRank(noise(case.width, case.global_rank), noise(case.global_rank, case.width))
        for i in range(case.sample)
    }
    previous = Adapter(factors, {})
    start, _ = split_for_edge(previous, dict.fromkeys(factors, case.rank), seed=0)
    updates = []
    for edge in range(case.edges):
        trained = {
            module: LowRank(f.B + 0.1 * noise(*f.B.shape), f.A if shared_right else f.A + 0.1 * noise(*f.A.shape))
            for module, f in start.factors.items()
        }
        updates.append(Update(f"edge-{edge:04d}", start, Adapter(trained, {}), 100 + edge))
    return previous, updates


def measure(name: str, case: Case) -> Row:
    """Seconds per module and memory added by one rule, `dense_svd` or `read_once`."""
    previous, updates = make_round(case, shared_right=name == "ffa")
    before, seconds = peak_gib(), []
    for module in previous.factors:
        alone = Adapter({module: previous.factors[module]}, {})
        parts = [
            Update(u.edge_id, Adapter({module: u.start.factors[module]}, {}), _only(u, module), u.num_examples)
            for u in updates
        ]
        began = time.perf_counter()
        _run(name, alone, parts)
        seconds.append(time.perf_counter() - began)
    each = median(seconds)
    return Row(name, len(seconds), each, each * case.modules, peak_gib() - before, peak_gib())


def _only(update: Update, module: str) -> Adapter:
    return Adapter({module: update.trained.factors[module]}, {})


def _run(name: str, previous: Adapter, updates: list[Update]) -> None:
    if name == "read_once":
        for update in updates:
            for factors in update.trained.factors.values():
                float(factors.B.sum() + factors.A.sum())
    elif name == "dense_svd":
        _dense_svd(previous, updates)
    else:
        aggregate(previous, updates, AggregationSpec.model_validate({"rule": name}))


def _dense_svd(previous: Adapter, updates: list[Update]) -> None:
    """The sum of changes formed in full and decomposed, as a direct reading of the definition has it."""
    examples = sum(update.num_examples for update in updates)
    for module, factors in previous.factors.items():
        total = factors.dense()
        for update in updates:
            share = update.num_examples / examples
            total += share * (update.trained.factors[module].dense() - update.start.factors[module].dense())
        truncate_dense(total, 0.999, 32)


def measure_crowd(case: Case) -> Row:
    """Many edges whose updates lie in files and are read module by module, as a coordinator reads them."""
    previous, updates = make_round(replace(case, edges=1), shared_right=False)
    with tempfile.TemporaryDirectory() as folder, _written(Path(folder), case, updates[0]) as paths:
        del updates
        start, _ = split_for_edge(previous, dict.fromkeys(previous.factors, case.rank), seed=0)
        stored = [Update(path.name, start, open_update(path, start), 100) for path in paths]
        before, began = peak_gib(), time.perf_counter()
        aggregate(previous, stored, AggregationSpec())
        each = (time.perf_counter() - began) / case.sample
    name = f"delta_svd, {case.edges} edges of rank {case.rank}, width {case.width}"
    return Row(name, case.sample, each, each * case.modules, peak_gib() - before, peak_gib())


@contextmanager
def _written(folder: Path, case: Case, update: Update) -> Iterator[list[Path]]:
    paths = []
    for edge in range(case.edges):
        generator = torch.Generator().manual_seed(edge)
        trained = {
            module: LowRank(f.B + 0.1 * torch.randn(f.B.shape, generator=generator), f.A)
            for module, f in update.trained.factors.items()
        }
        path = folder / f"edge-{edge:04d}"
        path.write_bytes(encode_update(Adapter(trained, {}), update.start, "bf16")[0])
        paths.append(path)
    yield paths


def run_alone(name: str, quick: bool) -> Row:
    """One row, measured in a process of its own."""
    with get_context("fork").Pool(1) as pool:  # this process computes nothing, so a fork is safe and starts at once
        return pool.apply(measure_row, (name, quick))


def measure_row(name: str, quick: bool) -> Row:
    """One row of the table; the dense SVD takes most of a minute per module, so it gets one."""
    if name == "crowd":
        return measure_crowd(QUICK_CROWD if quick else CROWD)
    case = QUICK if quick else LARGE
    return measure(name, replace(case, sample=1) if name == "dense_svd" else case)


def checks(rows: dict[str, Row], crowd: Row, quick: bool) -> list[Check]:
    """The claims; a quick run is too small to judge the speed-up."""
    speedup = rows["dense_svd"].seconds / rows["delta_svd"].seconds
    return [
        at_least("delta_svd_speedup_over_dense_svd", speedup, 1.0 if quick else LEAST_SPEEDUP),
        at_most("crowd_peak_gib", crowd.peak_gib, MOST_GIB),
    ]


def as_text(case: Case, rows: Sequence[Row]) -> str:
    """A line for every row."""
    case_line = f"{case.modules} modules of {case.width}×{case.width}, {case.edges} edges of rank {case.rank}"
    cells = [(r.name, 1000 * r.module_seconds, r.seconds, r.added_gib, r.peak_gib) for r in rows]
    formats = ("{}", "{:.1f}", "{:.2f}", "{:.3f}", "{:.2f}")
    lines = [[format_.format(cell) for format_, cell in zip(formats, line, strict=True)] for line in cells]
    return markdown_table((case_line, "ms/module", "seconds", "added GiB", "peak GiB"), lines)


def main() -> None:
    """Print the table, or one JSON object with the table and its checks."""
    arguments = parser(__doc__)
    arguments.add_argument("--quick", action="store_true", help="small sizes, a few seconds")
    options = arguments.parse_args()
    case = QUICK if options.quick else LARGE
    rows = {name: run_alone(name, options.quick) for name in ("read_once", *RULES, "dense_svd")}
    crowd = run_alone("crowd", options.quick)
    table = [*rows.values(), crowd]
    results = {"case": asdict(case), "threads": torch.get_num_threads(), "table": [asdict(row) for row in table]}
    finish(options.json, results, checks(rows, crowd, options.quick), as_text(case, table))


if __name__ == "__main__":
    main()
