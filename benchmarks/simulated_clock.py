"""Federations on a simulated clock: edges of unequal speed, memory and link, served by one machine.

An edge's seconds are what its work took one core of this machine times the edge's slowdown, and its bytes over its
declared bandwidth. A shared machine is now faster and now slower, by a third and more: thread time is therefore told
in units of a yardstick, timed by the same thread right before and after, and this in what it took when it was kept.
A round lasts as long as its slowest edge; the profile is charged before the first round. What the coordinator does
between rounds is left out for every method alike. An edge's profile holds the step cost measured on this machine times
its slowdown, as the edge itself would measure it.
"""

import os
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from federations import COMMIT, Results, Run
from prefect.logging import disable_run_logger

from fedpipe_core.batches import TokenizedExamples
from fedpipe_core.config import FederationConfig
from fedpipe_core.evaluation import metrics_of
from fedpipe_core.methods import method_shape
from fedpipe_core.plan_schemas import FederationPlan, SavedPlan
from fedpipe_core.planning import plan_federation
from fedpipe_core.profile_schemas import EdgeProfile, StepCost
from fedpipe_core.profiling import EdgeData, probe_batch, probe_sizes
from fedpipe_core.schemas import UpdateRecord
from fedpipe_core.step_cost import measured_step_cost
from tasks import edge, federation
from tasks.coordinator import Coordinator
from tasks.edge import EdgeSession, dense_base
from tasks.edge_models import lent_model
from tasks.federation import read_profiles
from tasks.plans import plan_at, plan_round
from tasks.records import RunKeys
from tasks.storage import open_store

_ROWS: dict[str, EdgeData] = {}
_HELD_OUT: dict[str, TokenizedExamples] = {}


@dataclass(frozen=True)
class Setting:
    """The simulated time every method gets, edges' slowdowns against a core of this machine, and that core's cost.

    With `strict` no round counts that ends after the budget.
    """

    budget_seconds: float
    slowdowns: Mapping[str, float]
    step_cost: StepCost
    yardstick: "Yardstick"
    strict: bool = False


@dataclass(frozen=True, eq=False)
class Yardstick:
    """Work whose seconds on a core of this machine are known; threads may do it side by side."""

    step: Callable[[], None]
    seconds: float

    def timed(self, work: Callable[[], None]) -> float:
        """Thread time of some work, as if the machine were as fast as when `seconds` was measured."""
        before = thread_seconds(self.step)
        taken = thread_seconds(work)
        return taken * 2 * self.seconds / (before + thread_seconds(self.step))


YARDSTICK_PASSES = 4  # of the kept seconds; while a federation runs it is one, which varies by 2 %


def core_of(config: FederationConfig, results: Results) -> tuple[StepCost, Yardstick]:
    """What a step costs on a core of this machine: measured once and kept, so that plans and clocks stay the same."""
    session = EdgeSession(config, config.edges[0], None, None)  # type: ignore[arg-type]  # neither is used
    base = dense_base(config).model
    small, large = (probe_batch(session.data.train, size) for size in probe_sizes(config.planning.batch_sizes))

    @torch.inference_mode()
    def step() -> None:
        base(input_ids=large["input_ids"], attention_mask=large["attention_mask"])

    def steps() -> None:
        for _ in range(YARDSTICK_PASSES):
            step()

    def measure() -> Run:
        cost = measured_step_cost(base, small, large, config.model.bits, time.thread_time, whole=True)
        yardstick = median(thread_seconds(steps) for _ in range(9))
        return {"step_cost": cost.model_dump(mode="json"), "yardstick_seconds": yardstick}

    kept = results.kept("a core", "", measure)
    return StepCost.model_validate(kept["step_cost"]), Yardstick(step, kept["yardstick_seconds"] / YARDSTICK_PASSES)


def thread_seconds(work: Callable[[], None]) -> float:
    """Seconds of one core that some work takes this thread."""
    started = time.thread_time()
    work()
    return time.thread_time() - started


