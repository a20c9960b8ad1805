"""The coordinator's part where the edges judge: reads their answers, combines those that count, closes the judging."""

from collections.abc import Mapping
from dataclasses import dataclass

from prefect import task
from prefect.cache_policies import NO_CACHE

from fedpipe_core.combined_metrics import combined_metrics
from fedpipe_core.errors import FedPipeError, IntegrityError, QuorumError
from fedpipe_core.evaluation import metrics_of
from fedpipe_core.evaluation_schemas import EdgeEvaluation, EvaluationRecord, JudgedRecord
from fedpipe_core.plan_schemas import FederationPlan
from fedpipe_core.profile_schemas import EdgeProfile
from fedpipe_core.schemas import BESIDE, FailureRecord, GlobalRecord
from tasks import progress
from tasks.coordinator import Coordinator
from tasks.edge import read_global_record
from tasks.federation import evaluate, require_quorum
from tasks.records import get_record, put_record, recorded_edges


def judged(coordinator: Coordinator, round_index: int) -> JudgedRecord | None:
    """What the edges found the adapter worth that a round starts from; None while that is open, or not asked for."""
    if not coordinator.config.edges_judge:
        return None
    key, signed_by = coordinator.keys.judged(round_index), coordinator.config.coordinator_signs
    return get_record(coordinator.store, key, JudgedRecord, signed_by)


@dataclass(frozen=True)
class Worth:
    """What a global adapter is worth: on the coordinator's rows, if it has any, and to the edges, if they judge."""

    here: Mapping[str, float]
    at_edges: JudgedRecord | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """The coordinator's metrics, with the edges' beside them, or the edges' alone."""
        combined = self.at_edges.metrics if self.at_edges else {}
        beside = {f"{BESIDE}{name}": value for name, value in combined.items()}
        return {**self.here, **beside} if self.here else dict(combined)

    @property
    def of_edges(self) -> dict[str, dict[str, float]]:
        """Each edge's metrics, where the edges judge."""
        return {name: dict(found.metrics) for name, found in self.evaluations.items()}

    @property
    def evaluations(self) -> dict[str, EdgeEvaluation]:
        """Each edge's whole answer, where the edges judge."""
        return dict(self.at_edges.evaluations) if self.at_edges else {}


def told_metrics(coordinator: Coordinator, round_index: int) -> dict[str, float]:
    """The metrics of what a round starts from: measured here on all rows, and as the edges told them."""
    here = metrics_of(evaluate(coordinator, round_index, whole=True)) if coordinator.config.coordinator_judges else {}
    return Worth(here, judged(coordinator, round_index)).metrics


def forget_evaluation_failures(coordinator: Coordinator, round_index: int) -> None:
    """Let edges that did not judge in an open turn try again."""
    store, keys = coordinator.store, coordinator.keys
    for edge_id in recorded_edges(store, keys.evaluation_failures(round_index)):
        store.delete(keys.evaluation_failure(round_index, edge_id))


@task(task_run_name="round {round_index} combine the edges' metrics", cache_policy=NO_CACHE)
def close_judging(coordinator: Coordinator, plan: FederationPlan, round_index: int) -> JudgedRecord:
    """Combine the answers of the plan's edges and publish the result, which no later answer changes.

    Raises QuorumError, leaving the judging open, when fewer than `min_edges` count.
    """
    store, keys, signed_by = coordinator.store, coordinator.keys, coordinator.config.coordinator_signs
    start = read_global_record(store, keys, round_index, signed_by)
    counted, dropped = {}, dict[str, str]()
    for edge_id in sorted(plan.edges):
        try:
            counted[edge_id] = _answer(coordinator, start, edge_id).evaluation
        except FedPipeError as error:
            dropped[edge_id] = str(error)
    told = f"{len(counted)} edges judged what round {round_index} starts from"
    require_quorum(coordinator.config, told, len(counted), dropped)
    found = JudgedRecord(
        run=keys.run,
        round=round_index,
        global_sha256=start.adapter.sha256,
        evaluations=counted,
        dropped=dropped,
        metrics=combined_metrics(counted),
    )
    put_record(store, keys.judged(round_index), found, coordinator.signing_key)
    for edge_id, reason in dropped.items():
        progress.note(f"{edge_id} is left out of what the edges found: {reason}")
    return found


def _answer(coordinator: Coordinator, start: GlobalRecord, edge_id: str) -> EvaluationRecord:
    """An edge's answer. Raises QuorumError where there is none, IntegrityError where it cannot be one to `start`."""
    store, keys, config = coordinator.store, coordinator.keys, coordinator.config
    key = keys.evaluation(start.round, edge_id)
    found = get_record(store, key, EvaluationRecord, config.edge_signs(edge_id))
    if found is None:
        failure = get_record(store, keys.evaluation_failure(start.round, edge_id), FailureRecord)
        raise QuorumError(failure.reason if failure else "no answer")
    expected = (keys.run, start.round, edge_id, start.base_sha256, start.adapter.sha256)
    if (found.run, found.round, found.edge_id, found.base_sha256, found.global_sha256) != expected:
        raise IntegrityError(f"{key} answers to another run, round, edge, base or adapter; it must not be used")
    profile = get_record(store, keys.profile(edge_id), EdgeProfile, config.edge_signs(edge_id))
    known = profile.num_validation_examples if profile else 0
    most = known * config.model.max_tokens
    if found.evaluation.rows > known or any(count > most for count in found.evaluation.counted.values()):
        raise IntegrityError(
            f"{key} tells of {found.evaluation.rows} rows, and the edge's profile of {known}; it must not be used"
        )
    return found
