"""FedAdapter's side trials, on cases whose winner is known."""

import pytest
import torch
from planning_cases import GIB, make_config, make_profile, small_encoder, throttled

from fedpipe_core.adapters import Adapter
from fedpipe_core.config import FedAdapterSpec
from fedpipe_core.low_rank import LowRank
from fedpipe_core.methods import bottleneck_places, bottleneck_size, bottlenecks
from fedpipe_core.plan_schemas import FederationPlan
from fedpipe_core.planning import plan_federation
from fedpipe_core.schemas import DataReference, UpdateRecord
from fedpipe_core.trials import candidates, foreseen_rounds, plan_trial, settled, winner

ENCODER = small_encoder()
PLACES = bottleneck_places(ENCODER)
EDGES = ["east", "north", "south", "west"]
FEDADAPTER = {"method": "fedadapter", "planning": {"batch_sizes": [16]}}
START = bottlenecks(PLACES, 1, 8)


def profiles(**changes: int):
    found = {edge_id: make_profile(ENCODER, edge_id) for edge_id in EDGES}
    found["west"] = throttled(make_profile(ENCODER, "west", **changes), 4.0)
    return found


def trial(round_index: int = 2, ranks: dict[str, int] = START, **sections: object) -> FederationPlan:
    config = make_config(EDGES, **{**FEDADAPTER, **sections})
    plan = plan_federation(ENCODER, profiles(), config)
    return plan_trial(plan, ranks, round_index, ENCODER, profiles(), config)


def update(edge_id: str, before: float, after: float, examples: int = 100) -> UpdateRecord:
    return UpdateRecord(
        run="run",
        round=2,
        edge_id=edge_id,
        base_sha256="",
        global_sha256="",
        adapter=DataReference(key="key", sha256="0" * 64, size_bytes=1),
        num_examples=examples,
        examples_processed=1,
        steps=1,
        train_loss=1.0,
        train_seconds=1.0,
        round_seconds=1.0,
        download_bytes=1,
        metrics={"loss": before},
        trained_metrics={"loss": after},
    )


def outcome(plan: FederationPlan, losses: dict[str, float]) -> dict[str, UpdateRecord]:
    """Every edge's update, by what its candidate brought a loss of 2 down to."""
    return {e: update(e, 2.0, losses[p.trial.candidate]) for e, p in plan.edges.items() if p.trial}


def test_neighbours_are_a_step_deeper_and_a_step_wider_up_to_the_limits():
    spec = FedAdapterSpec(width_step=8, largest_width=12)
    found = candidates(PLACES, START, spec)
    assert {name: bottleneck_size(PLACES, ranks) for name, ranks in found.items()} == {
        "same": (1, 8),
        "deeper": (2, 8),
        "wider": (1, 12),
    }
    assert list(candidates(PLACES, bottlenecks(PLACES, 6, 12), spec)) == ["same"]


def test_edges_are_dealt_by_seed_and_round_and_all_candidates_are_tried():
    first, again, later = trial(2), trial(2), trial(3)
    assert first == again
    roles = [{e: p.trial.candidate for e, p in plan.edges.items() if p.trial} for plan in (first, later)]
    assert all(set(found.values()) == {"same", "deeper", "wider"} for found in roles)
    assert roles[0] != roles[1]


def test_a_larger_size_is_priced_by_its_own_time_and_bytes():
    plan = trial()
    by_name = {p.trial.candidate: p for p in plan.edges.values() if p.trial}
    assert by_name["same"].trial.relative_seconds == 1.0
    assert by_name["deeper"].trial.relative_seconds > by_name["wider"].trial.relative_seconds > 1.0
    assert by_name["deeper"].predicted.upload_bytes > by_name["same"].predicted.upload_bytes
    assert plan.round_seconds == max(p.predicted.round_seconds for p in plan.edges.values())


