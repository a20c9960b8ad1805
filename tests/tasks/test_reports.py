import pytest

from fedpipe_core.plan_schemas import EdgePlan, FederationPlan, PredictedCost
from fedpipe_core.schemas import RoundRecord
from tasks import edge, federation, reports, tracking
from tasks.coordinator import Coordinator
from tasks.edge import EdgeSession
from tasks.judging import Worth
from tasks.tracking import TrackedRun

METRICS = {"accuracy": 0.51239, "macro_f1": 0.4, "loss": 1.25}


def round_of(index: int, dropped: dict[str, str]) -> RoundRecord:
    counted = [edge_id for edge_id in ("east", "west") if edge_id not in dropped]
    return RoundRecord(
        round=index,
        participants=counted,
        dropped=dropped,
        seconds=3.14159,
        train_seconds=dict.fromkeys(counted, 2.0),
        upload_bytes=2**20,
        download_bytes=2**21,
        train_loss=dict.fromkeys(counted, 0.7),
        edge_metrics={edge_id: {"accuracy": 0.9} for edge_id in counted},
        metrics=METRICS,
        adapter_sha256="0" * 64,
    )


def plan_of(**ranks: dict[str, int]) -> FederationPlan:
    cost = PredictedCost(peak_memory_bytes=2**30, round_seconds=12.34, upload_bytes=2**20, download_bytes=1)
    edges = {
        edge_id: EdgePlan(
            edge_id=edge_id,
            ranks=chosen,
            batch_size=8,
            local_steps=5,
            base_bits=32,
            predicted=cost,
            binding="memory",
        )
        for edge_id, chosen in ranks.items()
    }
    return FederationPlan(round_seconds=20.0, solver="greedy", edges=edges)


def test_plan_is_a_row_an_edge() -> None:
    rows = reports.plan_rows(plan_of(east={"a": 8, "b": 4, "c": 4}, west={"a": 2}))
    assert [(row["edge"], row["modules"], row["ranks"]) for row in rows] == [("east", 3, "2×4 1×8"), ("west", 1, "1×2")]
    assert (rows[0]["memory MiB"], rows[0]["round s"], rows[0]["upload MiB"]) == (1024, 12.3, 1.0)


def test_round_is_a_row_with_the_reasons_of_dropped_edges() -> None:
    first, second = reports.round_rows([round_of(1, {}), round_of(2, {"west": "loss became nan"})])
    assert (first["accuracy"], first["seconds"], first["up MiB"], first["down MiB"]) == (0.5124, 3.1, 1.0, 2.0)
    assert (first["edges"], first["dropped"]) == (2, "")
    assert (second["edges"], second["dropped"]) == (1, "west: loss became nan")


def test_metrics_of_a_round_are_the_federations_and_each_edges() -> None:
    overall, edges = reports.tracked_metrics(round_of(2, {"west": "no answer"}))
    assert overall == {
        **METRICS,
        "round_seconds": 3.14159,
        "upload_bytes": 2.0**20,
        "download_bytes": 2.0**21,
        "edges_counted": 1.0,
    }
    assert edges == {"east": {"accuracy": 0.9, "train_loss": 0.7, "train_seconds": 2.0}}


def test_metrics_fit_on_a_line() -> None:
    assert reports.metrics_line(METRICS) == "accuracy 0.5124, macro_f1 0.4000, loss 1.2500"


def test_round_record_adds_up_what_the_updates_say(
    coordinator: Coordinator, sessions: dict[str, EdgeSession], plan: FederationPlan
) -> None:
    for edge_id in ("east", "north"):
        edge.train_round.fn(sessions[edge_id], 1)
    made = federation.aggregate_round.fn(coordinator, plan, 1)
    record = reports.round_record(coordinator, plan, made, Worth(METRICS), seconds=1.5)
    updates = federation.round_updates(coordinator, 1)
    assert record.participants == ["east", "north"]
    assert record.dropped == {"west": "no answer"}
    assert record.upload_bytes == sum(update.adapter.size_bytes for update in updates.values())
    assert record.train_loss == {edge_id: update.train_loss for edge_id, update in updates.items()}
    assert record.simulated_seconds == {e: plan.edges[e].predicted.round_seconds for e in ("east", "north")}
    assert record.adapter_sha256 == made.adapter.sha256
    assert (record.metrics, record.seconds) == (METRICS, 1.5)


def test_plan_stands_beside_what_it_cost_at_worst(
    coordinator: Coordinator, sessions: dict[str, EdgeSession], plan: FederationPlan
) -> None:
    edge.train_round.fn(sessions["east"], 1)
    found = reports.plan_reports(coordinator, plan)
    update = federation.round_updates(coordinator, 1)["east"]
    assert found["west"].measured is None
    assert found["east"].measured
    assert found["east"].measured.round_seconds == update.round_seconds
    assert found["east"].predicted == plan.edges["east"].predicted


def test_both_pictures_are_kept_with_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {}
    monkeypatch.setattr(tracking, "log_figure", lambda run, figure, path: kept.update({path: figure}))
    run = TrackedRun("uri", "experiment", "run")
    rounds = [round_of(1, {"west": "no answer"}), round_of(2, {})]
    reports.log_plots(run, plan_of(east={"a": 8}, west={"b": 2}), rounds)
    assert set(kept) == {"plots/rounds.png", "plots/ranks.png"}
    quality, loss = kept["plots/rounds.png"].axes
    assert [line.get_label() for line in quality.lines] == ["accuracy", "macro_f1"]
    assert [line.get_label() for line in loss.lines] == ["east", "west", "held-out set"]
    assert [text.get_text() for text in kept["plots/ranks.png"].axes[0].texts] == ["8", "", "", "2"]


def test_pictures_of_many_edges_show_their_spread_and_the_first_ones_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {}
    monkeypatch.setattr(tracking, "log_figure", lambda run, figure, path: kept.update({path: figure}))
    losses = {f"edge-{number:04d}": float(number) for number in range(1001)}
    rounds = [round_of(1, {}).model_copy(update={"train_loss": losses})]
    plan = plan_of(**{edge_id: {"a": 8} for edge_id in losses})
    reports.log_plots(TrackedRun("uri", "experiment", "run"), plan, rounds)
    loss, ranks = kept["plots/rounds.png"].axes[1], kept["plots/ranks.png"].axes[0]
    assert [line.get_label() for line in loss.lines] == ["median of 1001 edges", "held-out set"]
    assert loss.lines[0].get_ydata() == [500.0]
    assert ranks.get_title() == "rank of every module, first 40 of 1001 edges"
    assert len(ranks.texts) == 40
