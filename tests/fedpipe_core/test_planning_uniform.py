"""The uniform baseline: one plan for all edges, dictated by the weakest."""

import pytest
from planning_cases import GIB, make_config, make_profile, small_encoder, throttled, tiny_model

from fedpipe_core.errors import PlanError
from fedpipe_core.methods import attention_projections, bottleneck_places, bottlenecks
from fedpipe_core.planning import plan_federation
from fedpipe_core.profile_schemas import ModuleShape

ENCODER = small_encoder()
EDGES = ["edge-00", "edge-01"]
FEDLORA = {"method": "fedlora", "aggregation": {"rule": "fedavg"}}


def profiles(weakest_bytes: int):
    strong = make_profile(ENCODER, "edge-00")
    weak = throttled(make_profile(ENCODER, "edge-01", memory_bytes=weakest_bytes), 4.0)
    return {"edge-00": strong, "edge-01": weak}


def test_every_edge_gets_the_same_ranks_batch_and_bits():
    plan = plan_federation(ENCODER, profiles(GIB), make_config(EDGES, **FEDLORA))
    first, second = plan.edges.values()
    assert first.ranks == second.ranks
    assert len(set(first.ranks.values())) == 1
    assert (first.batch_size, first.base_bits) == (second.batch_size, second.base_bits)


def test_the_slowest_edge_is_waited_for():
    plan = plan_federation(ENCODER, profiles(GIB), make_config(EDGES, **FEDLORA))
    fast, slow = (plan.edges[edge_id].predicted.round_seconds for edge_id in EDGES)
    assert slow > 3 * fast
    assert plan.round_seconds == slow
    assert all(edge.under_training == 0 for edge in plan.edges.values())


def test_the_weakest_edges_memory_dictates_rank_and_batch():
    large, small = (
        plan_federation(ENCODER, profiles(limit), make_config(EDGES, **FEDLORA)).edges["edge-00"]
        for limit in (GIB, 130 * 2**20)
    )
    assert (large.batch_size, max(large.ranks.values()), large.base_bits) == (32, 16, 32)
    assert small.predicted.peak_memory_bytes < large.predicted.peak_memory_bytes
    assert (small.base_bits, max(small.ranks.values()), small.batch_size) < (32, 16, 32)


def test_an_edge_that_holds_no_uniform_plan_is_named():
    with pytest.raises(PlanError, match=r"edge-01: memory: the smallest uniform plan .* but it has 0\.0195 GiB"):
        plan_federation(ENCODER, profiles(20 * 2**20), make_config(EDGES, **FEDLORA))


def test_pins_by_hand_are_refused():
    config = make_config(EDGES, **FEDLORA, pins={"edge-01": {"batch_size": 8}})
    with pytest.raises(PlanError, match="edge-01 has a pin; remove the pin"):
        plan_federation(ENCODER, profiles(GIB), config)


def test_attention_projections_are_found_by_the_name_of_their_block():
    module = ModuleShape(out_features=8, in_features=8, layer=0)
    names = ["encoder.0.attention.self.query", "encoder.0.output.dense", "layers.0.self_attn.q_proj", "h.0.attn.c_attn"]
    shape = tiny_model().model_copy(update={"modules": dict.fromkeys(names, module)})
    assert attention_projections(shape) == [names[0], names[2], names[3]]
    assert attention_projections(tiny_model()) == list(tiny_model().modules)


def test_training_every_parameter_is_priced_by_all_parameters():
    plan = plan_federation(ENCODER, profiles(GIB), make_config(EDGES, method="full"))
    parameters = ENCODER.linear_parameters + ENCODER.other_parameters + ENCODER.head_parameters
    lora = plan_federation(ENCODER, profiles(GIB), make_config(EDGES, **FEDLORA)).edges["edge-00"]
    full = plan.edges["edge-00"]
    assert full.ranks == {}
    assert full.base_bits == 32
    assert full.predicted.upload_bytes == full.predicted.download_bytes == pytest.approx(2 * parameters, rel=1e-3)
    assert full.predicted.peak_memory_bytes > 16 * parameters
    assert full.predicted.round_seconds > lora.predicted.round_seconds


def test_training_every_parameter_needs_a_dense_base():
    config = make_config(EDGES, method="full", model={"base": "somewhere", "bits": [4]})
    with pytest.raises(PlanError, match=r"method full trains every parameter on a base of 32 bits, .* add one"):
        plan_federation(ENCODER, profiles(GIB), config)


def test_an_edge_that_does_not_hold_the_method_is_refused_by_name_or_dropped():
    refused = make_config(EDGES, method="full")
    with pytest.raises(PlanError, match=r"edge-01: memory: the smallest uniform plan \(every parameter, batch 8"):
        plan_federation(ENCODER, profiles(GIB // 4), refused)
    dropped = make_config(EDGES, method="full", planning={"unfit_edges": "drop"})
    plan = plan_federation(ENCODER, profiles(GIB // 4), dropped)
    assert list(plan.edges) == ["edge-00"]
    assert "edge-01: memory" in plan.dropped["edge-01"]
    with pytest.raises(PlanError, match=r"edge-00: memory.*\n.*edge-01: memory"):
        plan_federation(ENCODER, {e: make_profile(ENCODER, e, memory_bytes=2**20) for e in EDGES}, dropped)


def test_importance_plans_too_go_on_without_an_edge_that_fits_nowhere():
    dropped = make_config(EDGES, planning={"unfit_edges": "drop"})
    alone = plan_federation(ENCODER, {"edge-00": make_profile(ENCODER, "edge-00")}, dropped)
    plan = plan_federation(ENCODER, profiles(2**20), dropped)
    assert plan.edges == alone.edges
    assert list(plan.dropped) == ["edge-01"]


def test_an_edge_that_misses_the_deadline_with_a_uniform_plan_is_named():
    config = make_config(EDGES, **FEDLORA, planning={"round_seconds": 3.0})
    with pytest.raises(PlanError, match="edge-01: deadline: its shortest round needs"):
        plan_federation(ENCODER, profiles(GIB), config)


def test_bottlenecks_start_small_in_the_last_block():
    plan = plan_federation(ENCODER, profiles(GIB), make_config(EDGES, method="fedadapter"))
    shape = bottleneck_places(ENCODER)
    assert plan.edges["edge-00"].ranks == bottlenecks(shape, 1, 8)
    assert {shape.modules[name].layer for name in plan.planned_modules} == {5}
    assert plan.edges["edge-00"].predicted.round_seconds < plan.edges["edge-01"].predicted.round_seconds
