"""An edge's steps: profile once, then train round after round. They meet the coordinator in the store alone.

An `EdgeSession` is what an edge keeps warm between rounds. The same steps run in the coordinator's process in local
mode.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from fedpipe_core import aggregation_rules
from fedpipe_core.adapters import Adapter
from fedpipe_core.batches import Batch, training_batches
from fedpipe_core.config import FederationConfig
from fedpipe_core.edge_model import EdgeModel, load_adapter, read_adapter
from fedpipe_core.errors import FedPipeError, IntegrityError, UpdateRefusedError
from fedpipe_core.evaluation import metrics_of, predict
from fedpipe_core.evaluation_schemas import EvaluationRecord
from fedpipe_core.low_rank import LowRank
from fedpipe_core.plan_schemas import EdgePlan
from fedpipe_core.profile_schemas import ModelShape
from fedpipe_core.profiling import profile_edge
from fedpipe_core.schemas import DataReference, FailureRecord, GlobalRecord, UpdateRecord
from fedpipe_core.seeding import derive_seed
from fedpipe_core.training import TrainingReport, rate_factor, steps_rate_factor, train
from fedpipe_core.wire import decode_adapter, encode_adapter
from fedpipe_core.wire_updates import encode_update
from tasks import progress
from tasks.bases import dense_base, dense_bits, let_go_of_bases, shared_base
from tasks.edge_models import lent_model
from tasks.edge_session import (
    EdgeSession,
    Machine,
    StoppedError,
    allow_training,
    check_not_stopped,
    link_bytes_per_second,
    stop_training,
)
from tasks.records import RunKeys, get_data, get_record, offer_record, put_data, put_record
from tasks.storage import ObjectStore

__all__ = [
    "EdgeSession",
    "EdgeStart",
    "Machine",
    "StoppedError",
    "allow_training",
    "check_not_stopped",
    "dense_base",
    "dense_bits",
    "edge_start",
    "let_go_of_bases",
    "link_bytes_per_second",
    "profile",
    "read_global",
    "read_global_record",
    "reason_of",
    "shared_base",
    "stop_training",
    "train_round",
]
EdgeStart = tuple[Adapter, dict[str, LowRank]]


@task(task_run_name="profile {session.edge_id}", cache_policy=NO_CACHE)
def profile(session: EdgeSession, shape: ModelShape) -> None:
    """Measure the edge and publish its profile; a published profile is left as it is."""
    key = session.keys.profile(session.edge_id)
    if session.store.exists(key):
        return
    torch.set_num_threads(session.machine.threads)
    limits = session.limits
    with progress.working(session.edge_id, "profile"):
        found = profile_edge(session.edge_id, session.profile_base, shape, session.data, session.config, limits)
    put_record(session.store, key, found, session.machine.signing_key)
    get_run_logger().info(
        "%s: %d examples, profiled in %.1f s", found.edge_id, found.num_examples, found.profile_seconds
    )


@task(task_run_name="round {round_index} train {session.edge_id}", cache_policy=NO_CACHE)
def train_round(session: EdgeSession, round_index: int) -> None:
    """Train one round and publish the update; publish the reason instead when the edge cannot.

    An update that is already in the store is left as it is, so a resumed run trains no edge twice.
    """
    keys, edge_id = session.keys, session.edge_id
    if session.store.exists(keys.update_record(round_index, edge_id)):
        return
    try:
        update = _train_and_publish(session, round_index)
        progress.note(f"{edge_id}: loss {update.train_loss:.4f} in round {round_index}")
        get_run_logger().info("%s: loss %.4f after %d steps", edge_id, update.train_loss, update.steps)
    except Exception as error:
        reason = reason_of(error)
        get_run_logger().warning("%s: no update in round %d: %s", edge_id, round_index, reason, exc_info=True)
        failure = FailureRecord(run=keys.run, round=round_index, edge_id=edge_id, reason=reason)
        offer_record(session.store, keys.failure(round_index, edge_id), failure)  # a coordinator that gave up was first
        progress.note(f"{edge_id} returns no update from round {round_index}: {reason}")


def reason_of(error: Exception) -> str:
    """Why an edge could not do its part, as its record tells it."""
    return str(error) if isinstance(error, FedPipeError) else f"{type(error).__name__}: {error}"


def read_global(
    store: ObjectStore, keys: RunKeys, round_index: int, signed_by: str | None = None
) -> tuple[GlobalRecord, Adapter]:
    """The adapter a round starts from. Raises IntegrityError when it is missing or not what its record says."""
    record = read_global_record(store, keys, round_index, signed_by)
    return record, decode_adapter(get_data(store, record.adapter))


def read_global_record(
    store: ObjectStore, keys: RunKeys, round_index: int, signed_by: str | None = None
) -> GlobalRecord:
    """The record of the adapter a round starts from. Raises IntegrityError when it is missing."""
    record = get_record(store, keys.global_record(round_index), GlobalRecord, signed_by)
    if record is None:
        raise IntegrityError(f"store {store.root}: {keys.global_record(round_index)} is missing; resume the run")
    return record


def edge_start(config: FederationConfig, plan: EdgePlan, adapter: Adapter, round_index: int) -> EdgeStart:
    """What an edge trains in a round and its frozen tail; the coordinator computes the same from the same adapter."""
    split = aggregation_rules.edge_start(config.aggregation.rule)
    return split(adapter, plan.ranks, derive_seed(config.seed, "start", round_index))


@dataclass(frozen=True)
class _Trained:
    """What came of a round's training, with the metrics on validation rows before it and, in a trial, after it."""

    adapter: Adapter
    report: TrainingReport
    metrics: dict[str, float]
    trained_metrics: dict[str, float]
    peak_memory_bytes: int


