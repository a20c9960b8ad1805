"""Work for edges that would wait: more steps than their planned examples need, until the slowest edge is done.

What an edge learns meanwhile costs no round any time. A deadline is chosen as if there were none.
"""

from collections.abc import Mapping
from dataclasses import replace

from fedpipe_core.planning_greedy import Selection, slacks, steps_by
from fedpipe_core.planning_problem import EdgeProblem


def with_overtime(
    problems: Mapping[str, EdgeProblem], selections: Mapping[str, Selection], times: float
) -> dict[str, Selection]:
    """Selections with as many more steps as end before the slowest edge does, at most `times` the planned ones.

    Steps that are pinned stay, as does a single one.
    """
    if times == 1:
        return dict(selections)
    slowest_seconds = max(-slacks(problems[edge_id], found, 0.0)[1] for edge_id, found in selections.items())
    return {e: _longer(problems[e], found, slowest_seconds, times) for e, found in selections.items()}


def _longer(problem: EdgeProblem, selection: Selection, round_seconds: float, times: float) -> Selection:
    cell = selection.cell
    if cell.least_steps == cell.planned_steps:
        return selection
    most = int(times * cell.planned_steps)
    return replace(selection, steps=max(selection.steps, min(steps_by(problem, selection, round_seconds), most)))
