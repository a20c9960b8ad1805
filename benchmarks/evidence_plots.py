"""Pictures of evidence: the metric against simulated time and bytes, and the time to the target against a sweep."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evidence_cases import Case
from evidence_checks import counted_seconds
from evidence_rows import Bench, Row, moved_mib


def draw(bench: Bench, part: str, rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write a picture per setting and partition, or one of a sweep, and say where. Other parts have none."""
    if part == "main":
        return [_curves(bench, rows, place, folder) for place in _places(rows)]
    return [_sweep(bench, part, rows, folder)] if part in {"spread", "edges"} else []


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
    places = _places(rows)
    for method in dict.fromkeys(row.method for row in rows):
        here = [row for row in rows if row.method == method]
        seconds = [counted_seconds(row) for row in here]
        (line,) = to_target.plot(places, seconds, label=method)
        for place, row, height in zip(places, here, seconds, strict=True):
            face = line.get_color() if row.seconds_to_target else "white"
            to_target.plot([place], [height], marker="o", color=line.get_color(), markerfacecolor=face)
        at_end.plot(places, [row.value for row in here], marker=".")
    to_target.set(ylabel="simulated seconds to the target")
    at_end.set(ylabel=bench.task.metric)
    for axes in (to_target, at_end):
        axes.tick_params(axis="x", rotation=20)
    to_target.legend()
    return _saved(figure, folder, f"{bench.task.name}-{part}")


def _places(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.place for row in rows))


def _figure(sharey: bool = False) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    return figure, figure.subplots(1, 2, sharey=sharey)


def _saved(figure: Any, folder: Path, name: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"evidence-{name}.png"
    figure.savefig(path, dpi=110)
    return path