def simulate(config: FederationConfig, setting: Setting) -> Run:
    """Profile, plan and train for the whole budget; per round the clock, metrics, bytes and every edge's seconds."""
    warnings.filterwarnings("ignore", module="torch.jit")
    with tempfile.TemporaryDirectory() as folder, disable_run_logger():
        config = config.model_copy(update={"store": f"{folder}/store"})
        profiles, profile_seconds = _profiles(config, setting)
        started = time.thread_time()
        config, plan = _plan_for_budget(config, profiles, setting.budget_seconds - profile_seconds)
        planning_seconds = time.thread_time() - started
        coordinator, sessions = _opened(config, "run")
        federation.open_federation(config, coordinator.store, coordinator.keys, resume=False)
        federation.adopt_plan(coordinator, SavedPlan(plan=plan, profiles=profiles))
        federation.publish_first_adapter.fn(coordinator, plan)
        clock, rounds = profile_seconds + planning_seconds, []
        for index in range(config.rounds):
            found = _round(coordinator, sessions, index + 1, setting)
            clock += found["seconds"]
            if setting.strict and clock > setting.budget_seconds:
                break
            rounds.append({**found, "clock": round(clock, 3)})
        final = metrics_of(federation.evaluate.fn(coordinator, len(rounds) + 1, whole=True))
        plan = plan_at(coordinator.store, coordinator.keys, max(1, len(rounds)))
    return {
        "commit": COMMIT,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "seed": config.seed,
        "profile_seconds": round(profile_seconds, 3),
        "planning_seconds": round(planning_seconds, 3),
        "plan": {edge_id: _plan_summary(coordinator, plan, edge_id) for edge_id in plan.edges},
        "left_out": sorted(plan.dropped),
        "rounds": rounds,
        "final": {name: round(value, 5) for name, value in final.items()},
    }


def spread(run: Run) -> float:
    """Median over rounds of (last edge to finish − first) / last."""
    edges = [found["edge_seconds"].values() for found in run["rounds"]]
    return median((max(seconds) - min(seconds)) / max(seconds) for seconds in edges)


def _opened(config: FederationConfig, run: str) -> tuple[Coordinator, list[EdgeSession]]:
    """Coordinator and edges; rows that other federations dealt in the same way are read once."""
    coordinator = Coordinator(config, open_store(config.store), RunKeys(run))
    data = f"{config.data} {config.seed} {len(config.edges)} edges"
    coordinator.held_out = _kept(_HELD_OUT, data, lambda: coordinator.held_out)
    sessions = []
    for spec in config.edges:
        session = EdgeSession(config, spec, coordinator.store, coordinator.keys)
        session.data = _kept(_ROWS, f"{data} {spec.edge_id} {spec.values}", lambda s=session: s.data)  # type: ignore[misc]
        session.peak_memory_bytes = 0
        sessions.append(session)
    return coordinator, sessions


def _kept(known: dict[str, Any], key: str, make: Callable[[], Any]) -> Any:
    if key not in known:
        known[key] = make()
    return known[key]


def _profiles(config: FederationConfig, setting: Setting) -> tuple[dict[str, EdgeProfile], float]:
    """Every edge's profile with the step cost of its speed, and the simulated seconds until the last has it."""
    coordinator, sessions = _opened(config, "profile")
    seconds = _on_all(sessions, setting, lambda session: edge.profile.fn(session, coordinator.shape))
    profiles = {
        edge_id: profile.model_copy(update={"step_cost": _slower(setting.step_cost, setting.slowdowns[edge_id])})
        for edge_id, profile in read_profiles(coordinator).items()
    }
    return profiles, max(seconds[edge_id] * setting.slowdowns[edge_id] for edge_id in seconds)


def _slower(cost: StepCost, slowdown: float) -> StepCost:
    return StepCost(
        fixed_seconds=cost.fixed_seconds * slowdown,
        per_token_seconds=cost.per_token_seconds * slowdown,
        per_token_feature_seconds=cost.per_token_feature_seconds * slowdown,
        per_token_rank_seconds=cost.per_token_rank_seconds * slowdown,
        forward_share=cost.forward_share,
        per_parameter_seconds=cost.per_parameter_seconds * slowdown,
        dequantization_seconds={bits: value * slowdown for bits, value in cost.dequantization_seconds.items()},
    )


