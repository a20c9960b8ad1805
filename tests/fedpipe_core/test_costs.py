"""What a round is predicted to cost."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning_cases import make_profile, small_encoder, tiny_model

from fedpipe_core.adapters import initial_adapter
from fedpipe_core.costs import SCORED_AT_ONCE, CostModel, Work, base_bytes, predict, probed_bits
from fedpipe_core.profile_schemas import ActivationCost, StepCost
from fedpipe_core.wire import encode_adapter

ENCODER = small_encoder()
PROFILE = make_profile(ENCODER)
TOP, BOTTOM = "layer.5.query", "layer.0.query"


def test_peak_memory_adds_up_base_adapters_and_activations():
    shape = tiny_model()
    profile = make_profile(
        shape,
        activation_cost=ActivationCost(
            fixed_bytes=1000, per_token_bytes=64.0, per_token_module_bytes={"layer.1.in": 32.0}
        ),
        fixed_bytes=5000,
    )
    base = 4 * (4 * 128) + 4 * 100
    adapter, tail = 16 * 2 * 24, 4 * (4 - 2) * 24
    tokens = 2 * 24
    activations = 1000 + tokens * (64 / 2 + 2 * 4 * 24 + 32 + 4 * 2)
    head = 16 * 27
    cost = predict(shape, profile, {"layer.1.in": 2}, 2, 1, 32, global_ranks={"layer.1.in": 4})
    assert cost.peak_memory_bytes == base + adapter + tail + activations + head + 5000


@pytest.mark.parametrize(("value_bytes", "bytes_per_logit"), [(4, 12), (2, 16)])
def test_a_language_models_logits_exist_for_some_tokens_at_once(value_bytes, bytes_per_logit):
    shape = tiny_model().model_copy(update={"scored_positions": "token", "output_features": 10**6})
    costs = CostModel(shape, make_profile(shape, value_bytes=value_bytes))
    few, more, many = (costs.backbone_activation_bytes(tokens, 0, False) for tokens in (1, 2, 10 * SCORED_AT_ONCE))
    assert more - few == pytest.approx(bytes_per_logit * 10**6, rel=0.01)
    assert many == pytest.approx(bytes_per_logit * 10**6 * SCORED_AT_ONCE, rel=0.01)


@pytest.mark.parametrize("value_bytes", [4, 2])
def test_an_adapter_keeps_values_of_its_base(value_bytes):
    shape, name = tiny_model(), "layer.1.in"
    nothing_kept = ActivationCost(fixed_bytes=0, per_token_bytes=0.0, per_token_module_bytes={})
    costs = CostModel(shape, make_profile(shape, value_bytes=value_bytes, activation_cost=nothing_kept))
    assert costs.adapter_activation_bytes(name, 2) == value_bytes * (shape.modules[name].in_features + 2)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_that_end_at_the_last_block_cost_the_forward_pass_and_one_block(checkpointing):
    shape = tiny_model()
    cost = StepCost(fixed_seconds=0.5, per_token_seconds=1.0, per_token_rank_seconds=0.0, forward_share=0.25)
    costs = CostModel(shape, make_profile(shape, step_cost=cost, tokens_per_example=1.0))
    last = shape.num_blocks - 1
    again = 0.25 / shape.num_blocks if checkpointing else 0.0
    work = Work({}, 4, 1, 32, checkpointing=checkpointing)
    assert costs.step_seconds(work, last) == pytest.approx(0.5 + 4 * (0.25 + 0.75 / shape.num_blocks + again))


def test_round_seconds_add_up_steps_transfer_and_validation():
    shape = tiny_model()
    profile = make_profile(
        shape,
        num_validation_examples=10,
        bandwidth_bytes_per_second=1000.0,
        step_cost=StepCost(fixed_seconds=0.5, per_token_seconds=1e-2, per_token_rank_seconds=1e-4),
    )
    cost = predict(shape, profile, {"layer.0.in": 2}, 4, 3, 32)
    tokens = 4 * 16
    steps = 3 * (0.5 + tokens * (1e-2 + 1e-4 * 2 * 24))
    transfer = (cost.upload_bytes + cost.download_bytes) / 1000.0
    assert cost.round_seconds == pytest.approx(steps + transfer + 10 * 16 * 1e-2 / 2)


def test_an_adapter_takes_time_of_its_own_whatever_its_rank_and_a_frozen_one_two_thirds():
    shape = tiny_model()
    cost = StepCost(
        fixed_seconds=0.0, per_token_seconds=1.0, per_token_feature_seconds=1e-2, per_token_rank_seconds=1e-3
    )
    model = CostModel(shape, make_profile(shape, step_cost=cost), {"layer.0.in": 4})
    trained, tail = 24 * (1e-2 + 1e-3 * 3), 24 * (1e-2 + 1e-3)
    assert model.adapter_seconds_per_token("layer.0.in", 3, 0, False) == pytest.approx(trained + tail * 2 / 3)
    assert model.adapter_seconds_per_token("layer.1.in", 0, 0, False) == 0


def test_adapters_in_the_last_block_alone_cost_less_time_and_memory_than_in_the_first():
    top, bottom = (predict(ENCODER, PROFILE, {name: 8}, 16, 10, 32) for name in (TOP, BOTTOM))
    assert top.peak_memory_bytes < bottom.peak_memory_bytes
    assert top.round_seconds < bottom.round_seconds


def test_checkpointing_trades_seconds_for_memory():
    kept = predict(ENCODER, PROFILE, {BOTTOM: 8, TOP: 8}, 16, 10, 32)
    recomputed = predict(ENCODER, PROFILE, {BOTTOM: 8, TOP: 8}, 16, 10, 32, checkpointing=True)
    assert recomputed.peak_memory_bytes < kept.peak_memory_bytes
    assert recomputed.round_seconds > kept.round_seconds


def test_a_four_bit_base_with_double_quantization_takes_half_a_byte_and_an_eighth_of_a_bit_per_parameter():
    shape = ENCODER.model_copy(update={"other_parameters": 0, "head_parameters": 0, "modules": {}})
    assert CostModel(shape, PROFILE).resident_bytes(4) == pytest.approx(shape.linear_parameters * (4 + 0.127) / 8)


@pytest.mark.parametrize(
    ("module", "checkpointing", "products"), [(BOTTOM, False, 2), (BOTTOM, True, 3), (TOP, False, 7 / 6)]
)
def test_a_quantized_base_is_dequantized_before_every_product_whatever_the_batch(module, checkpointing, products):
    cost = PROFILE.step_cost.model_copy(update={"dequantization_seconds": {4: 2.0}})
    slower = PROFILE.model_copy(update={"step_cost": cost})
    for batch_size in (4, 32):
        dense, quantized = (
            predict(ENCODER, slower, {module: 8}, batch_size, 10, bits, checkpointing=checkpointing) for bits in (32, 4)
        )
        assert quantized.round_seconds - dense.round_seconds == pytest.approx(10 * products)


def test_a_batch_larger_than_the_data_costs_what_the_data_fill():
    few = make_profile(ENCODER, num_examples=5)
    assert predict(ENCODER, few, {TOP: 8}, 32, 1, 32) == predict(ENCODER, few, {TOP: 8}, 5, 1, 32)


def test_a_frozen_tail_costs_memory_time_and_download_but_no_upload():
    without = predict(ENCODER, PROFILE, {TOP: 4}, 16, 10, 32)
    tail = predict(ENCODER, PROFILE, {TOP: 4}, 16, 10, 32, global_ranks={TOP: 32, BOTTOM: 32})
    assert tail.peak_memory_bytes > without.peak_memory_bytes
    assert tail.round_seconds > without.round_seconds
    assert tail.download_bytes > without.download_bytes
    assert tail.upload_bytes == without.upload_bytes


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8", "nf4"])
def test_upload_bytes_match_the_encoded_adapter(dtype):
    ranks = dict.fromkeys(list(ENCODER.modules)[:6], 4)
    shape = ENCODER.model_copy(update={"head_parameters": 0})
    adapter = initial_adapter({name: shape.modules[name] for name in ranks}, 4, {}, seed=0)
    encoded = len(encode_adapter(adapter, dtype))
    costs = CostModel(shape, PROFILE, wire_dtype=dtype, global_dtype=dtype)
    assert costs.upload_bytes(ranks) == costs.download_bytes(ranks) == pytest.approx(encoded, rel=0.05)


def test_training_b_alone_saves_gradients_input_time_and_upload_but_no_download():
    shape, name = tiny_model(), "layer.1.in"
    both, alone = (CostModel(shape, make_profile(shape), {name: 2}, frozen_a=frozen) for frozen in (False, True))
    assert both.adapter_bytes(name, 2) == 2 * (16 + 8) * 16
    assert alone.adapter_bytes(name, 2) == 2 * (16 * 16 + 8 * 4)
    assert alone.adapter_activation_bytes(name, 2) == 2 * alone.profile.value_bytes
    seconds = [costs.adapter_seconds_per_token(name, 2, 0, checkpointing=False) for costs in (both, alone)]
    assert seconds[1] == pytest.approx(seconds[0] * (16 * 3 + 8 * 2) / (24 * 3))
    assert both.upload_bytes({name: 2}) - alone.upload_bytes({name: 2}) == 2 * 8 * 2
    assert both.download_bytes({name: 2}) == alone.download_bytes({name: 2}) == both.upload_bytes({name: 2})


@settings(deadline=None, max_examples=40)
@given(
    rank=st.sampled_from([2, 4, 8]),
    batch_size=st.sampled_from([4, 8, 16]),
    steps=st.integers(1, 20),
    bits=st.sampled_from([4, 8, 32]),
    checkpointing=st.booleans(),
)
def test_more_work_never_costs_less(rank, batch_size, steps, bits, checkpointing):
    model = CostModel(ENCODER, PROFILE, dict.fromkeys(ENCODER.modules, 32))
    cost = model.predict(Work({TOP: rank}, batch_size, steps, bits, checkpointing))
    for more in (
        Work({TOP: 2 * rank}, batch_size, steps, bits, checkpointing),
        Work({TOP: rank, BOTTOM: rank}, batch_size, steps, bits, checkpointing),
        Work({TOP: rank}, 2 * batch_size, steps, bits, checkpointing),
    ):
        assert model.predict(more).peak_memory_bytes >= cost.peak_memory_bytes
        assert model.predict(more).round_seconds >= cost.round_seconds
    longer = model.predict(Work({TOP: rank}, batch_size, steps + 1, bits, checkpointing))
    assert longer.round_seconds > cost.round_seconds


def test_peak_memory_counts_the_rows_that_go_through_the_model_at_once():
    work = Work({TOP: 4}, 32, 10, 32)
    whole, parts = CostModel(ENCODER, PROFILE), CostModel(ENCODER, PROFILE, micro_batch_size=8)
    eight = Work({TOP: 4}, 8, 10, 32)
    assert parts.predict(work).peak_memory_bytes == whole.predict(eight).peak_memory_bytes
    assert parts.predict(work).round_seconds == whole.predict(work).round_seconds


def test_an_edge_is_profiled_on_the_widest_base_that_leaves_room_for_the_probes():
    probes = 16 * 8 * sum(module.features for module in ENCODER.modules.values())
    for bits in (32, 8, 4):
        enough = base_bytes(ENCODER, bits, 4) + probes
        assert probed_bits(ENCODER, (4, 32, 8), 8, 4, enough) == bits
    assert probed_bits(ENCODER, (4, 32, 8), 8, 4, 1) == 4