def test_a_size_that_an_edge_cannot_hold_is_not_tried():
    config = make_config(EDGES, **FEDADAPTER)
    first = plan_federation(ENCODER, profiles(), config)
    peaks = {p.trial.candidate: p.predicted.peak_memory_bytes for p in trial().edges.values() if p.trial}
    tight = profiles(memory_bytes=(peaks["wider"] + peaks["deeper"]) // 2)
    plan = plan_trial(first, START, 2, ENCODER, tight, config)
    assert {p.trial.candidate for p in plan.edges.values() if p.trial} == {"same", "wider"}


@pytest.mark.parametrize(
    ("losses", "won"),
    [
        ({"same": 1.6, "deeper": 1.0, "wider": 1.5}, "deeper"),
        ({"same": 1.6, "deeper": 1.5, "wider": 1.0}, "wider"),
        ({"same": 1.0, "deeper": 0.99, "wider": 1.0}, "same"),  # what it gained more took longer still
    ],
)
def test_the_candidate_with_the_largest_gain_per_time_wins(losses, won):
    plan = trial()
    assert winner(plan, outcome(plan, losses)) == won


def test_a_candidate_whose_edges_failed_cannot_win():
    plan = trial()
    kept = outcome(plan, {"same": 1.6, "deeper": 0.1, "wider": 1.8})
    for edge_id, edge in plan.edges.items():
        if edge.trial and edge.trial.candidate == "deeper":
            del kept[edge_id]
    assert winner(plan, kept) == "same"


@pytest.mark.parametrize("won", ["same", "deeper", "wider"])
def test_the_global_adapter_is_cut_to_the_size_that_won(won):
    plan = trial()
    losses = {"same": 1.9, "deeper": 1.9, "wider": 1.9} | {won: 0.5}
    union = {name: LowRank(torch.ones(384, 16), torch.ones(16, 384)) for name in PLACES.modules}
    previous = {name: START.get(name, 0) for name in PLACES.modules}
    found = settled(Adapter(union, {}), previous, plan, outcome(plan, losses))
    size = bottleneck_size(PLACES, found.ranks)
    assert size == {"same": (1, 8), "deeper": (2, 8), "wider": (1, 16)}[won]
    assert set(found.ranks) == set(PLACES.modules)


def test_without_a_trial_the_aggregate_stays_as_it_is():
    plan = trial(3, fedadapter={"trial_rounds": 2})
    assert not any(edge.trial for edge in plan.edges.values())
    adapter = Adapter({}, {})
    assert settled(adapter, {}, plan, {}) is adapter


def test_one_edge_alone_tries_nothing():
    config = make_config(["east"], **FEDADAPTER)
    alone = {"east": make_profile(ENCODER, "east", memory_bytes=GIB)}
    plan = plan_trial(plan_federation(ENCODER, alone, config), START, 2, ENCODER, alone, config)
    assert plan.edges["east"].ranks == START


def foreseen(rounds: int, **limits: int):
    config = make_config(EDGES, **FEDADAPTER, rounds=rounds, fedadapter=limits)
    first = plan_federation(ENCODER, profiles(), config)
    return first, foreseen_rounds(first, ENCODER, profiles(), config)


def test_a_run_is_foreseen_with_its_trials_and_the_growth_they_can_bring():
    first, found = foreseen(4)
    assert found[0] == (first, 1)
    assert {e: p.ranks for e, p in found[1][0].edges.items()} == {e: p.ranks for e, p in trial().edges.items()}
    slowest = [max(edge.predicted.round_seconds for edge in plan.edges.values()) for plan, _ in found]
    assert slowest[0] < slowest[1] < slowest[2] < slowest[3]
    assert [rounds for _, rounds in found] == [1, 1, 1, 1]


def test_rounds_after_the_last_growth_are_foreseen_at_once():
    _, found = foreseen(1000, largest_width=16)
    assert sum(rounds for _, rounds in found) == 1000
    assert len(found) < 2 * PLACES.num_blocks + 4
    last = found[-1][0]
    assert not any(edge.trial for edge in last.edges.values())
    assert {bottleneck_size(PLACES, edge.ranks) for edge in last.edges.values()} == {(PLACES.num_blocks, 16)}
