"""One deadline for all edges: the round with the most value per second.

With v_k(T) the best value edge k can reach by T (utility of its adapters − penalty × share of its examples left over)
and w_k its share of all examples, the deadline is argmax_T Σ_k w_k·v_k(T) / T. Why this rule: training cost is the time
until enough has been learnt, so a longer round must pay for itself. Waiting until a straggler has seen all its data
buys only that edge's share while every other edge idles; a very short round pays transfer and evaluation for little.
A higher `under_training_penalty` therefore means longer rounds and fewer examples left over. Two bounds: every edge
must manage one step, and some edge must manage everything planned, so that rounds do not shrink without end.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from fedpipe_core.planning_greedy import Frontier, values_at
from fedpipe_core.planning_problem import RoundTerms
from fedpipe_core.planning_utility import FloatArray

CANDIDATES = 48  # deadlines tried on a geometric scale, then again between the best one's neighbours


def choose_deadline(fronts: Mapping[str, Frontier], examples: Mapping[str, int], penalty: float) -> float:
    """The deadline in seconds. Every frontier must hold at least one selection."""
    shortest, longest = _range(list(fronts.values()))
    coarse = np.geomspace(shortest, longest, CANDIDATES)
    best = int(np.argmax(_value_per_second(coarse, fronts, examples, penalty)))
    fine = np.geomspace(coarse[max(best - 1, 0)], coarse[min(best + 1, CANDIDATES - 1)], CANDIDATES)
    return float(fine[np.argmax(_value_per_second(fine, fronts, examples, penalty))])


def _value_per_second(
    deadlines: FloatArray, fronts: Mapping[str, Frontier], examples: Mapping[str, int], penalty: float
) -> FloatArray:
    total, value = sum(examples[edge_id] for edge_id in fronts), np.zeros(len(deadlines))
    for edge_id, front in fronts.items():
        best = [values_at(front, RoundTerms(seconds, penalty)).max() for seconds in deadlines]
        value += examples[edge_id] / total * np.array(best)
    return value / deadlines


def shortest_round(front: Frontier) -> float:
    """Seconds of the shortest round an edge can make."""
    return float((front.fixed_seconds + front.least_steps * front.step_seconds).min())


def _range(fronts: Sequence[Frontier]) -> tuple[float, float]:
    full = [front.fixed_seconds + front.planned_steps * front.step_seconds for front in fronts]
    shortest = max(*(shortest_round(front) for front in fronts), min(float(seconds.min()) for seconds in full))
    most_valuable = [float(s[front.value.argmax()]) for s, front in zip(full, fronts, strict=True)]
    return shortest, max(shortest, *most_valuable)
