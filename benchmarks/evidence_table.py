"""The rows of evidence as tables: one of a task, and one of all tasks."""

from collections.abc import Mapping, Sequence

from common import Check, markdown_table
from evidence_cases import FEDLORA, FEDPIPE, METHODS, Task
from evidence_checks import lead, share_of_bytes
from evidence_rows import Row, by_place


def table(task: Task, rows: Sequence[Row]) -> str:
    """The table in Markdown."""
    also = [task.also] if task.also else []
    passes = any(row.seconds_to_uniform for row in rows)
    head = ["where", "method", "rate", "seeds", "s to target", *(["s to fedlora's end"] if passes else [])]
    head += [task.metric, "range", *also, "rounds", "edges", "spread", "left over", "parameters"]
    head += ["MiB up", "MiB down", "to target", "peak MiB", "profiling"]
    return markdown_table(head, [_cells(row, passes) for row in rows])


def _cells(row: Row, passes: bool) -> list[str]:
    also = [] if row.also is None else [f"{row.also:.1f}"]
    return [
        *(row.place, row.method, f"{row.rate:g}", str(row.seeds)),
        *(_seconds(found) for found in (row.seconds_to_target, row.seconds_to_uniform)[: 1 + passes]),
        *(f"{row.value:.3f}", f"{row.worst:.3f}–{row.best:.3f}", *also, str(row.rounds), str(row.edges)),
        *(f"{row.round_spread:.0%}", f"{row.under_training:.0%}", f"{row.trained_parameters:,}"),
        *(f"{row.mib_up:.1f}", f"{row.mib_down:.1f}"),
        "" if row.mib_to_target is None else f"{row.mib_to_target:.1f}",
        *(f"{row.peak_mib:.0f}", f"{row.profile_share:.1%}"),
    ]


def overview(tasks: Sequence[tuple[Task, Sequence[Row], Sequence[Check]]]) -> str:
    """A line for each place of each task, in Markdown: every method's seconds to the target and end, aims that hold."""
    methods = list(METHODS)
    head = ["task", "where", *(f"s, {method}" for method in methods), "lead over fedlora"]
    head += [*(f"end, {method}" for method in methods), "bytes of fedlora's", "aims"]
    lines = []
    for task, rows, checks in tasks:
        for place, here in by_place(rows).items():
            verdicts = [check["ok"] for check in checks if check["name"].startswith(f"{place}:")]
            lines.append([f"{task.name}, {task.metric}", place, *_overview_cells(here), _held(verdicts)])
    return markdown_table(head, lines)


def _overview_cells(here: Mapping[str, Row]) -> list[str]:
    ours, uniform = here[FEDPIPE], here[FEDLORA]
    return [
        *(_seconds(row.seconds_to_target) for row in here.values()),
        _lead(ours, uniform),
        *(f"{row.value:.3f}" for row in here.values()),
        f"{share_of_bytes(ours, uniform):.0%}",
    ]


def _lead(ours: Row, other: Row) -> str:
    """How many times as soon at the target; a bound where one of both is not there in the whole budget."""
    reached = (ours.seconds_to_target is not None, other.seconds_to_target is not None)
    bound = {(True, True): "", (True, False): "≥ ", (False, True): "≤ "}.get(reached)
    return "" if bound is None else f"{bound}{lead(ours, other):.1f}"


def _held(verdicts: Sequence[bool]) -> str:
    return f"{sum(verdicts)} of {len(verdicts)}" if verdicts else ""


def _seconds(found: float | None) -> str:
    return "not reached" if found is None else f"{found:.0f}"
