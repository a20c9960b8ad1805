"""Judging a global adapter: on the coordinator's rows, on those of the edges, or on both."""

import time

from fedpipe_core.evaluation import metrics_of
from fedpipe_core.evaluation_schemas import JudgedRecord
from flows.all_edges import Edges, on_all_edges
from tasks import edge_judging, federation, judging, remote_edges
from tasks.coordinator import Coordinator
from tasks.judging import Worth
from tasks.plans import plan_at


def judge_adapter(coordinator: Coordinator, edges: Edges, round_index: int) -> Worth:
    """What the adapter is worth that a round starts from; the first and the last are judged on all rows."""
    whole = coordinator.config.judges_whole(round_index)
    at_edges = _judge_at_edges(coordinator, edges, round_index) if coordinator.config.edges_judge else None
    if not coordinator.config.coordinator_judges:
        return Worth({}, at_edges)
    return Worth(metrics_of(federation.evaluate(coordinator, round_index, whole=whole)), at_edges)


def _judge_at_edges(coordinator: Coordinator, edges: Edges, round_index: int) -> JudgedRecord:
    """Have every planned edge judge, as far as it has not yet; a judging that was closed stays as it is."""
    known = judging.judged(coordinator, round_index)
    if known is not None:
        return known
    started, keys = time.monotonic(), coordinator.keys
    plan = plan_at(coordinator.store, keys, max(1, round_index - 1), coordinator.config.coordinator_signs)
    judging.forget_evaluation_failures(coordinator, round_index)
    planned = [session for session in edges.local if session.edge_id in plan.edges]
    on_all_edges(edge_judging.judge, planned, round_index=round_index)
    spent_seconds = time.monotonic() - started
    remote_edges.await_evaluations(coordinator, edges.remote, plan, round_index, spent_seconds)
    return judging.close_judging(coordinator, plan, round_index)
