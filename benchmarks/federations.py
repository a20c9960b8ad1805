"""Federations that benchmarks run: all in one process, through the tasks of a deployed one, so bytes are the store's.

Plans are the edges' pins, so there is no profile, no planner, no Prefect server and no release; a base is loaded once.
Edges train as many at once as there are cores, one torch thread each. Results are kept as JSON run by run: a benchmark
that was killed goes on with the runs that are missing, and one that is started again only prints.
"""

import hashlib
import json
import os
import platform
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from prefect.logging import disable_run_logger
from torch import Tensor

from fedpipe_core.adapters import Adapter
from fedpipe_core.config import EdgeSpec, FederationConfig
from fedpipe_core.config_file import load_config
from fedpipe_core.evaluation import metrics_of
from fedpipe_core.low_rank import LowRank, truncate
from fedpipe_core.plan_schemas import EdgePlan, FederationPlan, PredictedCost, SavedPlan
from fedpipe_core.profiling import EdgeData
from fedpipe_core.schemas import UpdateRecord
from fedpipe_core.tokenizing import TokenizedExamples
from fedpipe_core.wire_updates import decode_update, encode_update
from tasks import edge, federation
from tasks.coordinator import Coordinator
from tasks.edge import EdgeSession
from tasks.records import RunKeys, get_data, get_record, put_data, put_record
from tasks.storage import open_store

FOLDER = Path(__file__).parent
INTENTS = FOLDER.parent / "examples" / "intents" / "federation.yaml"
IMAGES = FOLDER.parent / "docs" / "images"
RESOURCES = {"memory_gib": 4.0, "tokens_per_second": 3000, "bandwidth_mbit": 100}
# Matrices of MiniLM's upper half: gradients need not flow to the lower one, which saves a third of the time.
BLOCKS = (3, 4, 5)
MATRICES = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
MODULES = [f"bert.encoder.layer.{block}.{matrix}" for block in BLOCKS for matrix in MATRICES]
# The commit whose code this process runs; the checkout may have moved on when a run is kept.
COMMIT = subprocess.run(
    ["git", "rev-parse", "HEAD"], cwd=FOLDER, capture_output=True, text=True, check=False
).stdout.strip()

Run = dict[str, Any]
_HELD_OUT: list[TokenizedExamples] = []
_ROWS: dict[str, EdgeData] = {}


@dataclass(frozen=True)
class Attack:
    """What an edge sends in place of the change of each of its tensors, in every round; None when it sends nothing."""

    edge_id: str
    change: Callable[[Tensor], Tensor] | None


@dataclass(frozen=True)
class Size:
    """How much an edge trains, and on how many held-out rows every round is judged."""

    rounds: int = 5
    local_steps: int = 8
    batch_size: int = 12
    judged: int = 240

    def pin(self, rank: int, bits: int = 32) -> dict[str, Any]:
        """An edge's whole plan, with one rank for all modules."""
        ranks = dict.fromkeys(MODULES, rank)
        return {"ranks": ranks, "base_bits": bits, "batch_size": self.batch_size, "local_steps": self.local_steps}


QUICK = Size(rounds=2, local_steps=2, batch_size=4, judged=40)


def intents(size: Size, edges: Sequence[Mapping[str, Any]], changes: Mapping[str, Any]) -> FederationConfig:
    """The federation of examples/intents (CLINC150, MiniLM) with other edges and other values of dotted keys."""
    document = {
        "rounds": size.rounds,
        "evaluation.examples_per_round": size.judged,
        "data.validation_fraction": 0.0,
        "model.bits": [32, 8, 4],
        "edges": [{"resources": RESOURCES, **spec} for spec in edges],
        "training.learning_rate": 0.006,
        "training.head_rate_factor": 3,
        **changes,
    }
    return load_config(INTENTS, [f"{key}={json.dumps(value)}" for key, value in document.items()])


