"""Why an edge has no plan, and the cheapest change that would give it one."""

from collections.abc import Iterator
from dataclasses import replace

from fedpipe_core.config import FederationConfig, PlanPin
from fedpipe_core.costs import CostModel
from fedpipe_core.planning_problem import Cell, EdgeProblem, build_problem

GIB = 2**30


def explain_seconds(edge_id: str, needed_seconds: float, round_seconds: float) -> str:
    """The sentence for an edge that cannot make one step before the deadline."""
    return (
        f"{edge_id}: deadline: its shortest round needs {needed_seconds:.3g} s but planning.round_seconds is "
        f"{round_seconds:.3g}; raise it to {needed_seconds * 1.01:.3g} or leave it out"
    )


def explain_memory(problem: EdgeProblem, config: FederationConfig, pin: PlanPin) -> str:
    """The sentence for an edge whose smallest plan exceeds its memory."""
    needed, cell = smallest_plan(problem)
    rank = "its pinned ranks" if problem.pinned_ranks else f"rank {min(problem.ranks)} on one module"
    recomputing = ", checkpointing" if cell.checkpointing else ""
    return (
        f"{problem.costs.profile.edge_id}: memory: its smallest plan needs {needed / GIB:.3g} GiB ({rank}, batch "
        f"{cell.batch_size}, {cell.base_bits}-bit base{recomputing}) but it has {problem.memory_bytes / GIB:.3g} GiB; "
        f"{_cheapest_change(problem, config, pin)}"
    )


def smallest_plan(problem: EdgeProblem) -> tuple[float, Cell]:
    """Bytes and cell of the plan with the smallest peak memory."""
    return min(((_smallest_bytes(problem, cell), cell) for cell in problem.cells), key=lambda pair: pair[0])


def _smallest_bytes(problem: EdgeProblem, cell: Cell) -> float:
    if problem.pinned_ranks:
        return float(cell.block_memory.min())
    return float((cell.block_memory[problem.block_of_module] + cell.item_memory[:, 0]).min())


def _cheapest_change(problem: EdgeProblem, config: FederationConfig, pin: PlanPin) -> str:
    """The first change that makes the edge feasible, from what costs the federation least to more memory."""
    for description, changed_config, changed_pin, costs in _changes(problem, config, pin):
        zero = dict.fromkeys(costs.shape.modules, problem.utility.sum(axis=0) * 0)
        needed, _ = smallest_plan(build_problem(costs, changed_config, changed_pin, zero, problem.ranks))
        if needed <= problem.memory_bytes:
            return description
    return f"give it at least {smallest_plan(problem)[0] * 1.01 / GIB:.3g} GiB"


def _changes(
    problem: EdgeProblem, config: FederationConfig, pin: PlanPin
) -> Iterator[tuple[str, FederationConfig, PlanPin, CostModel]]:
    costs = problem.costs
    if pin != PlanPin():
        yield f"remove the pin of {costs.profile.edge_id}", config, PlanPin(), costs
    if config.planning.checkpointing == "never" and costs.shape.hidden_features:
        yield "set planning.checkpointing to auto", _with(config, "planning", checkpointing="auto"), pin, costs
    for bits in sorted({8, 4} - set(config.model.bits), reverse=True):
        yield f"add {bits} to model.bits", _with(config, "model", bits=(bits,)), pin, costs
    for size in _halves(min(config.planning.batch_sizes), 1):
        yield f"add {size} to planning.batch_sizes", _with(config, "planning", batch_sizes=(size,)), pin, costs
    for tokens in _halves(config.model.max_tokens, 4):
        yield f"lower model.max_tokens to {tokens}", config, pin, _cut_to(costs, tokens)
    coarse = _with(_with(config, "model", bits=(4,)), "planning", batch_sizes=(1,))
    yield "add 4 to model.bits and 1 to planning.batch_sizes", coarse, pin, costs


def _with(config: FederationConfig, section: str, **values: object) -> FederationConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def _halves(start: int, least: int) -> Iterator[int]:
    while start // 2 >= least:
        start //= 2
        yield start


def _cut_to(costs: CostModel, tokens: int) -> CostModel:
    profile = costs.profile
    shorter = {
        "tokens_per_example": min(profile.tokens_per_example, tokens),
        "longest_example_tokens": round(min(profile.longest_example_tokens or profile.tokens_per_example, tokens)),
    }
    return replace(costs, profile=profile.model_copy(update=shorter))
