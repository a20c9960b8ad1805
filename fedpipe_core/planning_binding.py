"""Which limit keeps a plan from being larger: memory, deadline, data, menu or pin."""

import numpy as np

from fedpipe_core.planning_greedy import ROUNDING, Selection, slacks
from fedpipe_core.planning_problem import EdgeProblem
from fedpipe_core.planning_utility import FloatArray

IDLE_SHARE = 0.1  # of the round; an edge that waits longer has run out of data


def binding_limit(problem: EdgeProblem, selection: Selection, round_seconds: float) -> str:
    """The limit that refuses the most utility among all single next steps up from a selection.

    Examples left over mean the deadline. With every rank at its largest, a base coarser than the menu's finest means
    memory, an edge that then waits for the others means data, and the rest is the menu's (or the pin's) end.
    """
    cell = selection.cell
    if selection.steps < cell.planned_steps:
        return "deadline"
    slack_memory, slack_seconds = slacks(problem, selection, round_seconds)
    over_memory, over_time = _refused_utility(problem, selection, slack_memory, slack_seconds)
    if max(over_memory, over_time) > ROUNDING:
        return "memory" if over_memory >= over_time else "deadline"
    if cell.base_bits < max(other.base_bits for other in problem.cells) or cell.checkpointing:
        return "memory"
    if slack_seconds > IDLE_SHARE * round_seconds:
        return "data"
    return "pin" if problem.pinned_ranks else "menu"


def _refused_utility(
    problem: EdgeProblem, selection: Selection, slack_memory: float, slack_seconds: float
) -> tuple[float, float]:
    """Utility of the next rank of every module that memory refuses, and that the deadline refuses."""
    cell, choice = selection.cell, selection.choice
    module = np.flatnonzero(choice + 1 < len(problem.ranks))
    column, block = choice[module], np.minimum(problem.block_of_module[module], selection.block)

    def step_up(items: FloatArray) -> FloatArray:
        current = np.where(column >= 0, items[module, column], 0.0)
        return items[module, column + 1] - current

    gain = step_up(problem.utility)
    memory = step_up(cell.item_memory) + cell.block_memory[block] - cell.block_memory[selection.block]
    step = step_up(cell.item_seconds) + cell.block_seconds[block] - cell.block_seconds[selection.block]
    seconds = step_up(cell.item_upload_seconds) + selection.steps * step
    gain = np.where(gain > ROUNDING, gain, 0.0)
    return float(gain[memory > slack_memory].sum()), float(gain[seconds > slack_seconds].sum())
