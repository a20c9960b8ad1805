"""What `evidence` runs: a task's file, the settings of the protocol, and the config that a case comes to.

Another model or data set is one more file in `benchmarks/evidence_tasks`, beside a federation's config.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from federations import FOLDER
from planning_variants import FEDLORA, FEDPIPE, VARIANTS

from fedpipe_core.config import FederationConfig
from fedpipe_core.config_file import load_config

TASKS = FOLDER / "evidence_tasks"
HOMOGENEOUS, HETEROGENEOUS = "homogeneous", "heterogeneous"
SETTINGS = (HETEROGENEOUS, HOMOGENEOUS)
REFERENCE = "reference"  # homogeneous edges that get the whole time, as heterogeneous ones: where the target comes from
TARGET_SHARE = 0.95
SEEDS = 3
FEDADAPTER, FULL = "fedadapter", "full"
TUNED = "domain"  # the partition whose runs choose a method's rate in a setting
# FedPipe sends updates and global adapter in 4 bits; edges that would wait make up to four times the steps; and an edge
# that does not train a module votes for leaving it, as the planner's discount for what few edges train assumes.
OURS: dict[str, Any] = {
    **VARIANTS[FEDPIPE],
    "aggregation.weighting": "all",
    "exchange.dtype": "nf4",
    "exchange.global_dtype": "nf4",
    "planning.overtime": 4.0,
}
METHODS: dict[str, dict[str, Any]] = {
    FEDPIPE: OURS,
    FEDLORA: VARIANTS[FEDLORA],
    FEDADAPTER: {"method": "fedadapter"},
    FULL: {"method": "full"},
}
UNMEASURED = ("random weights", "last layers", "uniform importance")  # ways to choose weights that look at none
RULES = ("fedavg", "hetlora", "rankwise", "flexlora", "ffa", "raflora", "flora_stack")
ABLATIONS: dict[str, dict[str, Any]] = {
    **{name: {**OURS, **changes} for name, changes in VARIANTS.items() if name not in METHODS},
    **{f"rule {rule}": {**OURS, "aggregation.rule": rule} for rule in RULES},
    "same rate at every edge": {**OURS, "training.rate_steps": None},
    "no overtime": {**OURS, "planning.overtime": 1.0},
    "modules weighed by who trains them": {**OURS, "aggregation.weighting": "trained"},
    "global adapter in 8 bits": {**OURS, "exchange.global_dtype": "int8"},
    "16 bits on the wire": {**OURS, "exchange.dtype": "bf16", "exchange.global_dtype": "bf16"},
    "fedlora, 4 bits on the wire": {**VARIANTS[FEDLORA], "exchange.dtype": "nf4", "exchange.global_dtype": "nf4"},
}


@dataclass(frozen=True)
class Fleet:
    """Five edges: how many times slower than a core, their links in Mbit/s, whose memory of the task's, and their time.

    Edges that are all as fast as the fastest get a quarter of the time.
    """

    speeds: tuple[float, ...]
    mbit: tuple[float, ...]
    memory: str
    share_of_budget: float


_EQUAL = Fleet((1.0,) * 5, (100.0,) * 5, HOMOGENEOUS, 0.25)
FLEETS = {
    HOMOGENEOUS: _EQUAL,
    HETEROGENEOUS: Fleet((1.0, 1.0, 2.0, 4.0, 8.0), (200.0, 100.0, 50.0, 20.0, 10.0), HETEROGENEOUS, 1.0),
    REFERENCE: replace(_EQUAL, share_of_budget=1.0),
}


@dataclass(frozen=True)
class Task:
    """What the protocol leaves to a model and a data set.

    `changes` are dotted keys of the federation's config, `fedpipe_changes` those of FedPipe alone. `also` is a metric
    that is shown beside the one that counts. Rates ascend; a partition is named `domain`, by which they are chosen.
    """

    name: str
    federation: Path
    metric: str
    higher_is_better: bool
    budget_seconds: float
    rates: Sequence[float]
    memory_gib: Mapping[str, list[float]]
    partitions: Mapping[str, dict[str, Any]]
    values: list[list[str]]
    changes: Mapping[str, Any]
    fedpipe_changes: Mapping[str, Any]
    also: str | None = None

    def budget(self, setting: str) -> float:
        """Simulated seconds that every method gets in a setting."""
        return self.budget_seconds * FLEETS[setting].share_of_budget

    def target(self, full: float) -> float:
        """The value to be reached, from what full fine-tuning ends with on edges that all hold it."""
        return full * TARGET_SHARE if self.higher_is_better else full / TARGET_SHARE

    def reached(self, value: float, target: float) -> bool:
        """Whether a value is as good as the target."""
        return value >= target if self.higher_is_better else value <= target


@dataclass(frozen=True)
class Case:
    """One run: who trains what, on which edges, with which seed and peak rate."""

    setting: str
    partition: str
    method: str
    rate: float
    seed: int = 0
    slowest: float = 8.0  # of heterogeneous edges, times slower than a core
    edges: int = 5

    @property
    def name(self) -> str:
        """Under which the run is kept."""
        spread = f"/{self.slowest:g}x" if self.slowest != 8.0 else ""
        count = f"/{self.edges} edges" if self.edges != 5 else ""
        return f"{self.setting}{spread}{count}/{self.partition}/{self.method}/rate {self.rate:g}/seed {self.seed}"


def read_task(name: str) -> Task:
    """The task of that name, or in that file."""
    path = Path(name) if name.endswith(".yaml") else TASKS / f"{name}.yaml"
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    if TUNED not in document["partitions"]:
        raise ValueError(f"{path}: partitions lacks `{TUNED}`, by which every method's rate is chosen; add it")
    document["federation"] = (path.parent / document["federation"]).resolve()
    return Task(name=path.stem, **{"fedpipe_changes": {}} | document)


def slowdowns(case: Case) -> dict[str, float]:
    """How many times slower than a core every edge is: the middle ones spaced evenly up to the slowest."""
    speeds = FLEETS[case.setting].speeds
    if case.setting == HETEROGENEOUS:
        speeds = (1.0, 1.0, case.slowest ** (1 / 3), case.slowest ** (2 / 3), case.slowest)
    return {f"edge-{index + 1:02d}": speeds[index % 5] for index in range(case.edges)}


def make_config(task: Task, case: Case) -> FederationConfig:
    """The config of a case."""
    fleet = FLEETS[case.setting]
    by_column = task.partitions[case.partition]["by"] == "column"
    edges = [
        {
            "edge_id": edge_id,
            **({"values": task.values[index % 5]} if by_column else {}),
            "resources": {
                "memory_gib": task.memory_gib[fleet.memory][index % 5],
                "bandwidth_mbit": fleet.mbit[index % 5],
                "tokens_per_second": 1000 / slowdown,
            },
        }
        for index, (edge_id, slowdown) in enumerate(slowdowns(case).items())
    ]
    chosen = (METHODS | ABLATIONS)[case.method]
    document = {
        "seed": case.seed,
        "data.partition": task.partitions[case.partition],
        "edges": edges,
        **task.changes,
        "training.learning_rate": case.rate,
        **(task.fedpipe_changes if chosen.get("method", FEDPIPE) == FEDPIPE else {}),
        **chosen,
    }
    return load_config(task.federation, [f"{key}={json.dumps(value)}" for key, value in document.items()])
