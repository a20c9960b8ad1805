"""What a step costs, timed or declared, on models and clocks whose answer is known."""

import itertools

import pytest
from tiny_models import random_batch, tiny_examples

from fedpipe_core.architecture import model_shape
from fedpipe_core.batches import pad_batch
from fedpipe_core.step_cost import LEAST_FORWARD, MOST_FORWARD, declared_step_cost, measured_step_cost


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_measured_step_cost_has_no_negative_coefficient_and_grows_with_tokens(tiny_base, architecture):
    base = tiny_base(architecture).model
    rows = tiny_examples(32)
    cost = measured_step_cost(base, pad_batch(rows, range(2)), pad_batch(rows, range(32)))
    assert cost.fixed_seconds >= 0
    assert cost.per_token_seconds > 0
    assert cost.per_token_rank_seconds >= 0
    assert LEAST_FORWARD <= cost.forward_share <= MOST_FORWARD
    assert cost.fixed_seconds + 1000 * cost.per_token_seconds < 10
    assert not any(parameter.requires_grad for parameter in base.parameters())


def test_measured_step_cost_has_a_price_per_token_when_both_batches_are_equal(tiny_base):
    batch = random_batch(1, 4)
    assert measured_step_cost(tiny_base("bert").model, batch, batch).per_token_seconds > 0


def test_steps_that_all_take_the_same_time_cost_a_fixed_time(tiny_base):
    ticks = itertools.count()
    cost = measured_step_cost(
        tiny_base("bert").model, random_batch(1, 4), random_batch(8, 8), clock=lambda: float(next(ticks))
    )
    assert cost.fixed_seconds == pytest.approx(1.0)
    assert (cost.per_token_feature_seconds, cost.per_token_rank_seconds) == pytest.approx((0, 0), abs=1e-9)


def test_quantized_bases_are_priced_by_what_dequantization_takes(tiny_base):
    batch = random_batch(1, 4)
    added = measured_step_cost(tiny_base("gpt2").model, batch, batch, bits=(32, 16, 8, 4)).dequantization_seconds
    assert list(added) == [8, 4]
    assert all(0 < seconds < 1 for seconds in added.values())


def test_declared_step_cost_prices_a_rank_by_its_share_of_the_work(tiny_base):
    shape = model_shape(tiny_base("bert").model, labels=4)
    cost = declared_step_cost(500.0, 0.25, shape)
    assert (cost.fixed_seconds, cost.per_token_seconds) == (0.25, 1 / 500)
    # adapters as large as the matrices they stand beside cost 6 FLOPs per parameter where those cost 4
    assert cost.per_token_rank_seconds * shape.linear_parameters == pytest.approx(1.5 / 500)
