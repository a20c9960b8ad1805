"""An edge's steps: profile once, then train round after round. They meet the coordinator in the store alone.

An `EdgeSession` is what an edge keeps warm between rounds. The same steps run in the coordinator's process in local
mode; sessions in one process share one base per bit width.
"""

import functools
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import torch
from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from fedpipe_core import aggregation_rules
from fedpipe_core.adapters import Adapter
from fedpipe_core.batches import Batch, training_batches
from fedpipe_core.config import EdgeSpec, FederationConfig, ModelSpec
from fedpipe_core.costs import probed_bits
from fedpipe_core.data import fingerprint, split_validation
from fedpipe_core.edge_model import EdgeModel, load_adapter, read_adapter
from fedpipe_core.errors import FedPipeError, IntegrityError, UpdateRefusedError
from fedpipe_core.evaluation import metrics_of, predict
from fedpipe_core.forms import InstanceSpec
from fedpipe_core.low_rank import LowRank
from fedpipe_core.memory import training_memory_bytes
from fedpipe_core.methods import METHODS
from fedpipe_core.model import Base, base_shape, load_base, model_shape
from fedpipe_core.partition import load_edge_examples
from fedpipe_core.profiling import EdgeData, Limits, declared_limits, probe_batch, profile_edge
from fedpipe_core.resources import free_memory_bytes
from fedpipe_core.schemas import (
    EdgePlan,
    FailureRecord,
    FederationPlan,
    GlobalRecord,
    ModelShape,
    UpdateRecord,
)
from fedpipe_core.seeding import derive_seed
from fedpipe_core.signatures import SigningKey
from fedpipe_core.tokenizing import tokenize
from fedpipe_core.training import TrainingReport, rate_factor, train
from fedpipe_core.wire import decode_adapter, encode_adapter
from fedpipe_core.wire_updates import encode_update
from tasks import progress
from tasks.edge_models import ModelDesign, lent_model, let_go_of_idle_models
from tasks.records import RunKeys, get_data, get_record, get_shared_record, offer_record, put_data, put_record
from tasks.storage import ObjectStore

_loading = threading.Lock()
_stopping = threading.Event()
LINK_PROBE_BYTES = 2**20
EdgeStart = tuple[Adapter, dict[str, LowRank]]


@functools.lru_cache(maxsize=4)
def _loaded_base(spec: ModelSpec, labels: int | None, bits: int, seed: int) -> Base:
    return load_base(spec, labels, bits, seed)


def shared_base(config: FederationConfig, bits: int) -> Base:
    """The base at a bit width, loaded once per process however many edges use it."""
    with _loading:
        return _loaded_base(config.model, config.data.labels, bits, config.seed)


def dense_bits(config: FederationConfig) -> int:
    """Width of the unquantized base: the widest of the menu, or what the device computes in."""
    widest = max(config.model.bits)
    return widest if widest >= 16 else 16 if torch.cuda.is_available() else 32


def dense_base(config: FederationConfig) -> Base:
    """The base unquantized, on which adapters are judged and merged."""
    return shared_base(config, dense_bits(config))


def let_go_of_bases() -> None:
    """Free every base that nothing else holds, in a process that serves one edge: it trains on another width."""
    let_go_of_idle_models()
    with _loading:
        _loaded_base.cache_clear()


@dataclass(frozen=True)
class Machine:
    """What the machine gives an edge: threads, a limit on memory if any, a folder for what stays, a key if it signs."""

    threads: int = 1
    memory_bytes: int | None = None
    state: Path | None = None
    signing_key: SigningKey | None = None


