"""What a run says of itself: records that close rounds, the result, and the tables and plots in both UIs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from fedpipe_core.plan_schemas import EdgePlan, FederationPlan
from fedpipe_core.result_schemas import MeasuredCost, PlanReport, ReleaseReport, RunResult, TrackingReport
from fedpipe_core.schemas import GlobalRecord, RoundRecord, UpdateRecord
from tasks import tracking
from tasks.coordinator import Coordinator
from tasks.federation import round_updates
from tasks.judging import Worth
from tasks.manifest import record_hashes
from tasks.tracking import TrackedRun

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MIB = 2**20
MOST_SHOWN = 40  # edges in a picture one by one; a picture of more is wider than matplotlib draws
_SHARES = ("accuracy", "macro_f1", "token_accuracy")  # metrics from 0 to 1 that every round has


@dataclass(frozen=True)
class Outcome:
    """What the rounds came to: the plan, every round, and the metrics before training."""

    plan: FederationPlan
    rounds: Sequence[RoundRecord]
    baseline: Mapping[str, float]


def round_record(
    coordinator: Coordinator, plan: FederationPlan, made: GlobalRecord, worth: Worth, seconds: float
) -> RoundRecord:
    """Close the round that made `made`."""
    updates = round_updates(coordinator, made.round - 1)
    declared = [edge.edge_id for edge in coordinator.config.edges if edge.resources]
    return RoundRecord(
        round=made.round - 1,
        participants=sorted(made.counted),
        dropped=made.dropped,
        seconds=seconds,
        train_seconds={edge_id: update.train_seconds for edge_id, update in updates.items()},
        simulated_seconds={
            edge_id: plan.edges[edge_id].predicted.round_seconds for edge_id in declared if edge_id in updates
        },
        upload_bytes=sum(update.adapter.size_bytes for update in updates.values()),
        download_bytes=sum(update.download_bytes for update in updates.values()),
        train_loss={edge_id: update.train_loss for edge_id, update in updates.items()},
        edge_metrics={edge_id: update.metrics for edge_id, update in updates.items()},
        metrics=worth.metrics,
        evaluations=worth.evaluations,
        not_judged=worth.at_edges.dropped if worth.at_edges else {},
        adapter_sha256=made.adapter.sha256,
        records=record_hashes(coordinator.store, coordinator.keys, made),
    )


def run_result(
    coordinator: Coordinator, tracked: TrackedRun, outcome: Outcome, released: ReleaseReport | None, seconds: float
) -> RunResult:
    """Put together what `fedpipe run` prints."""
    rounds = outcome.rounds
    return RunResult(
        run=coordinator.keys.run,
        store=coordinator.store.root,
        status="completed",
        seconds=seconds,
        adapter_sha256=rounds[-1].adapter_sha256,
        rounds=list(rounds),
        plan=plan_reports(coordinator, outcome.plan),
        metrics=rounds[-1].metrics,
        baseline_metrics=dict(outcome.baseline),
        exports=released.exports if released else [],
        model=released.model if released else None,
        tracking=TrackingReport(uri=tracked.uri, experiment=tracked.experiment, run_id=tracked.run_id),
    )


def plan_reports(coordinator: Coordinator, plan: FederationPlan) -> dict[str, PlanReport]:
    """Every edge's plan beside what it cost so far."""
    updates: dict[str, list[UpdateRecord]] = {edge_id: [] for edge_id in plan.edges}
    for round_index in range(1, coordinator.config.rounds + 1):
        for edge_id, update in round_updates(coordinator, round_index).items():
            updates[edge_id].append(update)
    return {edge_id: _plan_report(edge, updates[edge_id]) for edge_id, edge in plan.edges.items()}


def tracked_metrics(record: RoundRecord) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """A round's metrics for MLflow: the federation's, and each edge's."""
    overall = {
        **record.metrics,
        "round_seconds": record.seconds,
        "upload_bytes": float(record.upload_bytes),
        "download_bytes": float(record.download_bytes),
        "edges_counted": float(len(record.participants)),
    }
    judged = {edge_id: found.metrics for edge_id, found in record.evaluations.items()}
    edges = {
        edge_id: {
            **(judged.get(edge_id) or record.edge_metrics.get(edge_id, {})),
            "train_loss": loss,
            "train_seconds": record.train_seconds[edge_id],
        }
        for edge_id, loss in record.train_loss.items()
    }
    return overall, edges


def plan_rows(plan: FederationPlan) -> list[dict[str, Any]]:
    """The plan as a table, a row an edge."""
    return [
        {
            "edge": edge_id,
            "bits": edge.base_bits,
            "batch": edge.batch_size,
            "steps": edge.local_steps,
            "modules": len(edge.ranks),
            "ranks": ranks_line(edge),
            "memory MiB": round(edge.predicted.peak_memory_bytes / MIB),
            "round s": round(edge.predicted.round_seconds, 1),
            "upload MiB": round(edge.predicted.upload_bytes / MIB, 2),
            "binding": edge.binding,
        }
        for edge_id, edge in plan.edges.items()
    ]


