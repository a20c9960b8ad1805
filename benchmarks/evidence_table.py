"""The rows of evidence as a table."""

from collections.abc import Sequence

from common import markdown_table
from evidence_cases import Task
from evidence_rows import Row


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


def _seconds(found: float | None) -> str:
    return "not reached" if found is None else f"{found:.0f}"
