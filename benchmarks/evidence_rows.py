"""What evidence rests on: runs, kept one by one, and the rows of its tables."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from statistics import median
from typing import Any

from evidence_cases import (
    ABLATIONS,
    FEDLORA,
    FEDPIPE,
    FULL,
    HETEROGENEOUS,
    HOMOGENEOUS,
    METHODS,
    REFERENCE,
    SEEDS,
    TUNED,
    UNMEASURED,
    Case,
    Task,
    make_config,
    slowdowns,
)
from federations import Results, Run, config_hash
from simulated_clock import Setting, Yardstick, core_of, simulate, spread

from fedpipe_core.config import FederationConfig
from fedpipe_core.profile_schemas import StepCost

SPREADS = (1.0, 2.0, 4.0, 8.0, 16.0)
EDGE_COUNTS = (5, 10, 20)
SWEPT = (FEDPIPE, FEDLORA)
MIB = 2**20


@dataclass(frozen=True)
class Row:
    """One method in one place over the seeds: medians, and the range of the metric at the end."""

    place: str
    method: str
    rate: float
    seeds: int
    budget_seconds: float
    seconds_to_target: float | None
    seconds_to_uniform: float | None  # to what the worst run of uniform LoRA ends with
    value: float
    worst: float
    best: float
    also: float | None
    rounds: int
    edges: int
    round_spread: float
    under_training: float
    trained_parameters: int
    mib_up: float
    mib_down: float
    mib_to_target: float | None
    peak_mib: float
    profile_share: float


def by_place(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """Per place its rows by method, both in the order of the rows."""
    places: dict[str, dict[str, Row]] = {}
    for row in rows:
        places.setdefault(row.place, {})[row.method] = row
    return places


class Bench:
    """Runs of one task: each is kept by its name and config, and made only where it is not there yet."""

    def __init__(self, task: Task, results: Results, kept_only: bool = False):
        self.task, self.results, self._kept_only = task, results, kept_only

    def run(self, case: Case) -> Run:
        """The run of a case."""
        config = make_config(self.task, case)
        key = f"{config_hash(config)}, {self.task.budget(case.setting):g} s, {sorted(slowdowns(case).values())}"
        return self.results.kept(case.name, key, lambda: self._made(case, config))

    def _made(self, case: Case, config: FederationConfig) -> Run:
        if self._kept_only:
            raise LookupError(
                f"{self.task.name}: {case.name} was not run with the config that it has now; run evidence.py"
            )
        budget_seconds = self.task.budget(case.setting)
        return simulate(config, Setting(budget_seconds, slowdowns(case), *self._core, strict=True))

    @cached_property
    def _core(self) -> tuple[StepCost, Yardstick]:
        first = Case(HOMOGENEOUS, next(iter(self.task.partitions)), FEDPIPE, self.task.rates[0])
        return core_of(make_config(self.task, first), self.results)

    def best_rate(self, case: Case) -> float:
        """The rate of the grid whose run, with seed 0 and by domain, ends with the least loss on validation rows."""
        tried = {rate: self.run(replace(case, partition=TUNED, rate=rate, seed=0)) for rate in self.task.rates}
        return min(tried, key=lambda rate: _validation_loss(tried[rate]))

    def target(self, partition: str) -> float | None:
        """The share of full fine-tuning's last value, on equal edges that all hold it."""
        case = Case(REFERENCE, partition, FULL, self.task.rates[0])
        value = _last(self.run(replace(case, rate=self.best_rate(case))), self.task.metric)
        return None if value is None else self.task.target(value)

    def worst_end(self, case: Case, seeds: int) -> float | None:
        """What the worst run of a case has in its last round."""
        ends = [_last(self.run(replace(case, seed=seed)), self.task.metric) for seed in range(seeds)]
        known = [end for end in ends if end is not None]
        worst = min if self.task.higher_is_better else max
        return worst(known) if len(known) == len(ends) else None

    def row(self, place: str, case: Case, seeds: int, target: float | None, uniform: float | None = None) -> Row:
        """A case with every seed. `uniform` is what the worst run of uniform LoRA ends with."""
        runs = [self.run(replace(case, seed=seed)) for seed in range(seeds)]
        values = [run["final"][self.task.metric] for run in runs]
        to_target, to_uniform = ([self._rounds_to(run, value) for run in runs] for value in (target, uniform))
        order = sorted(values, reverse=self.task.higher_is_better)
        budget_seconds = self.task.budget(case.setting)
        plans = [list(run["plan"].values()) for run in runs]
        return Row(
            place=place,
            method=case.method,
            rate=case.rate,
            seeds=seeds,
            budget_seconds=budget_seconds,
            seconds_to_target=_median_over(runs, to_target, _clock),
            seconds_to_uniform=_median_over(runs, to_uniform, _clock),
            value=median(values),
            worst=order[-1],
            best=order[0],
            also=median(run["final"][self.task.also] for run in runs) if self.task.also else None,
            rounds=round(median(len(run["rounds"]) for run in runs)),
            edges=round(median(len(plan) for plan in plans)),
            round_spread=median(spread(run) if run["rounds"] else 0.0 for run in runs),
            under_training=median(sum(p["under_training"] for p in plan) / len(plan) for plan in plans),
            trained_parameters=round(median(sum(p["trained_parameters"] for p in plan) / len(plan) for plan in plans)),
            mib_up=median(sum(r["upload_bytes"] for r in run["rounds"]) for run in runs) / MIB,
            mib_down=median(sum(r["download_bytes"] for r in run["rounds"]) for run in runs) / MIB,
            mib_to_target=_median_over(runs, to_target, moved_mib),
            peak_mib=median(max(p["predicted_memory_mib"] for p in plan) for plan in plans),
            profile_share=median(r["profile_seconds"] + r["planning_seconds"] for r in runs) / budget_seconds,
        )

    def _rounds_to(self, run: Run, target: float | None) -> int | None:
        """Rounds until the target is reached, None where it is not."""
        values = [r[self.task.metric] for r in run["rounds"]] if target is not None else []
        return next((i + 1 for i, value in enumerate(values) if self.task.reached(value, target or 0.0)), None)


