"""What a Llama of 8 B parameters on 100 and on 10,000 edges would take: plan, round, coordinator, store, money.

Run `python benchmarks/projection.py [--json] [--edges N ...] [--rounds N]`. Nothing is trained: plans and seconds are
the cost model's, which `costs.py` and `gpu.py` hold against measurements. The speed of an H100 is the one `gpu.py`
measured; other GPUs are taken to be slower as their vendors' dense 16-bit rates are. Only the planner and the
aggregation of a matrix are timed, here, on one core. A fleet has the same shares of every GPU at every size, so one
plan of 100 edges stands for all sizes; each edge's rows, link and importance are drawn by seed.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import median
from typing import Any

import numpy as np
import torch
from aggregation import Case, make_round
from common import finish, markdown_table, parser
from federations import FOLDER
from planning import make_edge
from random_llama import EIGHT_B

from fedpipe_core.aggregation import aggregate
from fedpipe_core.config import AggregationSpec, FederationConfig
from fedpipe_core.config_remote import RemoteSpec
from fedpipe_core.plan_schemas import FederationPlan
from fedpipe_core.planning import plan_federation
from fedpipe_core.profile_schemas import EdgeProfile, ModelShape, ModuleShape
from tasks.leases import BEATS_PER_LEASE
from tasks.storage import MULTIPART_BYTES

GIB, MIB = 2**30, 2**20
PLANNED, SIZES, ROUNDS = 100, (100, 10_000), 50
TOKENS, LEFT_FOR_OTHERS_GIB = 512, 1.0  # of a row; of a GPU's memory, for its driver and libraries
# Assumed list prices in dollars: per 1,000 requests, and per GiB that leaves the store's region.
PUT_PRICE, GET_PRICE, EGRESS_PRICE = 0.005, 0.0004, 0.09
COORDINATOR_MBIT = 10_000


@dataclass(frozen=True)
class Gpu:
    """A kind of edge: its share of the fleet, memory, speed beside an H100, and dollars an hour (assumed)."""

    name: str
    percent: int
    memory_gib: float
    speed: float
    hourly_price: float


FLEET = (
    Gpu("H100 80 GB", 5, 80, 1.0, 3.0),
    Gpu("A100 80 GB", 5, 80, 0.32, 1.6),
    Gpu("L40S 48 GB", 10, 48, 0.37, 1.0),
    Gpu("A100 40 GB", 10, 40, 0.32, 1.3),
    Gpu("RTX 4090 24 GB", 20, 24, 0.17, 0.4),
    Gpu("L4 24 GB", 15, 24, 0.12, 0.5),
    Gpu("RTX 4080 16 GB", 15, 16, 0.10, 0.3),
    Gpu("T4 16 GB", 10, 16, 0.066, 0.3),
    Gpu("RTX 3060 12 GB", 5, 12, 0.026, 0.1),
    Gpu("RTX 4060 8 GB", 5, 8, 0.030, 0.1),
)
LINKS_MBIT = (10, 30, 100, 300, 1000)


def llama_8b() -> ModelShape:
    """Llama 3.1 8B, all seven projections of its 32 blocks."""
    hidden, inner = EIGHT_B.hidden_size, EIGHT_B.intermediate_size
    keys = hidden * EIGHT_B.num_key_value_heads // EIGHT_B.num_attention_heads
    sizes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
    }
    sizes |= {"self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden)}
    sizes |= {"mlp.down_proj": (hidden, inner)}
    modules = {
        f"model.layers.{layer}.{name}": ModuleShape(out_features=out, in_features=into, layer=layer)
        for layer, (name, (out, into)) in product(range(EIGHT_B.num_hidden_layers), sizes.items())
    }
    return ModelShape(
        modules=modules,
        linear_parameters=sum(module.out_features * module.in_features for module in modules.values()),
        other_parameters=2 * EIGHT_B.vocab_size * hidden + (2 * EIGHT_B.num_hidden_layers + 1) * hidden,
        head_parameters=0,
        output_features=EIGHT_B.vocab_size,
        scored_positions="token",
        hidden_features=hidden,
    )


def fleet(shape: ModelShape) -> dict[str, tuple[Gpu, EdgeProfile]]:
    """The 100 edges that are planned, by name."""
    rng, edges = np.random.default_rng(0), dict[str, tuple[Gpu, EdgeProfile]]()
    measured = json.loads((FOLDER / "results" / "gpu.json").read_text())["tokens_per_second"]
    for gpu in FLEET:
        for _ in range(gpu.percent * PLANNED // 100):
            edge_id = f"edge-{len(edges):03}"
            profile = make_edge(
                shape,
                edge_id,
                rng,
                tokens_per_second=measured * gpu.speed,
                memory_gib=gpu.memory_gib - LEFT_FOR_OTHERS_GIB,
                tokens=TOKENS,
                examples=int(rng.integers(500, 4000)),
                value_bytes=2,
            )
            link = float(rng.choice(LINKS_MBIT)) * 1e6 / 8
            edges[edge_id] = gpu, profile.model_copy(update={"bandwidth_bytes_per_second": link})
    return edges


def make_config(profiles: Mapping[str, EdgeProfile], rounds: int) -> FederationConfig:
    """The part of a config that planning reads."""
    return FederationConfig.model_validate(
        {
            "name": "projection",
            "rounds": rounds,
            "model": {"base": "unused", "task": "causal-lm", "bits": (4, 8, 16), "max_tokens": 2 * TOKENS},
            "data": {"train": "{edge_id}.jsonl", "test": "unused", "format": "completion"},
            "training": {"examples_per_round": 256},
            "edges": [{"edge_id": edge_id} for edge_id in profiles],
            "planning": {
                "ranks": (4, 8, 16, 32),
                "batch_sizes": (1, 2, 4, 8, 16),
                "parameter_price": 0.3,
                "unfit_edges": "drop",
            },
            "aggregation": {"rank_cap": 32},
        }
    )


def class_rows(edges: Mapping[str, tuple[Gpu, EdgeProfile]], plan: FederationPlan) -> list[list[str]]:
    """What every kind of edge is asked to do: medians."""
    rows = []
    for gpu in FLEET:
        plans = [plan.edges[edge_id] for edge_id, (kind, _) in edges.items() if kind is gpu and edge_id in plan.edges]
        if not plans:
            rows.append([gpu.name, str(gpu.percent), "does not fit", *[""] * 8])
            continue
        middle = sorted(plans, key=lambda found: found.predicted.round_seconds)[len(plans) // 2]
        cells = [
            gpu.name,
            str(gpu.percent),
            f"{len(middle.ranks)}, {sum(middle.ranks.values())}",
            f"{middle.local_steps} × {middle.batch_size}",
            str(middle.base_bits),
            "yes" if middle.checkpointing else "no",
            f"{median(p.predicted.peak_memory_bytes for p in plans) / GIB:.1f}",
            f"{median(p.predicted.round_seconds for p in plans):.0f}",
            f"{median(p.predicted.upload_bytes for p in plans) / MIB:.0f}",
            f"{median(p.under_training for p in plans):.0%}",
            middle.binding,
        ]
        rows.append(cells)
    return rows


def aggregation_seconds(shape: ModelShape, plan: FederationPlan) -> float:
    """Seconds of one core for one edge in a round: those of a square matrix of all edges, told by the feature."""
    case = Case(width=EIGHT_B.hidden_size, edges=PLANNED, sample=1)
    previous, updates = make_round(case, shared_right=False)
    torch.set_num_threads(1)
    started = time.thread_time()
    aggregate(previous, updates, AggregationSpec(rank_cap=32))
    each = (time.thread_time() - started) / PLANNED / (2 * case.width)
    features = [sum(shape.modules[name].features for name in found.ranks) for found in plan.edges.values()]
    return each * sum(features) / PLANNED


@dataclass(frozen=True)
class Traffic:
    """Of the whole fleet in one round."""

    puts: float
    gets: float
    up_gib: float
    down_gib: float

    @property
    def dollars(self) -> float:
        """Requests, and what leaves the store for the edges; the coordinator reads within the region."""
        return self.puts / 1000 * PUT_PRICE + self.gets / 1000 * GET_PRICE + self.down_gib * EGRESS_PRICE


def traffic(plan: FederationPlan, edges: int, remote: RemoteSpec) -> Traffic:
    """Requests as the round protocol makes them, and bytes as planned.

    An edge renews its lease and looks at the coordinator's and its own; when done it looks for the next round. The
    coordinator reads every lease as often. An update and a global adapter are an object, in parts, and its record.
    """
    beat_seconds, pause_seconds = remote.lease_seconds / BEATS_PER_LEASE, 0.75 * remote.poll_seconds
    puts = gets = up = down = 0.0
    for found in plan.edges.values():
        predicted = found.predicted
        beats = plan.round_seconds / beat_seconds
        idle_seconds = max(0.0, plan.round_seconds - predicted.round_seconds)
        puts += beats + 1 + -(-predicted.upload_bytes // MULTIPART_BYTES)
        gets += 3 * beats + idle_seconds / pause_seconds + 2
        gets += sum(-(-size // MULTIPART_BYTES) for size in (predicted.upload_bytes, predicted.download_bytes))
        up, down = up + predicted.upload_bytes, down + predicted.download_bytes
    scale = edges / PLANNED
    looks = plan.round_seconds / pause_seconds * max(1, edges // 1000)  # a listing has up to 1,000 keys
    return Traffic(puts * scale, gets * scale + looks, up * scale / GIB, down * scale / GIB)


def size_row(edges: int, plan: FederationPlan, each_seconds: float, rounds: int, gpu_dollars: float) -> list[str]:
    """A fleet of that many edges."""
    found = traffic(plan, edges, RemoteSpec())
    patient = traffic(plan, edges, RemoteSpec(poll_seconds=15, lease_seconds=240))
    compute = each_seconds * edges
    reading = found.up_gib * GIB * 8 / (COORDINATOR_MBIT * 1e6)
    return [
        f"{edges:,}",
        f"{plan.round_seconds / 60:.1f}",
        f"{compute:,.0f}",
        f"{reading:,.0f}",
        f"{found.up_gib:,.0f}",
        f"{found.down_gib:,.0f}",
        f"{found.puts / 1e3:,.0f}, {found.gets / 1e3:,.0f}",
        f"{patient.puts / 1e3:,.0f}, {patient.gets / 1e3:,.0f}",
        f"{rounds * found.dollars:,.0f}",
        f"{rounds * patient.dollars:,.0f}",
        f"{rounds * plan.round_seconds / 3600 * gpu_dollars * edges / PLANNED:,.0f}",
    ]


def report(sizes: Sequence[int], rounds: int) -> tuple[str, dict[str, Any]]:
    """The tables, and what they hold."""
    shape = llama_8b()
    edges = fleet(shape)
    profiles = {edge_id: profile for edge_id, (_, profile) in edges.items()}
    started = time.thread_time()
    plan = plan_federation(shape, profiles, make_config(profiles, rounds))
    planning_seconds = time.thread_time() - started
    each_seconds = aggregation_seconds(shape, plan)
    gpu_dollars = sum(gpu.hourly_price for edge_id, (gpu, _) in edges.items() if edge_id in plan.edges)
    head = ["GPU", "% of edges", "modules, Σ ranks", "steps × batch", "bits", "recompute", "peak GiB", "s a round"]
    kinds = [[*head, "MiB up", "left over", "binds"], class_rows(edges, plan)]
    head = ["edges", "min a round", "core-s to aggregate", "s to read", "GiB up", "GiB down", "1,000 PUTs, GETs"]
    sums = [[*head, "the same, patient", "store, $", "patient, $", "GPUs, $"]]
    sums.append([size_row(count, plan, each_seconds, rounds, gpu_dollars) for count in sizes])  # type: ignore[arg-type]
    note = f"Planned in {planning_seconds:.0f} s of one core for {PLANNED} edges, of which {len(plan.edges)} fit."
    text = "\n\n".join([markdown_table(*kinds), note, markdown_table(*sums)])  # type: ignore[arg-type]
    document = {"planning_seconds": planning_seconds, "aggregation_seconds_per_edge": each_seconds, "rounds": rounds}
    return text, {**document, "kinds": kinds, "sizes": sums, "plan_seconds": plan.round_seconds}


def main() -> None:
    """Print the projection."""
    arguments = parser(__doc__)
    arguments.add_argument("--edges", type=int, nargs="+", default=SIZES, help="sizes of the fleet")
    arguments.add_argument("--rounds", type=int, default=ROUNDS, help="rounds that money is told for")
    options = arguments.parse_args()
    text, document = report(options.edges, options.rounds)
    finish(options.json, document, [], text)


if __name__ == "__main__":
    main()
