"""What an edge keeps warm between rounds, and how its work is ended between two steps.

Sessions in one process share one base per bit width (`bases`) and lend each other instances of it (`edge_models`).
"""

import functools
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import torch

from fedpipe_core import aggregation_rules
from fedpipe_core.architecture import model_shape
from fedpipe_core.config import EdgeSpec, FederationConfig
from fedpipe_core.costs import probed_bits
from fedpipe_core.data import fingerprint
from fedpipe_core.edge_model import EdgeModel
from fedpipe_core.errors import IntegrityError
from fedpipe_core.evaluation import WritingTask, writing_task
from fedpipe_core.forms import InstanceSpec
from fedpipe_core.free_memory import free_memory_bytes
from fedpipe_core.memory import training_memory_bytes
from fedpipe_core.methods import METHODS
from fedpipe_core.model import Base, base_shape
from fedpipe_core.partition import load_split_examples
from fedpipe_core.plan_schemas import EdgePlan, FederationPlan
from fedpipe_core.profile_schemas import ModelShape
from fedpipe_core.profiling import EdgeData, Limits, declared_limits, probe_batch
from fedpipe_core.signatures import SigningKey
from fedpipe_core.tokenizing import tokenize
from tasks import progress
from tasks.bases import dense_bits, shared_base
from tasks.edge_models import ModelDesign
from tasks.records import RunKeys, get_shared_record
from tasks.storage import ObjectStore

_stopping = threading.Event()
LINK_PROBE_BYTES = 2**20


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
        salt = f"{self.config.name}/{self.edge_id}"
        training, validation = load_split_examples(self.config, self.edge)
        base, longest = self.profile_base, self.config.model.max_tokens
        found = EdgeData(
            train=tokenize(training, base.tokenizer, longest, base.vocabulary, self.config.training.learn_prompts),
            validation=tokenize(validation, base.tokenizer, longest, base.vocabulary),
            fingerprint=fingerprint([training, validation], salt),
        )
        if shortened := found.shortened:
            progress.note(f"{self.edge_id}: {shortened} at model.max_tokens {longest}")
        return found

    @functools.cached_property
    def writing(self) -> WritingTask | None:
        """The prompts of the validation rows that a judged model continues, where the config asks for it."""
        if self.config.evaluation.generate is None:
            return None
        _, validation = load_split_examples(self.config, self.edge)
        return writing_task(validation, self.config, self.profile_base.tokenizer)

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


def link_bytes_per_second(store: ObjectStore, keys: RunKeys, edge_id: str) -> float:
    """Measure the link to the store by writing and reading one MiB."""
    key, data = f"{keys.profiles}/{edge_id}.link", bytes(LINK_PROBE_BYTES)
    started = time.perf_counter()
    store.put(key, data)
    store.get(key)
    seconds = time.perf_counter() - started
    store.delete(key)
    return 2 * LINK_PROBE_BYTES / seconds