def _plan_for_budget(
    config: FederationConfig, profiles: Mapping[str, EdgeProfile], seconds: float
) -> tuple[FederationConfig, FederationPlan]:
    """As many rounds as the budget holds, and the plan for that many."""
    shape = Coordinator(config, open_store(config.store), RunKeys("plan")).shape
    for _ in range(3):  # the number of rounds bounds the global rank, and so, a little, what a round takes
        plan = plan_federation(shape, profiles, config)
        rounds = max(1, int(seconds / plan.round_seconds))
        if rounds == config.rounds:
            break
        config = config.model_copy(update={"rounds": rounds})
    return config, plan


def _round(coordinator: Coordinator, everyone: Sequence[EdgeSession], index: int, setting: Setting) -> Run:
    plan = plan_round(coordinator, index)
    sessions = [session for session in everyone if session.edge_id in plan.edges]
    for session in sessions:
        session.begin_round(index)
        session.peak_memory_bytes = 0  # not measured while the clock runs
        with lent_model(session.design):  # built before the clock runs, for every method
            pass
    work = _on_all(sessions, setting, lambda session: edge.train_round.fn(session, index))
    made = federation.aggregate_round.fn(coordinator, plan, index)
    metrics = metrics_of(federation.evaluate.fn(coordinator, index + 1, whole=False))
    updates = federation.round_updates(coordinator, index)
    moved = {e: update.adapter.size_bytes + update.download_bytes for e, update in updates.items()}
    bandwidth = {s.edge_id: s.edge.resources.bandwidth_mbit * 1e6 / 8 for s in sessions if s.edge.resources}
    seconds = {e: work[e] * setting.slowdowns[e] + moved.get(e, 0) / bandwidth[e] for e in work}
    return {
        **{name: round(value, 5) for name, value in metrics.items()},
        "seconds": max(seconds.values()),
        "edge_seconds": {e: round(value, 3) for e, value in seconds.items()},
        "upload_bytes": sum(update.adapter.size_bytes for update in updates.values()),
        "download_bytes": sum(update.download_bytes for update in updates.values()),
        "train_loss": {e: round(update.train_loss, 4) for e, update in updates.items()},
        "dropped": made.dropped,
        "validation_loss": _mean_validation_loss(updates.values()),
    }


def _mean_validation_loss(updates: Iterable[UpdateRecord]) -> float | None:
    """Loss on the edges' validation rows of what the round started from, weighted by examples."""
    judged = [(update.num_examples, update.metrics["loss"]) for update in updates if "loss" in update.metrics]
    total = sum(count for count, _ in judged)
    return round(sum(count * loss for count, loss in judged) / total, 5) if total else None


def _on_all(sessions: Sequence[EdgeSession], setting: Setting, step: Callable[[EdgeSession], None]) -> dict[str, float]:
    """Do a step on every edge, as many at once as there are cores; seconds of one core that each took."""

    def timed(session: EdgeSession) -> float:
        torch.set_num_threads(1)
        return setting.yardstick.timed(lambda: step(session))

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return dict(zip((s.edge_id for s in sessions), threads.map(timed, sessions), strict=True))


def _plan_summary(coordinator: Coordinator, plan: FederationPlan, edge_id: str) -> Run:
    found = plan.edges[edge_id]
    shape = method_shape(coordinator.shape, coordinator.config)
    trained = sum(rank * shape.modules[m].features for m, rank in found.ranks.items()) or shape.head_parameters
    return {
        "modules": len(found.ranks),
        "rank_sum": sum(found.ranks.values()),
        "trained_parameters": trained,
        "batch_size": found.batch_size,
        "local_steps": found.local_steps,
        "base_bits": found.base_bits,
        "checkpointing": found.checkpointing,
        "predicted_seconds": round(found.predicted.round_seconds, 3),
        "predicted_memory_mib": round(found.predicted.peak_memory_bytes / 2**20, 1),
        "under_training": round(found.under_training, 3),
        "binding": found.binding,
    }
