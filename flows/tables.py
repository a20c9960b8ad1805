"""Plans and results as text for a person."""

import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedpipe_core.result_schemas import RunResult
from flows.local_api import is_local

MIB = 2**20
SQLITE = "sqlite:///"


def plan_table(document: dict[str, Any]) -> str:
    """What `fedpipe plan` prints: a row an edge, and the run's totals; or why an edge has no plan."""
    reasons = [f"  {reason}" for reason in document["infeasible"].values()]
    if not document["plan"]:
        return "No feasible plan for:\n" + "\n".join(reasons)
    totals = document["totals"]
    rows = [_plan_row(edge_id, edge) for edge_id, edge in document["plan"].items()]
    trials = totals.get("trial_rounds", 0)
    header = ("edge", "bits", "batch", "steps", "modules×rank", "memory MiB", "round s", "up MiB", "limited by")
    return (
        f"{text_table(header, rows)}\n\n"
        f"deadline of a round {totals['deadline_seconds']:.1f} s; whole run {totals['seconds']:.1f} s, "
        f"{totals['upload_bytes'] / MIB:.1f} MiB up, {totals['download_bytes'] / MIB:.1f} MiB down"
        + (f", if the largest size wins in each of {trials} rounds with trials" if trials else "")
        + ("\nleft out, since no plan fits:\n" + "\n".join(reasons) if reasons else "")
    )


def result_summary(result: RunResult, unreleased: str = "") -> str:
    """What `fedpipe run` prints: quality before and after, the model, and the commands that open both UIs.

    `unreleased` says why the method's model has no release, if it has none.
    """
    before, after = result.baseline_metrics, result.metrics
    lines = [
        f"run        {result.run}, {len(result.rounds)} rounds, {result.seconds:.0f} s",
        *(_quality_line(name, before.get(name), after) for name in after),
        *([f"model      has no release: {unreleased}"] if unreleased else _release_lines(result)),
        f"MLflow     {_mlflow_ui(result.tracking.uri)}  # experiment {result.tracking.experiment}",
        f"Prefect    {_prefect_ui()}",
    ]
    return "\n".join(lines)


def _quality_line(name: str, before: float | None, after: Mapping[str, float]) -> str:
    width = max(10, *map(len, after))
    begun = "not measured" if before is None else f"{before:.4f}"
    return f"{name:<{width}} {begun} before training, {after[name]:.4f} after"


def _mlflow_ui(uri: str) -> str:
    """The command that shows the run, or the server that does, without its password."""
    if not uri.startswith(SQLITE):
        return re.sub(r"//[^/@]*@", "//", uri)
    return f"{_program('mlflow')} ui --backend-store-uri {SQLITE}{_short(Path(uri.removeprefix(SQLITE)))}"


def _prefect_ui() -> str:
    from prefect.settings import get_current_settings

    if not is_local():
        return str(get_current_settings().ui_url or get_current_settings().api.url)
    home = os.environ.get("PREFECT_HOME")
    where = f"PREFECT_HOME={_short(Path(home))} " if home else ""
    return f"{where}{_program('prefect')} server start"


def _program(name: str) -> str:
    """A program as this shell finds it, else by its path beside the Python that runs now."""
    beside, found = Path(sys.executable).with_name(name), shutil.which(name)
    return name if found and Path(found) == beside else _short(beside)


def _short(path: Path) -> str:
    """A path as a shell takes it, relative where it lies below the working directory."""
    return shlex.quote(str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))


def _release_lines(result: RunResult) -> list[str]:
    if result.model is None:
        return [f"model      not released; `fedpipe release {result.run} --store {result.store}` does it"]
    written = {export.scheme: export.path for export in result.exports}
    path = written.get("merged") or written["adapter"]  # one of them is registered
    verdict = "promoted to champion" if result.model.decision.promoted else "not promoted"
    return [
        f"model      {path if '://' in path else _short(Path(path))}",
        f"registered {result.model.name} version {result.model.version}, {verdict}",
        *(f"           {reason}" for reason in result.model.decision.reasons),
    ]


def _plan_row(edge_id: str, edge: dict[str, Any]) -> tuple[str, ...]:
    ranks, cost = sorted(edge["ranks"].values()), edge["predicted"]
    groups = " ".join(f"{ranks.count(rank)}×{rank}" for rank in sorted(set(ranks))) or "all"
    numbers = (edge["base_bits"], edge["batch_size"], edge["local_steps"])
    sizes = (
        f"{cost['peak_memory_bytes'] / MIB:.0f}",
        f"{cost['round_seconds']:.1f}",
        f"{cost['upload_bytes'] / MIB:.2f}",
    )
    return edge_id, *map(str, numbers), groups, *sizes, edge["binding"]


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell."""
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (header, *rows)
    )
