"""The verdicts over the rows of evidence."""

from collections.abc import Sequence

from common import Check, at_least, at_most
from evidence_cases import FEDLORA, FEDPIPE, HETEROGENEOUS, Task
from evidence_rows import Row


def counted_seconds(row: Row) -> float:
    """Seconds to the target; where it was not reached, the whole budget."""
    return row.seconds_to_target or row.budget_seconds


def checks(task: Task, rows: Sequence[Row]) -> list[Check]:
    """The aims, in the heterogeneous setting."""
    found: list[Check] = []
    for place in dict.fromkeys(row.place for row in rows if row.place.startswith(HETEROGENEOUS)):
        here = {row.method: row for row in rows if row.place == place}
        ours, others = here[FEDPIPE], [row for name, row in here.items() if name != FEDPIPE]
        found.append(
            at_least(f"{place}: all our runs reach the target", float(ours.seconds_to_target is not None), 1.0)
        )
        for other in others:
            ratio = counted_seconds(other) / counted_seconds(ours)
            aim = 2.0 if other.method == FEDLORA else 1.0
            found.append(at_least(f"{place}: time of {other.method} over ours", ratio, aim))
        sign = 1.0 if task.higher_is_better else -1.0
        lead = sign * ours.best - max(sign * row.worst for row in others)
        found.append(at_least(f"{place}: our best end less the best other's worst", lead, 0.0))
        uniform = here[FEDLORA]
        parameters = ours.trained_parameters / uniform.trained_parameters
        moved = (ours.mib_up + ours.mib_down) / ((uniform.mib_up + uniform.mib_down) or 1.0)
        found.append(at_most(f"{place}: parameters over fedlora's", parameters, 0.5))
        if ours.mib_to_target and uniform.mib_to_target:
            to_target = ours.mib_to_target / uniform.mib_to_target
            found.append(at_most(f"{place}: bytes to the target over fedlora's", to_target, 0.5))
        found.append(at_most(f"{place}: bytes in equal time over fedlora's", moved, 0.5))
    return found


def lead_checks(rows: Sequence[Row]) -> list[Check]:
    """Of the sweep over speeds: whether the lead over uniform LoRA grows with their spread."""
    leads = []
    for place in (rows[0].place, rows[-1].place):
        here = {row.method: counted_seconds(row) for row in rows if row.place == place}
        leads.append(here[FEDLORA] / here[FEDPIPE])
    return [at_least(f"lead over fedlora at {rows[-1].place} over that at {rows[0].place}", leads[1] / leads[0], 1.0)]


def ablation_checks(rows: Sequence[Row]) -> list[Check]:
    """Whether anything that leaves a part out is sooner at the target than the whole."""
    seconds = {row.method: counted_seconds(row) for row in rows}
    ours = seconds.pop(FEDPIPE)
    return [at_least(f"time of {method} over the whole's", found / ours, 1.0) for method, found in seconds.items()]