class EdgeSession:
    """What one edge keeps between rounds: its rows, tokenized, and once the plan is known what its model is like.

    `check` is called between steps and ends the work by what it raises. A plain class, since Prefect walks through
    every dataclass it is handed.
    """

    def __init__(
        self,
        config: FederationConfig,
        edge: EdgeSpec,
        store: ObjectStore,
        keys: RunKeys,
        machine: Machine | None = None,
    ):
        self.config, self.edge, self.store, self.keys = config, edge, store, keys
        self.machine = machine or Machine()
        self.peak_memory_bytes: int | None = None
        self.check: Callable[[], None] = check_not_stopped

    @property
    def edge_id(self) -> str:
        """The edge's name."""
        return self.edge.edge_id

    @functools.cached_property
    def federation_plan(self) -> FederationPlan:
        """What every edge shall do, in the first plan that has this edge. Raises IntegrityError while there is none."""
        plan = self._find_plan()
        if plan is None:
            raise IntegrityError(f"{self.edge_id}: {self.keys.plan} is missing or has no such edge; resume the run")
        return plan

    def is_planned(self) -> bool:
        """Whether there is a plan that has this edge."""
        return self._find_plan() is not None

    def is_ready(self, round_index: int) -> bool:
        """Whether the plan of a round that has an adapter is there as well; sizes that change have one every round."""
        tries = METHODS[self.config.method].trials and round_index > 1
        return not tries or self.store.exists(self.keys.joined_plan(round_index))

    def begin_round(self, round_index: int) -> None:
        """Take over the plan that holds in a round, where sizes change: one of other ranks takes another instance."""
        if not METHODS[self.config.method].trials:
            return
        known = self.__dict__.pop("federation_plan", None)
        later = [key for key in self.store.list(self.keys.joined_plans) if int(PurePosixPath(key).stem) <= round_index]
        plan = self._find_plan([*reversed(later), self.keys.plan])
        if plan is None or known is None or plan.edges[self.edge_id].ranks != known.edges[self.edge_id].ranks:
            self.__dict__.pop("design", None)
            self.peak_memory_bytes = None
        if plan is not None:
            self.federation_plan = plan

    def _find_plan(self, keys: Sequence[str] = ()) -> FederationPlan | None:
        for key in keys or (self.keys.plan, *self.store.list(self.keys.joined_plans)):
            plan = get_shared_record(self.store, key, FederationPlan, self.config.coordinator_signs)
            if plan is not None and self.edge_id in plan.edges:
                return plan
        return None

    @property
    def plan(self) -> EdgePlan:
        """What this edge shall do."""
        return self.federation_plan.edges[self.edge_id]

    @functools.cached_property
    def data(self) -> EdgeData:
        """The edge's rows, split into training and validation."""
        examples = load_edge_examples(self.config, self.edge)
        salt = f"{self.config.name}/{self.edge_id}"
        training, validation = split_validation(examples, self.config.data.validation_fraction, self.config.seed)
        base, longest = self.profile_base, self.config.model.max_tokens
        found = EdgeData(
            train=tokenize(training, base.tokenizer, longest, base.vocabulary, self.config.training.learn_prompts),
            validation=tokenize(validation, base.tokenizer, longest, base.vocabulary),
            fingerprint=fingerprint(examples, salt),
        )
        if shortened := found.shortened:
            progress.note(f"{self.edge_id}: {shortened} at model.max_tokens {longest}")
        return found

    @functools.cached_property
    def limits(self) -> Limits:
        """What the edge may use: declared, or measured when first asked for, which is before a base is loaded."""
        declared, most = self.edge.resources, self.machine.memory_bytes or sys.maxsize
        if declared is not None:
            found = declared_limits(declared)
        else:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            found = Limits(free_memory_bytes(device), link_bytes_per_second(self.store, self.keys, self.edge_id))
        return replace(found, memory_bytes=min(found.memory_bytes, most))

    @functools.cached_property
    def profile_bits(self) -> int:
        """Width of the base on which the edge is profiled: dense, or the widest of the menu that its memory holds."""
        dense, limits = dense_bits(self.config), self.limits  # free memory is told before a base takes its part
        menu = (dense, *(bits for bits in self.config.model.bits if bits < dense))
        if len(menu) == 1:
            return dense
        shape = base_shape(self.config.model, self.config.data.labels)
        value_bytes = 2 if torch.cuda.is_available() else 4
        return probed_bits(shape, menu, self.config.planning.probe_rank, value_bytes, limits.memory_bytes)

    @property
    def profile_base(self) -> Base:
        """The base on which the edge is profiled."""
        return shared_base(self.config, self.profile_bits)

    @property
    def shape(self) -> ModelShape:
        """What the cost model needs to know of the base."""
        return model_shape(self.profile_base.model, self.config.data.labels)

    @functools.cached_property
    def design(self) -> ModelDesign:
        """What the edge's instance of the planned base carries."""
        rule = self.config.aggregation.rule
        cap = self.config.aggregation.rank_cap if aggregation_rules.has_frozen_tail(rule) else 0
        if rule == "flora_stack":
            cap += self.federation_plan.largest_rank  # all that was learned is frozen, so every module has a tail
        spec = InstanceSpec(
            ranks=dict(sorted(self.plan.ranks.items())),
            modules=tuple(self.federation_plan.planned_modules),
            tail_cap=cap,
            scaling=self.config.training.adapter_scaling,
            checkpointing=self.plan.checkpointing,
            frozen_right=rule == "ffa",
        )
        return ModelDesign(shared_base(self.config, self.plan.base_bits), METHODS[self.config.method].form, spec)

    def measure_memory(self, model: EdgeModel) -> int:
        """What a step on the edge's longest rows holds, in bytes; measured once."""
        if self.peak_memory_bytes is None:
            at_once = min(self.plan.batch_size, self.config.training.micro_batch_size or self.plan.batch_size)
            self.peak_memory_bytes = training_memory_bytes(model, probe_batch(self.data.train, at_once))
        return self.peak_memory_bytes

    @property
    def state(self) -> Path:
        """Folder of what never leaves the edge."""
        if self.machine.state is not None:
            return self.machine.state / self.keys.run / self.edge_id
        root = Path(self.store.root) if "://" not in self.store.root else Path(".fedpipe/store")
        return root.parent / "edges" / self.keys.run / self.edge_id