class Results:
    """Runs by name, kept in a JSON file; without a file they are forgotten."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._runs: dict[str, Run] = json.loads(path.read_text()) if path and path.is_file() else {}

    def run(self, name: str, config: FederationConfig, attack: Attack | None = None) -> Run:
        """The run of that name as it is kept, or else run now; one kept of another config is run again."""
        return self.kept(name, config_hash(config), lambda: run_federation(config, attack))

    def kept(self, name: str, config_sha256: str, make: Callable[[], Run]) -> Run:
        """The run of that name and config as it is kept, or else made now."""
        known = self._runs.get(name)
        if known is None or known["config_sha256"] != config_sha256:
            known = {"config_sha256": config_sha256, **make()}
            self._runs[name] = known
            self._save()
        return known

    def _save(self) -> None:
        if self._path:
            self._path.parent.mkdir(exist_ok=True)
            rows = (f" {json.dumps(name)}: {json.dumps(run)}" for name, run in sorted(self._runs.items()))
            self._path.write_text("{\n" + ",\n".join(rows) + "\n}\n")


def results_of(benchmark: str, quick: bool) -> Results:
    """What is kept of a benchmark; quick runs are not."""
    return Results(None if quick else FOLDER / "results" / f"{benchmark}.json")


def config_hash(config: FederationConfig) -> str:
    """Hash of what a config sets, without the folders it was read in and without what is left at its default."""
    document = config.model_dump(mode="json", exclude_defaults=True)
    document["data"] |= {key: Path(document["data"][key]).name for key in ("train", "test")}
    document["model"]["base"] = Path(document["model"]["base"]).name
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def run_federation(config: FederationConfig, attack: Attack | None = None) -> Run:
    """All rounds of a federation whose edges are wholly pinned: per round metrics, bytes, drops, ranks and energy."""
    warnings.filterwarnings("ignore", module="torch.jit")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, disable_run_logger():
        config = config.model_copy(update={"store": f"{folder}/store"})
        coordinator = Coordinator(config, open_store(config.store), RunKeys("run"))
        federation.open_federation(config, coordinator.store, coordinator.keys, resume=False)
        plan = pinned_plan(config)
        federation.adopt_plan(coordinator, SavedPlan(plan=plan, profiles={}))
        federation.publish_first_adapter.fn(coordinator, plan)
        coordinator.held_out = _held_out(coordinator)
        sessions = [_session(coordinator, spec) for spec in config.edges]
        rounds = [_round(coordinator, sessions, plan, index + 1, attack) for index in range(config.rounds)]
    return {
        "commit": COMMIT,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "seed": config.seed,
        "seconds": round(time.perf_counter() - started, 1),
        "rounds": rounds,
    }


def _held_out(coordinator: Coordinator) -> TokenizedExamples:
    """The held-out rows, the same in all federations of a process."""
    if not _HELD_OUT:
        _HELD_OUT.append(coordinator.held_out)
    return _HELD_OUT[0]


def _session(coordinator: Coordinator, spec: EdgeSpec) -> EdgeSession:
    """An edge with its rows; those that other federations dealt to the same edge in the same way are read once."""
    session = EdgeSession(coordinator.config, spec, coordinator.store, coordinator.keys)
    key = f"{coordinator.config.data} {coordinator.config.seed} {spec.edge_id} {spec.values}"
    if key not in _ROWS:
        _ROWS[key] = session.data
    session.data = _ROWS[key]
    session.peak_memory_bytes = 0  # not what these benchmarks look at
    return session


def pinned_plan(config: FederationConfig) -> FederationPlan:
    """The plan that the edges' pins are."""
    nothing = PredictedCost(peak_memory_bytes=0, round_seconds=0, upload_bytes=0, download_bytes=0)
    plans = {
        spec.edge_id: EdgePlan.model_validate(
            {"edge_id": spec.edge_id, "predicted": nothing, "binding": "pin", **spec.pin.model_dump()}
        )
        for spec in config.edges
    }
    return FederationPlan(round_seconds=1.0, solver="pins", edges=plans)


def _round(
    coordinator: Coordinator,
    sessions: Sequence[EdgeSession],
    plan: FederationPlan,
    round_index: int,
    attack: Attack | None,
) -> Run:
    started = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(lambda session: edge.train_round.fn(session, round_index), sessions))
    if attack:
        _tamper(coordinator, plan, round_index, attack)
    trained = time.perf_counter()
    made = federation.aggregate_round.fn(coordinator, plan, round_index)
    aggregated = time.perf_counter()
    _, adapter = edge.read_global(coordinator.store, coordinator.keys, round_index + 1)
    metrics = metrics_of(federation.evaluate.fn(coordinator, round_index + 1, whole=False))
    updates = federation.round_updates(coordinator, round_index)
    smallest = min(rank for edge_plan in plan.edges.values() for rank in edge_plan.ranks.values())
    return {
        **{name: round(value, 5) for name, value in metrics.items()},
        "upload_bytes": sum(update.adapter.size_bytes for update in updates.values()),
        "download_bytes": sum(update.download_bytes for update in updates.values()),
        "train_loss": {edge_id: round(update.train_loss, 4) for edge_id, update in updates.items()},
        "train_seconds": round(trained - started, 2),
        "aggregate_seconds": round(aggregated - trained, 2),
        "dropped": made.dropped,
        "largest_rank": max(made.ranks.values()),
        "energy_beyond_smallest_rank": round(energy_beyond(adapter, smallest), 5),
        "adapter_sha256": made.adapter.sha256,
    }


def energy_beyond(adapter: Adapter, rank: int) -> float:
    """Share of Σσ² over all modules that lies beyond each module's first `rank` singular directions."""
    cut = sum(truncate(factors, 1.0, rank)[1] ** 2 for factors in adapter.factors.values())
    return cut / (sum(factors.norm() ** 2 for factors in adapter.factors.values()) or 1.0)


def _tamper(coordinator: Coordinator, plan: FederationPlan, round_index: int, attack: Attack) -> None:
    """Replace an edge's update, as it lies in the store, by what the attack makes of it."""
    store, key = coordinator.store, coordinator.keys.update_record(round_index, attack.edge_id)
    record = get_record(store, key, UpdateRecord)
    assert record is not None
    store.delete(key)
    if attack.change is None:
        return
    _, previous = edge.read_global(store, coordinator.keys, round_index)
    start, _ = edge.edge_start(coordinator.config, plan.edges[attack.edge_id], previous, round_index)
    trained = decode_update(get_data(store, record.adapter), start)
    sent, _ = encode_update(_attacked(start, trained, attack.change), start, coordinator.config.exchange.dtype)
    reference = put_data(store, record.adapter.key, sent)
    put_record(store, key, record.model_copy(update={"adapter": reference}))


def _attacked(start: Adapter, trained: Adapter, change: Callable[[Tensor], Tensor]) -> Adapter:
    def moved(begin: Tensor, end: Tensor) -> Tensor:
        return begin + change(end - begin)

    factors = {
        module: LowRank(moved(start.factors[module].B, found.B), moved(start.factors[module].A, found.A))
        for module, found in trained.factors.items()
    }
    return Adapter(factors, {name: moved(value, trained.head[name]) for name, value in start.head.items()})
