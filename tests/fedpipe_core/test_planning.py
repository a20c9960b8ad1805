"""Plans of whole federations: limits kept, edges finishing together, refusals a user can act on."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning_cases import (
    GIB,
    large_decoder,
    make_config,
    make_profile,
    small_encoder,
    throttled,
    tiny_model,
)

from fedpipe_core.errors import PlanError
from fedpipe_core.planning import check_profile, infeasible_edges, plan_federation
from fedpipe_core.profile_schemas import EdgeProfile

ENCODER = small_encoder()


def profiles_of(*profiles: EdgeProfile) -> dict[str, EdgeProfile]:
    return {profile.edge_id: profile for profile in profiles}


def five_edges(**changes):
    return profiles_of(*(make_profile(ENCODER, f"edge-{i:02}", seed=i, **changes) for i in range(5)))


def test_the_same_profiles_and_config_give_the_same_bytes():
    profiles = five_edges()
    config = make_config(list(profiles))
    backwards = dict(reversed(profiles.items()))
    first, second = plan_federation(ENCODER, profiles, config), plan_federation(ENCODER, backwards, config)
    assert first.model_dump_json() == second.model_dump_json()


@settings(deadline=None, max_examples=15)
@given(
    memory_mib=st.lists(st.integers(80, 400), min_size=3, max_size=3),
    speeds=st.lists(st.sampled_from([1.0, 2.0, 5.0]), min_size=3, max_size=3),
    round_seconds=st.sampled_from([None, 3.0, 10.0]),
    penalty=st.sampled_from([0.0, 1.0, 3.0]),
)
def test_no_plan_exceeds_memory_deadline_menu_or_rank_cap(memory_mib, speeds, round_seconds, penalty):
    profiles = profiles_of(
        *(
            throttled(make_profile(ENCODER, f"edge-{i:02}", seed=i, memory_bytes=mib * 2**20), speed)
            for i, (mib, speed) in enumerate(zip(memory_mib, speeds, strict=True))
        )
    )
    planning = {"round_seconds": round_seconds, "under_training_penalty": penalty}
    config = make_config(list(profiles), planning=planning, aggregation={"rank_cap": 8})
    plan = plan_federation(ENCODER, profiles, config)
    for edge_id, edge in plan.edges.items():
        assert edge.predicted.peak_memory_bytes <= profiles[edge_id].memory_bytes
        assert edge.predicted.round_seconds <= plan.round_seconds * (1 + 1e-6)
        assert set(edge.ranks.values()) <= {2, 4, 8}
        assert edge.batch_size in (8, 16, 32)
        assert edge.under_training == pytest.approx(max(0, 1 - edge.local_steps * edge.batch_size / 500))
        assert edge.binding in {"memory", "deadline", "data", "menu"}


def test_an_edge_throttled_four_times_finishes_with_the_others():
    profiles = five_edges()
    profiles["edge-04"] = throttled(profiles["edge-04"], 4.0)
    plan = plan_federation(ENCODER, profiles, make_config(list(profiles)))
    seconds = [edge.predicted.round_seconds for edge in plan.edges.values()]
    assert max(seconds) - min(seconds) <= 0.25 * max(seconds)
    assert plan.edges["edge-04"].binding == "deadline"
    assert plan.edges["edge-04"].under_training > 0.5
    assert plan.edges["edge-00"].under_training < 0.05


def test_a_chosen_deadline_ends_with_the_slowest_edge():
    profiles = five_edges()
    plan = plan_federation(ENCODER, profiles, make_config(list(profiles)))
    assert plan.round_seconds == max(edge.predicted.round_seconds for edge in plan.edges.values())


def test_a_higher_penalty_makes_longer_rounds_with_fewer_examples_left_over():
    profiles = five_edges()
    profiles["edge-04"] = throttled(profiles["edge-04"], 4.0)
    plans = [
        plan_federation(ENCODER, profiles, make_config(list(profiles), planning={"under_training_penalty": penalty}))
        for penalty in (1.0, 20.0)
    ]
    assert plans[0].round_seconds < plans[1].round_seconds
    assert plans[0].edges["edge-04"].under_training > plans[1].edges["edge-04"].under_training


def test_a_given_deadline_is_the_deadline_and_a_longer_one_buys_more():
    profiles = five_edges()
    short, long = (
        plan_federation(ENCODER, profiles, make_config(list(profiles), planning={"round_seconds": seconds}))
        for seconds in (2.0, 60.0)
    )
    assert (short.round_seconds, long.round_seconds) == (2.0, 60.0)
    for edge_id, edge in short.edges.items():
        assert edge.binding == "deadline"
        assert long.edges[edge_id].binding == "data"
        assert sum(edge.ranks.values()) < sum(long.edges[edge_id].ranks.values())


def test_an_edge_short_of_memory_takes_fewer_bits_or_ranks_and_says_so():
    profiles = five_edges()
    profiles["edge-04"] = profiles["edge-04"].model_copy(update={"memory_bytes": 85 * 2**20})
    plan = plan_federation(ENCODER, profiles, make_config(list(profiles), planning={"round_seconds": 60.0}))
    assert plan.edges["edge-04"].base_bits < 32
    assert plan.edges["edge-04"].binding == "memory"


def test_checkpointing_is_left_alone_where_it_is_never_wanted():
    profile = make_profile(large_decoder(), memory_bytes=12 * GIB, tokens_per_example=512.0, longest_example_tokens=512)
    sections = {"planning": {"batch_sizes": (4,), "round_seconds": 36000.0}, "model": {"base": "x", "bits": (4,)}}
    auto = plan_federation(large_decoder(), profiles_of(profile), make_config(["edge-00"], **sections))
    sections["planning"]["checkpointing"] = "never"
    never = plan_federation(large_decoder(), profiles_of(profile), make_config(["edge-00"], **sections))
    assert auto.edges["edge-00"].checkpointing
    assert not never.edges["edge-00"].checkpointing
    assert sum(never.edges["edge-00"].ranks.values()) < sum(auto.edges["edge-00"].ranks.values())


def test_important_modules_get_the_ranks():
    scores = {name: [0.0] * 8 for name in ENCODER.modules} | {"layer.5.value": [0.125] * 8}
    profile = make_profile(ENCODER, scores=scores)
    plan = plan_federation(ENCODER, profiles_of(profile), make_config(["edge-00"]))
    assert list(plan.edges["edge-00"].ranks) == ["layer.5.value"]


@pytest.mark.parametrize("price", [0.2, 0.5])
def test_a_price_on_parameters_spares_those_that_bring_little(price):
    profiles = five_edges()
    free, priced = (
        plan_federation(ENCODER, profiles, make_config(list(profiles), planning=planning))
        for planning in ({"round_seconds": 30.0, "parameter_price": cost} for cost in (0.0, price))
    )
    for edge_id, edge in priced.edges.items():
        assert edge.predicted.upload_bytes < free.edges[edge_id].predicted.upload_bytes
        assert edge.local_steps >= free.edges[edge_id].local_steps
        scores = profiles[edge_id].scores
        assert max(scores, key=lambda name: scores[name][0]) in edge.ranks


def test_scores_without_variance_still_give_a_plan():
    for score in (0.0, 1.0):
        profile = make_profile(ENCODER, scores={name: [score] * 8 for name in ENCODER.modules})
        plan = plan_federation(ENCODER, profiles_of(profile), make_config(["edge-00"]))
        assert plan.edges["edge-00"].ranks


def test_data_smaller_than_every_batch_make_one_short_batch_per_round():
    profile = make_profile(ENCODER, num_examples=5, num_validation_examples=0)
    edge = plan_federation(ENCODER, profiles_of(profile), make_config(["edge-00"])).edges["edge-00"]
    assert (edge.batch_size, edge.local_steps, edge.under_training) == (5, 1, 0.0)


def test_examples_per_round_bounds_the_steps():
    config = make_config(["edge-00"], training={"examples_per_round": 64}, planning={"round_seconds": 60.0})
    edge = plan_federation(ENCODER, profiles_of(make_profile(ENCODER)), config).edges["edge-00"]
    assert edge.local_steps == math.ceil(64 / edge.batch_size)


def test_pins_are_kept_and_planned_around():
    profiles = five_edges()
    ranks = {"layer.0.query": 3, "layer.4.down": 32}
    pins = {"edge-00": {"ranks": ranks}, "edge-01": {"batch_size": 5, "base_bits": 16}, "edge-02": {"local_steps": 7}}
    edges = plan_federation(ENCODER, profiles, make_config(list(profiles), pins=pins)).edges
    assert edges["edge-00"].ranks == ranks
    assert (edges["edge-01"].batch_size, edges["edge-01"].base_bits) == (5, 16)
    assert edges["edge-02"].local_steps == 7
    seconds = [edges[edge_id].predicted.round_seconds for edge_id in ("edge-01", "edge-03", "edge-04")]
    assert max(seconds) - min(seconds) <= 0.25 * max(seconds)


def test_a_fully_pinned_edge_needs_no_choice():
    pin = {"ranks": {"layer.5.up": 4}, "batch_size": 16, "local_steps": 3, "base_bits": 32}
    config = make_config(["edge-00"], pins={"edge-00": pin}, planning={"checkpointing": "never"})
    edge = plan_federation(ENCODER, profiles_of(make_profile(ENCODER)), config).edges["edge-00"]
    assert pin == {name: getattr(edge, name) for name in pin}


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ({"layer.9.query": 4}, "edge-00: pin.ranks names 'layer.9.query'"),
        ({"layer.0.query": 64}, "edge-00: pin.ranks gives 'layer.0.query' rank 64, needed 1 to 32"),
        ({}, "edge-00: pin.ranks is empty"),
    ],
)
def test_pins_that_cannot_be_are_refused_by_name(ranks, words):
    config = make_config(["edge-00"], pins={"edge-00": {"ranks": ranks}})
    with pytest.raises(PlanError, match=words):
        plan_federation(ENCODER, profiles_of(make_profile(ENCODER)), config)


def test_a_menu_above_the_rank_cap_is_refused():
    config = make_config(["edge-00"], planning={"ranks": [8, 16]}, aggregation={"rank_cap": 4})
    with pytest.raises(PlanError, match=r"planning.ranks \[8, 16\] has no rank of at most 4"):
        plan_federation(ENCODER, profiles_of(make_profile(ENCODER)), config)


def test_edges_without_a_plan_are_all_named_with_limit_and_cheapest_change():
    profiles = five_edges()
    for edge_id, mib in (("edge-01", 70), ("edge-03", 20)):
        profiles[edge_id] = profiles[edge_id].model_copy(update={"memory_bytes": mib * 2**20})
    config = make_config(list(profiles), model={"base": "x", "bits": (32, 8)})
    reasons = infeasible_edges(ENCODER, profiles, config)
    assert list(reasons) == ["edge-01", "edge-03"]
    assert reasons["edge-01"].startswith("edge-01: memory: its smallest plan needs 0.0")
    assert "8-bit base" in reasons["edge-01"]
    assert reasons["edge-01"].endswith("add 4 to model.bits")
    assert "give it at least 0.0" in reasons["edge-03"]
    with pytest.raises(PlanError, match=r"edge-01: memory[\s\S]*edge-03: memory"):
        plan_federation(ENCODER, profiles, config)


def test_the_cheapest_change_makes_the_edge_feasible():
    profiles = profiles_of(make_profile(ENCODER, memory_bytes=70 * 2**20))
    refused = make_config(["edge-00"], model={"base": "x", "bits": (32, 8)})
    assert infeasible_edges(ENCODER, profiles, refused)
    changed = make_config(["edge-00"], model={"base": "x", "bits": (32, 8, 4)})
    assert not infeasible_edges(ENCODER, profiles, changed)


def test_a_deadline_no_step_can_meet_is_refused_with_the_one_that_could():
    profiles = five_edges()
    profiles["edge-02"] = throttled(profiles["edge-02"], 1000.0)
    config = make_config(list(profiles), planning={"round_seconds": 5.0})
    reasons = infeasible_edges(ENCODER, profiles, config)
    assert list(reasons) == ["edge-02"]
    needed = float(reasons["edge-02"].split("raise it to ")[1].split()[0])
    longer = make_config(list(profiles), planning={"round_seconds": needed})
    assert not infeasible_edges(ENCODER, profiles, longer)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"memory_bytes": -1}, "edge-00: its profile is refused: memory_bytes is -1"),
        ({"tokens_per_example": float("nan")}, "edge-00: its profile is refused: tokens_per_example is nan"),
        ({"bandwidth_bytes_per_second": 0.0}, "bandwidth_bytes_per_second is 0.0, needed above 0"),
        ({"scores": {"layer.0.query": [float("inf")]}}, "scores of layer.0.query is inf"),
        ({"scores": {"layer.7.query": [1.0]}}, "scores name 1 modules the base model does not have"),
    ],
)
def test_nonsense_profiles_are_refused_by_name(changes, words):
    profile = make_profile(ENCODER).model_copy(update=changes)
    with pytest.raises(PlanError, match=words):
        check_profile(profile, ENCODER)
    with pytest.raises(PlanError, match=words):
        plan_federation(ENCODER, profiles_of(profile), make_config(["edge-00"]))


def test_a_speed_that_is_no_number_is_refused_by_name():
    profile = make_profile(ENCODER)
    cost = profile.step_cost.model_copy(update={"per_token_seconds": float("nan")})
    with pytest.raises(PlanError, match=r"edge-00: .*step_cost\.per_token_seconds is nan"):
        check_profile(profile.model_copy(update={"step_cost": cost}), ENCODER)


def test_a_solver_out_of_time_falls_back_to_the_greedy_plan_and_says_so():
    shape = tiny_model(blocks=3)
    profile = make_profile(shape, num_examples=40, num_validation_examples=0, bandwidth_bytes_per_second=1e5)
    planning = {"round_seconds": 0.45, "ranks": [2, 4, 8], "batch_sizes": [2, 4, 8]}
    exact, late, greedy = (
        plan_federation(shape, profiles_of(profile), make_config(["edge-00"], planning=planning | changes))
        for changes in ({}, {"solver_seconds": 1e-6}, {"solver": "greedy"})
    )
    assert exact.solver.startswith("milp, every edge within")
    assert late.solver.startswith("greedy on 1 of 1 edges (from edge-00 on), where milp ran out of")
    assert late.edges == greedy.edges != exact.edges


def test_modules_too_small_for_a_rank_do_not_get_it():
    shape = tiny_model()
    profile = make_profile(shape, num_examples=20)
    config = make_config(["edge-00"], planning={"ranks": [4, 8, 16], "round_seconds": 600.0})
    ranks = plan_federation(shape, profiles_of(profile), config).edges["edge-00"].ranks
    assert set(ranks.values()) <= {4, 8}
