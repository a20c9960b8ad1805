"""How fast and how close to the optimum the planner plans, and whether edges finish together.

Run `python benchmarks/planning.py [--json] [--edges N]`. The large case is a Llama-like model of 128 modules, 7 ranks
and 18 (batch, bits) cells, planned on one core; gaps are shares of a plan's utility, bounded by weak duality for every
edge. The small case throttles one of five MiniLM-like edges four times and shows the uniform plan beside the planner's.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from common import at_most, finish, markdown_table, parser

from fedpipe_core.config import FederationConfig
from fedpipe_core.costs import predict
from fedpipe_core.planning import plan_federation, prepare_edges, round_terms
from fedpipe_core.planning_greedy import solve_greedily
from fedpipe_core.planning_selection import PreparedEdge
from fedpipe_core.planning_solver import refine
from fedpipe_core.profile_schemas import ActivationCost, EdgeProfile, ModelShape, ModuleShape, StepCost

GIB = 2**30
MOST_SECONDS = 30.0
MOST_GAP = 0.01
MOST_SPREAD = 0.25


@dataclass(frozen=True)
class Gaps:
    """How far from the optimum plans can be at most, as shares of their utility, over all edges."""

    plans: str
    mean: float
    median: float
    largest: float


def large_model() -> ModelShape:
    """The attention matrices of a Llama with 7 billion parameters."""
    modules = {
        f"model.layers.{layer}.self_attn.{name}_proj": ModuleShape(out_features=4096, in_features=4096, layer=layer)
        for layer in range(32)
        for name in "qkvo"
    }
    return ModelShape(
        modules=modules,
        linear_parameters=6_476_000_000,
        other_parameters=262_000_000,
        head_parameters=8192,
        output_features=2,
        scored_positions="example",
        hidden_features=4096,
    )


def small_model() -> ModelShape:
    """MiniLM: six blocks, 384 wide."""
    sizes = {"query": (384, 384), "key": (384, 384), "value": (384, 384), "output": (384, 384)}
    sizes |= {"intermediate": (1536, 384), "down": (384, 1536)}
    modules = {
        f"encoder.layer.{layer}.{name}": ModuleShape(out_features=out, in_features=into, layer=layer)
        for layer in range(6)
        for name, (out, into) in sizes.items()
    }
    return ModelShape(
        modules=modules,
        linear_parameters=10_616_832,
        other_parameters=12_000_000,
        head_parameters=385 * 150,
        output_features=150,
        scored_positions="example",
        hidden_features=384,
    )


def random_scores(shape: ModelShape, rng: np.random.Generator) -> dict[str, list[float]]:
    """Log-normal importance over modules, falling geometrically over eight ranks; all sum to 1."""
    table = rng.lognormal(0.0, 1.0, len(shape.modules))[:, None] * rng.uniform(0.6, 0.95) ** np.arange(8)
    table /= table.sum()
    return {name: [float(score) for score in row] for name, row in zip(shape.modules, table, strict=True)}


def make_edge(shape: ModelShape, edge_id: str, rng: np.random.Generator, **measured: Any) -> EdgeProfile:
    """A profile; `measured` gives tokens_per_second, memory_gib, tokens, examples and value_bytes."""
    per_token, value_bytes = 1.0 / measured["tokens_per_second"], measured["value_bytes"]
    return EdgeProfile(
        edge_id=edge_id,
        num_examples=measured["examples"],
        num_validation_examples=50,
        tokens_per_example=float(measured["tokens"]),
        longest_example_tokens=2 * measured["tokens"],
        data_fingerprint="benchmark",
        memory_bytes=int(measured["memory_gib"] * GIB),
        bandwidth_bytes_per_second=12.5e6,
        step_cost=StepCost(
            fixed_seconds=0.02,
            per_token_seconds=per_token,
            per_token_rank_seconds=1.5 * per_token / shape.linear_parameters,
        ),
        activation_cost=ActivationCost(
            fixed_bytes=10**6,
            per_token_bytes=17.0 * value_bytes * shape.hidden_features * shape.num_blocks,
            per_token_module_bytes={name: float(value_bytes * m.in_features) for name, m in shape.modules.items()},
        ),
        value_bytes=value_bytes,
        scores=random_scores(shape, rng),
        declared=True,
    )


def large_case(edges: int) -> tuple[ModelShape, dict[str, EdgeProfile], FederationConfig]:
    """Edges of eightfold different speed and fivefold different memory."""
    shape, rng, profiles = large_model(), np.random.default_rng(0), {}
    for index in range(edges):
        edge_id = f"edge-{index:03}"
        profiles[edge_id] = make_edge(
            shape,
            edge_id,
            rng,
            tokens_per_second=float(rng.choice([500, 1000, 2000, 4000])),
            memory_gib=float(rng.choice([8, 12, 16, 24, 40])),
            tokens=128,
            examples=int(rng.integers(300, 1500)),
            value_bytes=2,
        )
    menu = {"ranks": (2, 4, 8, 16, 32, 64, 128), "batch_sizes": (1, 2, 4, 8, 16, 32), "checkpointing": "never"}
    return shape, profiles, make_config(profiles, menu, bits=(4, 8, 16), rank_cap=128)


def throttled_case() -> tuple[ModelShape, dict[str, EdgeProfile], FederationConfig]:
    """Five edges, the last one four times slower."""
    shape, rng = small_model(), np.random.default_rng(0)
    speeds = {"edge-000": 4000.0, "edge-001": 4000.0, "edge-002": 4000.0, "edge-003": 4000.0, "edge-004": 1000.0}
    profiles = {
        edge_id: make_edge(
            shape, edge_id, rng, tokens_per_second=speed, memory_gib=1.0, tokens=16, examples=600, value_bytes=4
        )
        for edge_id, speed in speeds.items()
    }
    return shape, profiles, make_config(profiles, {}, bits=(32, 8, 4), rank_cap=32)


def make_config(
    profiles: Mapping[str, EdgeProfile], planning: dict[str, Any], bits: tuple[int, ...], rank_cap: int
) -> FederationConfig:
    """The part of a config that planning reads."""
    return FederationConfig.model_validate(
        {
            "name": "benchmark",
            "model": {"base": "unused", "bits": bits},
            "data": {"train": "{edge_id}.jsonl", "test": "unused", "labels": 2},
            "edges": [{"edge_id": edge_id} for edge_id in profiles],
            "planning": planning,
            "aggregation": {"rank_cap": rank_cap},
        }
    )


def measure_gaps(prepared: Mapping[str, PreparedEdge], config: FederationConfig) -> tuple[list[Gaps], int]:
    """Gaps of the greedy and the refined plans, and how many MILPs were solved."""
    terms, greedy_gaps, refined_gaps, solved = round_terms(prepared, config), [], [], 0
    for edge in prepared.values():
        greedy = solve_greedily(edge.problem, edge.duals, edge.front, terms)
        refined = refine(edge.problem, edge.duals, greedy, terms, time.monotonic() + 60)
        optimum = refined.selection.value + refined.gap * refined.selection.worth  # at most
        greedy_gaps.append(max(0.0, optimum - greedy.value) / greedy.worth)
        refined_gaps.append(refined.gap)
        solved += refined.solved
    return [_summary("greedy", greedy_gaps), _summary("milp", refined_gaps)], solved


def _summary(plans: str, gaps: list[float]) -> Gaps:
    return Gaps(plans, float(np.mean(gaps)), float(np.median(gaps)), max(gaps))


def spreads() -> dict[str, float]:
    """Seconds between the first and the last edge to finish, as a share of the round, by kind of plan."""
    shape, profiles, config = throttled_case()
    planned = [edge.predicted.round_seconds for edge in plan_federation(shape, profiles, config).edges.values()]
    ranks = dict.fromkeys(shape.modules, 8)
    uniform = [predict(shape, p, ranks, 16, -(-p.num_examples // 16), 32).round_seconds for p in profiles.values()]
    return {kind: (max(s) - min(s)) / max(s) for kind, s in (("planned", planned), ("uniform", uniform))}


def main() -> None:
    """Print the tables, or one JSON object with the tables and the checks."""
    arguments = parser(__doc__)
    arguments.add_argument("--edges", type=int, default=100, help="edges of the large case")
    options = arguments.parse_args()
    shape, profiles, config = large_case(options.edges)
    began, began_cpu = time.perf_counter(), time.process_time()
    plan = plan_federation(shape, profiles, config)
    timing = {"wall_seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - began_cpu}
    gaps, solved = measure_gaps(prepare_edges(shape, profiles, config), config)
    spread = spreads()
    checks = [
        at_most(f"seconds of one core to plan {options.edges} edges", timing["cpu_seconds"], MOST_SECONDS),
        at_most("largest gap to the optimum", gaps[1].largest, MOST_GAP),
        at_most("spread of finishing times with one edge throttled four times", spread["planned"], MOST_SPREAD),
    ]
    report = {"table": [asdict(row) for row in gaps], "timing": timing, "spread": spread}
    report |= {"milps_solved": solved, "solver": plan.solver}
    finish(options.json, report, checks, as_text(report))


def as_text(report: Mapping[str, Any]) -> str:
    """Time, gaps and spread."""
    head = ("gap to the optimum at most", "mean", "median", "largest")
    rows = [(row["plans"], *(f"{row[key]:.3%}" for key in head[1:])) for row in report["table"]]
    timing, spread = report["timing"], report["spread"]
    return (
        "128 modules × 7 ranks × 18 cells: "
        f"{timing['wall_seconds']:.1f} s, {timing['cpu_seconds']:.1f} s of one core\n"
        f"{report['milps_solved']} milps solved; the plan says: {report['solver']}\n\n"
        f"{markdown_table(head, rows)}\n\n"
        f"spread of finishing times: {', '.join(f'{kind} {value:.1%}' for kind, value in spread.items())}"
    )


if __name__ == "__main__":
    main()