class StoppedError(BaseException):
    """Raised at work for a run that was interrupted or has ended; like KeyboardInterrupt, no edge's fault."""


def allow_training() -> None:
    """Take an earlier `stop_training` back: this process runs a federation again."""
    _stopping.clear()


def stop_training() -> None:
    """Make training in other threads end after its present step; updates not yet published are lost."""
    _stopping.set()


def check_not_stopped() -> None:
    """Raise StoppedError after `stop_training`."""
    if _stopping.is_set():
        raise StoppedError("the run was interrupted")


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
        reason = str(error) if isinstance(error, FedPipeError) else f"{type(error).__name__}: {error}"
        get_run_logger().warning("%s: no update in round %d: %s", edge_id, round_index, reason, exc_info=True)
        failure = FailureRecord(run=keys.run, round=round_index, edge_id=edge_id, reason=reason)
        offer_record(session.store, keys.failure(round_index, edge_id), failure)  # a coordinator that gave up was first
        progress.note(f"{edge_id} returns no update from round {round_index}: {reason}")


def link_bytes_per_second(store: ObjectStore, keys: RunKeys, edge_id: str) -> float:
    """Measure the link to the store by writing and reading one MiB."""
    key, data = f"{keys.profiles}/{edge_id}.link", bytes(LINK_PROBE_BYTES)
    started = time.perf_counter()
    store.put(key, data)
    store.get(key)
    seconds = time.perf_counter() - started
    store.delete(key)
    return 2 * LINK_PROBE_BYTES / seconds


def read_global(
    store: ObjectStore, keys: RunKeys, round_index: int, signed_by: str | None = None
) -> tuple[GlobalRecord, Adapter]:
    """The adapter a round starts from. Raises IntegrityError when it is missing or not what its record says."""
    record = get_record(store, keys.global_record(round_index), GlobalRecord, signed_by)
    if record is None:
        raise IntegrityError(f"store {store.root}: {keys.global_record(round_index)} is missing; resume the run")
    return record, decode_adapter(get_data(store, record.adapter))


def edge_start(config: FederationConfig, plan: EdgePlan, adapter: Adapter, round_index: int) -> EdgeStart:
    """What an edge trains in a round and its frozen tail; the coordinator computes the same from the same adapter."""
    split = aggregation_rules.edge_start(config.aggregation.rule)
    return split(adapter, plan.ranks, derive_seed(config.seed, "start", round_index))


def _train_and_publish(session: EdgeSession, round_index: int) -> UpdateRecord:
    torch.set_num_threads(session.machine.threads)
    session.begin_round(round_index)
    config, keys, plan = session.config, session.keys, session.plan
    started, started_at = time.perf_counter(), time.time()
    record, adapter = read_global(session.store, keys, round_index, config.coordinator_signs)
    read_seconds = time.perf_counter() - started
    start, tail = edge_start(config, plan, adapter, round_index)
    with lent_model(session.design) as model:
        load_adapter(model, start, tail)
        with progress.working(session.edge_id, f"train round {round_index}", plan.local_steps) as advance:
            metrics = _validate(session, model)
            report = _train(session, model, round_index, advance)
            trained_metrics = _validate(session, model) if plan.trial else {}
        trained, peak_memory_bytes = read_adapter(model), session.measure_memory(model)
    data, encoded = _encode(session, round_index, start, trained), time.perf_counter()
    if session.store.exists(keys.update_record(round_index, session.edge_id)):  # it vouches for the data that is there
        raise UpdateRefusedError(f"{session.edge_id}: another process of this edge answered round {round_index} first")
    published = put_data(session.store, keys.update_data(round_index, session.edge_id), data)
    finished = time.perf_counter()
    update = UpdateRecord(
        run=keys.run,
        round=round_index,
        edge_id=session.edge_id,
        base_sha256=shared_base(config, plan.base_bits).sha256,
        global_sha256=record.adapter.sha256,
        adapter=published,
        num_examples=len(session.data.train),
        examples_processed=report.examples_processed,
        steps=report.steps,
        train_loss=report.loss,
        train_seconds=report.seconds,
        round_seconds=finished - started,
        transfer_seconds=read_seconds + finished - encoded,
        started_at=started_at,
        peak_memory_bytes=peak_memory_bytes,
        download_bytes=record.adapter.size_bytes,
        metrics=metrics,
        trained_metrics=trained_metrics,
    )
    put_record(session.store, keys.update_record(round_index, session.edge_id), update, session.machine.signing_key)
    return update


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
