"""The verdicts over the rows of evidence."""

from collections.abc import Sequence

from common import Check, at_least, at_most
from evidence_cases import FEDLORA, FEDPIPE, HETEROGENEOUS, Task
from evidence_rows import Row, by_place


def counted_seconds(row: Row) -> float:
    """Seconds to the target; where it was not reached, the whole budget."""
    return row.seconds_to_target or row.budget_seconds


def lead(ours: Row, other: Row) -> float:
    """How many times as soon at the target as another."""
    return counted_seconds(other) / counted_seconds(ours)


def share_of_bytes(ours: Row, other: Row) -> float:
    """Of another's bytes, in the whole budget."""
    return (ours.mib_up + ours.mib_down) / ((other.mib_up + other.mib_down) or 1.0)


def checks(task: Task, rows: Sequence[Row]) -> list[Check]:
    """The aims, in the heterogeneous setting."""
    found: list[Check] = []
    heterogeneous = [row for row in rows if row.place.startswith(HETEROGENEOUS)]
    for place, here in by_place(heterogeneous).items():
        ours, others = here[FEDPIPE], [row for name, row in here.items() if name != FEDPIPE]
        found.append(
            at_least(f"{place}: all our runs reach the target", float(ours.seconds_to_target is not None), 1.0)
        )
        for other in others:
            aim = 2.0 if other.method == FEDLORA else 1.0
            found.append(at_least(f"{place}: time of {other.method} over ours", lead(ours, other), aim))
        found.append(at_least(f"{place}: our best end less the best other's worst", _ahead(task, ours, others), 0.0))
        uniform = here[FEDLORA]
        parameters = ours.trained_parameters / uniform.trained_parameters
        found.append(at_most(f"{place}: parameters over fedlora's", parameters, 0.5))
        if ours.mib_to_target and uniform.mib_to_target:
            to_target = ours.mib_to_target / uniform.mib_to_target
            found.append(at_most(f"{place}: bytes to the target over fedlora's", to_target, 0.5))
        found.append(at_most(f"{place}: bytes in equal time over fedlora's", share_of_bytes(ours, uniform), 0.5))
    return found


def _ahead(task: Task, ours: Row, others: Sequence[Row]) -> float:
    """Our best end less the best of the others' worst; negative where somebody always ends better than we ever do."""
    sign = 1.0 if task.higher_is_better else -1.0
    return sign * ours.best - max(sign * row.worst for row in others)


def lead_checks(_: Task, rows: Sequence[Row]) -> list[Check]:
    """Of the sweep over speeds: whether the lead over uniform LoRA grows with their spread."""
    leads = {place: lead(here[FEDPIPE], here[FEDLORA]) for place, here in by_place(rows).items()}
    first, last = rows[0].place, rows[-1].place
    return [at_least(f"lead over fedlora at {last} over that at {first}", leads[last] / leads[first], 1.0)]


def ablation_checks(_: Task, rows: Sequence[Row]) -> list[Check]:
    """Whether anything that leaves a part out is sooner at the target than the whole."""
    ours, *others = rows
    return [at_least(f"time of {other.method} over the whole's", lead(ours, other), 1.0) for other in others]


def importance_checks(task: Task, rows: Sequence[Row]) -> list[Check]:
    """Whether weights that were chosen without looking are sooner at the target, or end better in every seed."""
    ours, *others = rows
    ends = [(f"our best end less that of {other.method} at worst", _ahead(task, ours, [other])) for other in others]
    return [*ablation_checks(task, rows), *(at_least(name, ahead, 0.0) for name, ahead in ends)]