def moved_mib(run: Run, rounds: int) -> float:
    """What the first rounds moved, up and down."""
    return sum(r["upload_bytes"] + r["download_bytes"] for r in run["rounds"][:rounds]) / MIB


def _clock(run: Run, rounds: int) -> float:
    return float(run["rounds"][rounds - 1]["clock"])


def _median_over(
    runs: Sequence[Run], rounds: Sequence[int | None], measure: Callable[[Run, int], float]
) -> float | None:
    """The median of a measure after every run's number of rounds; None where a run has none."""
    found = [measure(run, count) for run, count in zip(runs, rounds, strict=True) if count]
    return median(found) if len(found) == len(runs) else None


def _validation_loss(run: Run) -> float:
    return run["rounds"][-1]["validation_loss"] if run["rounds"] else float("inf")


def _last(run: Run, metric: str) -> float | None:
    return run["rounds"][-1][metric] if run["rounds"] else None


def main_rows(bench: Bench, settings: Sequence[str], partitions: Sequence[str], seeds: int) -> list[Row]:
    """All methods in every setting, each with its best rate."""
    rows: list[Row] = []
    targets = {partition: bench.target(partition) for partition in partitions}
    for setting, partition in product(settings, partitions):
        cases = [Case(setting, partition, method, bench.task.rates[0]) for method in METHODS]
        best = {case.method: replace(case, rate=bench.best_rate(case)) for case in cases}
        uniform, target = bench.worst_end(best[FEDLORA], seeds), targets[partition]
        rows += [bench.row(f"{setting}, {partition}", case, seeds, target, uniform) for case in best.values()]
    return rows


def rate_rows(bench: Bench) -> list[Row]:
    """Every method with every rate of the grid, one seed, by domain on unequal edges, and which it takes."""
    target, rows = bench.target(TUNED), []
    for method in METHODS:
        case = Case(HETEROGENEOUS, TUNED, method, bench.task.rates[0])
        best = bench.best_rate(case)
        for rate in bench.task.rates:
            place = "chosen" if rate == best else "not chosen"
            rows.append(bench.row(place, replace(case, rate=rate), 1, target))
    return rows


def spread_rows(bench: Bench) -> list[Row]:
    """The two that train low-rank adapters, one seed, with slowest edges of several speeds."""
    return _swept_rows(bench, TUNED, [(f"speeds 1 to {slowest:g}", {"slowest": slowest}) for slowest in SPREADS])


def edge_rows(bench: Bench) -> list[Row]:
    """The two that train low-rank adapters, one seed, with several numbers of edges."""
    return _swept_rows(bench, "dirichlet", [(f"{count} edges", {"edges": count}) for count in EDGE_COUNTS])


def _swept_rows(bench: Bench, partition: str, places: Sequence[tuple[str, dict[str, Any]]]) -> list[Row]:
    base = Case(HETEROGENEOUS, partition, FEDPIPE, bench.task.rates[0])
    target, rates = bench.target(partition), _swept_rates(bench)
    return [
        bench.row(place, replace(base, method=method, rate=rates[method], **changes), 1, target)
        for place, changes in places
        for method in SWEPT
    ]


def ablation_rows(bench: Bench) -> list[Row]:
    """FedPipe by domain on unequal edges, one seed, and the same with one part changed at a time."""
    base = Case(HETEROGENEOUS, TUNED, FEDPIPE, bench.task.rates[0])
    target, rates = bench.target(TUNED), _swept_rates(bench)
    whole = bench.row("whole", replace(base, rate=rates[FEDPIPE]), 1, target)
    tuned = {name: rates[changes.get("method", FEDPIPE)] for name, changes in ABLATIONS.items()}
    return [whole, *(bench.row("without", replace(base, method=m, rate=r), 1, target) for m, r in tuned.items())]


def importance_rows(bench: Bench) -> list[Row]:
    """FedPipe by domain on unequal edges, and the same where weights are chosen without looking, with every seed."""
    base = Case(HETEROGENEOUS, TUNED, FEDPIPE, bench.task.rates[0])
    target, rate = bench.target(TUNED), bench.best_rate(base)
    return [bench.row("by domain", replace(base, method=m, rate=rate), SEEDS, target) for m in (FEDPIPE, *UNMEASURED)]


def _swept_rates(bench: Bench) -> dict[str, float]:
    """The rates of the main part."""
    return {m: bench.best_rate(Case(HETEROGENEOUS, TUNED, m, bench.task.rates[0])) for m in SWEPT}
