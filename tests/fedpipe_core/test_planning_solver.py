"""Greedy, exact and bound, against each other and against every plan there is."""

import math
import time
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning_cases import make_config, make_profile, random_scores, tiny_model

from fedpipe_core.config import PlanPin
from fedpipe_core.costs import CostModel, Work
from fedpipe_core.planning_greedy import frontier, solve_greedily, sweep_cells
from fedpipe_core.planning_problem import EdgeProblem, RoundTerms, build_problem
from fedpipe_core.planning_solver import SubProblem, bound_sub_problems, refine, solve
from fedpipe_core.planning_utility import edge_utilities, worth

RANKS = (2, 8)
SHAPE = tiny_model(blocks=2)
EXAMPLES = 12


def tiny_problem(seed: int, memory_bytes: int = 10**6, bandwidth: float = 1e5) -> EdgeProblem:
    profile = make_profile(
        SHAPE,
        num_examples=EXAMPLES,
        num_validation_examples=0,
        memory_bytes=memory_bytes,
        bandwidth_bytes_per_second=bandwidth,
        scores=random_scores(SHAPE, seed),
    )
    config = make_config(
        ["edge-00"], planning={"ranks": RANKS, "batch_sizes": (2, 4)}, model={"base": "x", "bits": (32, 4)}
    )
    modules = tuple(SHAPE.modules)
    utility = dict(zip(modules, edge_utilities({"edge-00": profile}, modules, RANKS)["edge-00"], strict=True))
    costs = CostModel(SHAPE, profile, dict.fromkeys(modules, 8))
    return build_problem(costs, config, PlanPin(), utility, RANKS)


def best_of_all(problem: EdgeProblem, terms: RoundTerms) -> float:
    """Value of the best plan, by pricing every plan with the cost model itself; −inf when none fits."""
    best = -math.inf
    choices = [c for c in product((-1, 0, 1), repeat=len(problem.modules)) if max(c) >= 0]
    for cell, choice in product(problem.cells, choices):
        ranks = problem.ranks_of(choice)
        utility = sum(problem.utility[m, column] for m, column in enumerate(choice) if column >= 0)
        for steps in range(1, cell.planned_steps + 1):
            cost = problem.costs.predict(Work(ranks, cell.batch_size, steps, cell.base_bits))
            if cost.peak_memory_bytes <= problem.memory_bytes and cost.round_seconds <= terms.seconds:
                left_over = max(0.0, 1 - steps * cell.share_per_step)
                best = max(best, float(worth(utility)) - cell.loss - terms.penalty * left_over)
    return best


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 1000),
    memory_bytes=st.integers(30_000, 170_000),
    seconds=st.floats(0.05, 0.25),
    penalty=st.sampled_from([0.0, 0.5, 2.0]),
)
def test_greedy_is_at_most_milp_is_at_most_the_optimum_of_all_plans_is_at_most_the_bound(
    seed, memory_bytes, seconds, penalty
):
    problem, terms = tiny_problem(seed, memory_bytes), RoundTerms(seconds, penalty)
    optimum = best_of_all(problem, terms)
    sweeps = sweep_cells(problem)
    front, duals = frontier(problem, sweeps), [swept.duals for swept in sweeps]
    if not np.isfinite(optimum):
        return
    greedy = solve_greedily(problem, duals, front, terms)
    refined = refine(problem, duals, greedy, terms, time.monotonic() + 60)
    exact, bound = refined.selection, bound_sub_problems(problem, duals, terms)[0][1]
    assert greedy.value <= exact.value + 1e-3 * greedy.worth  # equal plans are chosen by preference
    assert exact.value <= optimum + 1e-9
    assert optimum <= bound + 1e-9
    assert optimum <= exact.value + refined.gap * exact.worth + 1e-9


@pytest.mark.parametrize("seed", range(6))
def test_refined_plans_are_within_one_percent_of_the_best_of_all_plans(seed):
    rng = np.random.default_rng(seed)
    problem = tiny_problem(seed, memory_bytes=int(rng.integers(60_000, 150_000)))
    terms = RoundTerms(float(rng.uniform(0.08, 0.2)), 1.0)
    sweeps = sweep_cells(problem)
    duals = [swept.duals for swept in sweeps]
    greedy = solve_greedily(problem, duals, frontier(problem, sweeps), terms)
    selection = refine(problem, duals, greedy, terms, time.monotonic() + 60).selection
    assert best_of_all(problem, terms) - selection.value <= 0.01 * selection.worth


def test_a_sub_problem_is_solved_to_the_best_of_its_plans():
    problem, terms = tiny_problem(seed=1, memory_bytes=76_000), RoundTerms(0.13, 1.0)
    costs, cell = problem.costs, next(c for c in problem.cells if (c.batch_size, c.base_bits) == (2, 32))
    (selection,), bound = solve(problem, SubProblem(cell, 0, 3), terms, time.monotonic() + 60)
    best = 0.0
    for choice in product((-1, 0, 1), repeat=len(problem.modules)):
        work = Work(problem.ranks_of(choice), 2, 3, 32)
        transferred = costs.upload_bytes(work.ranks) + costs.download_bytes(work.ranks)
        seconds = costs.idle_seconds(transferred) + 3 * costs.step_seconds(work, lowest_block=0)
        if costs.peak_memory_bytes(work, lowest_block=0) <= 76_000 and seconds <= 0.13:
            best = max(best, sum(problem.utility[m, column] for m, column in enumerate(choice) if column >= 0))
    assert 0 < selection.utility == pytest.approx(best)
    assert bound >= float(worth(best)) - cell.loss - (1 - 6 / EXAMPLES) - 1e-9


def test_a_sub_problem_without_a_solution_has_none():
    problem = tiny_problem(seed=1, memory_bytes=10_000)
    selections, bound = solve(problem, SubProblem(problem.cells[0], 0, 1), RoundTerms(10.0, 1.0), time.monotonic() + 60)
    assert selections == []
    assert bound == -math.inf


def test_no_time_left_is_an_error_of_its_own():
    problem = tiny_problem(seed=1)
    with pytest.raises(TimeoutError):
        solve(problem, SubProblem(problem.cells[0], 0, 1), RoundTerms(10.0, 1.0), time.monotonic() - 1)
