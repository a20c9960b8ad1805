"""Pictures of evidence: the metric against time and bytes, the time to the target against a sweep, and of all tasks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evidence_cases import METHODS, Case, Task
from evidence_checks import counted_seconds
from evidence_rows import Bench, Row, by_place, moved_mib


def draw(bench: Bench, part: str, rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write a picture per setting and partition, or one of a sweep, and say where. Other parts have none."""
    if part == "main":
        return [_curves(bench, rows, place, folder) for place in by_place(rows)]
    return [_sweep(bench, part, rows, folder)] if part in {"spread", "edges"} else []


def draw_overview(tasks: Sequence[tuple[Task, Sequence[Row]]], folder: Path) -> Path:
    """The share of the budget until the target, a line for each place of each task; hollow where it was not reached."""
    places = [(task.name, place) for task, rows in tasks for place in by_place(rows)]
    figure, axes = _figure(1, height=1.2 + 0.28 * len(places))
    for index, method in enumerate(METHODS):
        color, beside = f"C{index}", 0.15 * (index - 1.5)  # who is not there would lie on one point
        for task, rows in tasks:
            for row in (row for row in rows if row.method == method):
                share = counted_seconds(row) / row.budget_seconds
                _dot(axes, share, places.index((task.name, row.place)) + beside, color, row)
        axes.plot([], [], marker="o", linestyle="", color=color, label=method)
    axes.set_yticks(range(len(places)), [f"{name}, {place}" for name, place in places])
    axes.invert_yaxis()
    axes.grid(axis="y", alpha=0.3)
    axes.set(xlabel="share of the time until the target (hollow: not reached)", xlim=(0, 1.03))
    figure.legend(loc="outside upper center", ncols=len(METHODS))
    return _saved(figure, folder, "overview")


def _curves(bench: Bench, rows: Sequence[Row], place: str, folder: Path) -> Path:
    """One line a method, of seed 0."""
    figure, (by_time, by_bytes) = _figure(sharey=True)
    setting, partition = place.split(", ")
    for row in (row for row in rows if row.place == place):
        run = bench.run(Case(setting, partition, row.method, row.rate))
        values = [found[bench.task.metric] for found in run["rounds"]]
        by_time.plot([found["clock"] for found in run["rounds"]], values, marker=".", label=row.method)
        by_bytes.plot([moved_mib(run, count + 1) for count in range(len(values))], values, marker=".")
    by_time.set(xlabel="simulated seconds", ylabel=bench.task.metric)
    by_bytes.set(xlabel="MiB moved", xscale="log")
    by_time.legend()
    return _saved(figure, folder, f"{bench.task.name}-{setting}-{partition}")


def _sweep(bench: Bench, part: str, rows: Sequence[Row], folder: Path) -> Path:
    """Seconds to the target, hollow where it was not reached in the whole budget, and the metric at the end."""
    figure, (to_target, at_end) = _figure()
    places = list(by_place(rows))
    for method in dict.fromkeys(row.method for row in rows):
        here = [row for row in rows if row.method == method]
        seconds = [counted_seconds(row) for row in here]
        (line,) = to_target.plot(places, seconds, label=method)
        for place, row, height in zip(places, here, seconds, strict=True):
            _dot(to_target, place, height, line.get_color(), row)
        at_end.plot(places, [row.value for row in here], marker=".")
    to_target.set(ylabel="simulated seconds to the target")
    at_end.set(ylabel=bench.task.metric)
    for axes in (to_target, at_end):
        axes.tick_params(axis="x", rotation=20)
    to_target.legend()
    return _saved(figure, folder, f"{bench.task.name}-{part}")


def _dot(axes: Any, x: float | str, y: float, color: str, row: Row) -> None:
    """Hollow where the target was not reached."""
    axes.plot([x], [y], marker="o", color=color, markerfacecolor=color if row.seconds_to_target else "white")


def _figure(columns: int = 2, sharey: bool = False, height: float = 3.6) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), layout="constrained")
    return figure, figure.subplots(1, columns, sharey=sharey)


def _saved(figure: Any, folder: Path, name: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"evidence-{name}.png"
    figure.savefig(path, dpi=110)
    return path