def _train_and_publish(session: EdgeSession, round_index: int) -> UpdateRecord:
    torch.set_num_threads(session.machine.threads)
    session.begin_round(round_index)
    config, keys, plan = session.config, session.keys, session.plan
    started, started_at = time.perf_counter(), time.time()
    record, adapter = read_global(session.store, keys, round_index, config.coordinator_signs)
    read_seconds = time.perf_counter() - started
    start, tail = edge_start(config, plan, adapter, round_index)
    trained = _trained(session, round_index, start, tail)
    data, encoded = _encode(session, round_index, start, trained.adapter), time.perf_counter()
    published = _put_update(session, round_index, data)
    finished = time.perf_counter()
    update = UpdateRecord(
        run=keys.run,
        round=round_index,
        edge_id=session.edge_id,
        base_sha256=shared_base(config, plan.base_bits).sha256,
        global_sha256=record.adapter.sha256,
        adapter=published,
        num_examples=len(session.data.train),
        examples_processed=trained.report.examples_processed,
        steps=trained.report.steps,
        train_loss=trained.report.loss,
        train_seconds=trained.report.seconds,
        round_seconds=finished - started,
        transfer_seconds=read_seconds + finished - encoded,
        started_at=started_at,
        peak_memory_bytes=trained.peak_memory_bytes,
        download_bytes=record.adapter.size_bytes,
        metrics=trained.metrics,
        trained_metrics=trained.trained_metrics,
    )
    put_record(session.store, keys.update_record(round_index, session.edge_id), update, session.machine.signing_key)
    return update


def _trained(session: EdgeSession, round_index: int, start: Adapter, tail: Mapping[str, LowRank]) -> _Trained:
    plan = session.plan
    with lent_model(session.design) as model:
        load_adapter(model, start, tail)
        with progress.working(session.edge_id, f"train round {round_index}", plan.local_steps) as advance:
            metrics = _judged_before(session, round_index) or _validate(session, model)
            report = _train(session, model, round_index, advance)
            trained_metrics = _validate(session, model) if plan.trial else {}
        return _Trained(read_adapter(model), report, metrics, trained_metrics, session.measure_memory(model))


def _put_update(session: EdgeSession, round_index: int, data: bytes) -> DataReference:
    """Publish an update's data, unless a record vouches for the data that is there. Raises UpdateRefusedError."""
    if session.store.exists(session.keys.update_record(round_index, session.edge_id)):
        raise UpdateRefusedError(f"{session.edge_id}: another process of this edge answered round {round_index} first")
    return put_data(session.store, session.keys.update_data(round_index, session.edge_id), data)


def _judged_before(session: EdgeSession, round_index: int) -> dict[str, float]:
    """What the edge found the received adapter worth when it judged it, but for written text; nothing in a trial,
    where the same rows have to be judged again.
    """
    key, generate = session.keys.evaluation(round_index, session.edge_id), session.config.evaluation.generate
    if not session.config.edges_judge or session.plan.trial:
        return {}
    found = get_record(session.store, key, EvaluationRecord)
    written = generate.metrics if generate else ()
    return {name: value for name, value in found.evaluation.metrics.items() if name not in written} if found else {}


def _validate(session: EdgeSession, model: EdgeModel) -> dict[str, float]:
    if not len(session.data.validation):
        return {}
    return metrics_of(predict(model.model, session.data.validation, session.config.evaluation.batch_size))


def _train(session: EdgeSession, model: EdgeModel, round_index: int, advance: Callable[[], None]) -> TrainingReport:
    config, plan = session.config, session.plan
    parts = (config.seed, round_index, session.edge_id)
    width = config.model.max_tokens if config.training.packing else None
    batches = training_batches(session.data.train, plan.batch_size, plan.local_steps, parts, width)
    rate = rate_factor(config.training, round_index, config.rounds)
    rate *= steps_rate_factor(config.training, plan.local_steps)
    return train(model, _counted(batches, session.check, advance), config.training, rate)


def _counted(batches: Iterator[Batch], check: Callable[[], None], advance: Callable[[], None]) -> Iterator[Batch]:
    for batch in batches:
        check()
        yield batch
        advance()


def _encode(session: EdgeSession, round_index: int, start: Adapter, trained: Adapter) -> bytes:
    """Encode the update; what a short number format leaves out is kept at the edge and added next round."""
    residual = _read_residual(session, round_index - 1)
    exchange = session.config.exchange
    data, left_out = encode_update(trained, start, exchange.dtype, residual, exchange.energy)
    if left_out is not None:
        session.state.mkdir(parents=True, exist_ok=True)
        _residual_path(session, round_index).write_bytes(encode_adapter(left_out, "fp32"))
    return data


def _read_residual(session: EdgeSession, round_index: int) -> Adapter | None:
    path = _residual_path(session, round_index)
    return decode_adapter(path.read_bytes()) if path.is_file() else None


def _residual_path(session: EdgeSession, round_index: int) -> Path:
    return session.state / f"residual-{round_index:04d}.safetensors"