def ranks_line(edge: EdgePlan) -> str:
    """How many modules have which rank, compactly: `12×4 6×8`."""
    ranks = sorted(edge.ranks.values())
    return " ".join(f"{ranks.count(rank)}×{rank}" for rank in sorted(set(ranks))) or "every parameter"


def round_rows(rounds: Sequence[RoundRecord]) -> list[dict[str, Any]]:
    """The rounds as a table."""
    return [
        {
            "round": record.round,
            **{name: round(value, 4) for name, value in record.metrics.items()},
            "edges": len(record.participants),
            "dropped": "; ".join(f"{edge_id}: {reason}" for edge_id, reason in record.dropped.items()),
            "seconds": round(record.seconds, 1),
            "up MiB": round(record.upload_bytes / MIB, 2),
            "down MiB": round(record.download_bytes / MIB, 2),
        }
        for record in rounds
    ]


def metrics_line(metrics: Mapping[str, float]) -> str:
    """Metrics on one line."""
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def log_plots(run: TrackedRun, plan: FederationPlan, rounds: Sequence[RoundRecord]) -> None:
    """Keep the learning curve and the ranks chosen as pictures in MLflow."""
    tracking.log_figure(run, _curves(rounds), "plots/rounds.png")
    if plan.planned_modules:
        tracking.log_figure(run, _rank_map(plan), "plots/ranks.png")


def _plan_report(edge: EdgePlan, updates: Sequence[UpdateRecord]) -> PlanReport:
    measured = None
    if updates:
        measured = MeasuredCost(
            peak_memory_bytes=max(update.peak_memory_bytes for update in updates),
            round_seconds=max(update.round_seconds for update in updates),
            upload_bytes=max(update.adapter.size_bytes for update in updates),
            download_bytes=max(update.download_bytes for update in updates),
        )
    return PlanReport(
        ranks=edge.ranks,
        batch_size=edge.batch_size,
        local_steps=edge.local_steps,
        base_bits=edge.base_bits,
        binding=edge.binding,
        predicted=edge.predicted,
        measured=measured,
    )


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure  # no pyplot: its state is shared between threads

    return Figure(figsize=(width, height), layout="constrained")


def _curves(rounds: Sequence[RoundRecord]) -> "Figure":
    figure = _figure(8, 3.2)
    quality, loss = figure.subplots(1, 2)
    steps = [record.round for record in rounds]
    for name in _SHARES:
        if name in rounds[0].metrics:
            quality.plot(steps, [record.metrics[name] for record in rounds], marker="o", label=name)
    quality.set(xlabel="round", title=rounds[0].judges, xticks=steps)
    quality.legend()
    edges = sorted({edge_id for record in rounds for edge_id in record.train_loss})
    for edge_id in edges if len(edges) <= MOST_SHOWN else []:
        loss.plot(steps, [record.train_loss.get(edge_id) for record in rounds], marker=".", label=edge_id)
    if len(edges) > MOST_SHOWN:
        losses = [sorted(record.train_loss.values()) or [math.nan] for record in rounds]
        loss.plot(steps, [median(values) for values in losses], marker=".", label=f"median of {len(edges)} edges")
        loss.fill_between(steps, [v[0] for v in losses], [v[-1] for v in losses], alpha=0.2, label="lowest to highest")
    loss.plot(steps, [record.metrics["loss"] for record in rounds], "k--", label=rounds[0].judges)
    loss.set(xlabel="round", title="loss (nats)", xticks=steps)
    loss.legend()
    return figure


def _rank_map(plan: FederationPlan) -> "Figure":
    modules, edges = plan.planned_modules, sorted(plan.edges)[:MOST_SHOWN]
    figure = _figure(3 + 0.5 * len(edges), 1.2 + 0.22 * len(modules))
    axes = figure.subplots()
    ranks = [[plan.edges[edge_id].ranks.get(name, 0) for edge_id in edges] for name in modules]
    axes.imshow(ranks, aspect="auto", cmap="Blues")
    for row, values in enumerate(ranks):
        for column, rank in enumerate(values):
            axes.text(column, row, str(rank or ""), ha="center", va="center", fontsize=7)
    axes.set_xticks(range(len(edges)), edges, rotation=45, ha="right")
    axes.set_yticks(range(len(modules)), modules, fontsize=6)
    shown = "" if len(edges) == len(plan.edges) else f", first {len(edges)} of {len(plan.edges)} edges"
    axes.set_title(f"rank of every module{shown}")
    return figure


def gate_rows(report: ReleaseReport) -> list[dict[str, Any]]:
    """The gate's checks as a table; one row with the reason where nothing had to be checked."""
    decision = report.model.decision
    if not decision.checks:
        reason = "; ".join(decision.reasons)
        return [{"check": "none", "number": "", "threshold": "", "verdict": "unchanged", "in words": reason}]
    return [
        {
            "check": check.name,
            "number": round(check.value, 6),
            "threshold": "" if check.threshold is None else check.threshold,
            "verdict": "passed" if check.passed else "failed",
            "in words": check.reason,
        }
        for check in decision.checks
    ]
