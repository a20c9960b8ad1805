"""Edges that would wait do more, and cost the round no time."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st
from planning_cases import GIB, make_config, make_profile, small_encoder, throttled

from fedpipe_core.plan_schemas import FederationPlan
from fedpipe_core.planning import plan_federation, prepare_edges, round_terms
from fedpipe_core.planning_overtime import with_overtime
from fedpipe_core.planning_selection import how_found, select
from fedpipe_core.profile_schemas import EdgeProfile

ENCODER = small_encoder()
PLANNED = 160


def lowest_block(plan: FederationPlan, edge_id: str) -> int:
    """The lowest block that an edge adapts."""
    return min(ENCODER.modules[name].layer for name in plan.edges[edge_id].ranks)


def profiles_of(speeds: list[float]) -> dict[str, EdgeProfile]:
    """Edges that are so many times slower than the first."""
    return {
        f"edge-{i:02}": throttled(make_profile(ENCODER, f"edge-{i:02}", seed=i), speed)
        for i, speed in enumerate(speeds)
    }


def plans(speeds: list[float], overtime: float, pins: dict[str, int] | None = None) -> FederationPlan:
    """The plan of edges that are so many times slower than the first."""
    profiles = profiles_of(speeds)
    config = make_config(list(profiles), planning={"overtime": overtime}, training={"examples_per_round": PLANNED})
    edges = tuple(
        edge.model_copy(update={"pin": edge.pin.model_copy(update={"local_steps": (pins or {}).get(edge.edge_id)})})
        for edge in config.edges
    )
    return plan_federation(ENCODER, profiles, config.model_copy(update={"edges": edges}))


@settings(deadline=None, max_examples=15)
@given(
    speeds=st.lists(st.sampled_from([1.0, 1.5, 3.0, 8.0]), min_size=3, max_size=3),
    overtime=st.sampled_from([1.5, 2.0, 4.0]),
)
def test_overtime_ends_no_later_than_the_slowest_edge_and_leaves_nobody_with_less(speeds, overtime):
    without, plan = plans(speeds, 1.0), plans(speeds, overtime)
    assert plan.round_seconds <= without.round_seconds * 1.02  # a larger global adapter takes longer to arrive
    for edge_id, edge in plan.edges.items():
        before = without.edges[edge_id]
        assert edge.predicted.round_seconds <= plan.round_seconds * (1 + 1e-6)
        assert edge.predicted.peak_memory_bytes <= GIB
        assert edge.local_steps * edge.batch_size >= before.local_steps * before.batch_size
        assert edge.local_steps <= max(before.local_steps, overtime * math.ceil(PLANNED / edge.batch_size))
        if before.under_training:
            assert (edge.ranks, edge.local_steps) == (before.ranks, before.local_steps)


def test_an_edge_that_would_wait_gives_up_blocks_that_only_it_trains_for_steps():
    without, plan = plans([3.0, 8.0, 8.0], 1.0), plans([3.0, 8.0, 8.0], 4.0)
    assert lowest_block(without, "edge-00") < lowest_block(without, "edge-02")
    assert lowest_block(plan, "edge-00") >= lowest_block(without, "edge-01")
    assert plan.edges["edge-00"].local_steps > 2 * without.edges["edge-00"].local_steps


def test_a_fast_edge_does_as_much_more_as_is_allowed_while_the_slowest_does_what_it_did():
    without, plan = plans([1.0, 1.0, 8.0], 1.0), plans([1.0, 1.0, 8.0], 2.0)
    fast, slow = plan.edges["edge-00"], plan.edges["edge-02"]
    assert fast.local_steps * fast.batch_size == 2 * PLANNED
    assert slow.local_steps == without.edges["edge-02"].local_steps


def test_pinned_steps_stay():
    plan = plans([1.0, 1.0, 8.0], 2.0, pins={"edge-00": 3})
    assert plan.edges["edge-00"].local_steps == 3
    assert plan.edges["edge-01"].local_steps > PLANNED / plan.edges["edge-01"].batch_size


def test_a_solver_that_runs_out_of_time_in_overtime_is_told():
    profiles = profiles_of([1.0, 3.0, 1.0])
    config = make_config(list(profiles), planning={"overtime": 4.0}, training={"examples_per_round": PLANNED})
    prepared = prepare_edges(ENCODER, profiles, config)
    terms = round_terms(prepared, config)
    found = select(prepared, terms, "milp", stop_at=math.inf)
    late = with_overtime(prepared, found, terms.penalty, config.planning, stop_at=0.0)
    assert how_found(found, config.planning).startswith("milp, every edge within")
    assert how_found(late, config.planning).startswith("greedy on 2 of 3 edges (from edge-00 on)")
