import itertools
import weakref

import pytest
import torch
from tiny_models import tiny_examples
from torch import nn
from torch.nn import functional

from fedpipe_core.architecture import adaptable_modules, model_shape
from fedpipe_core.batches import Batch, pad_batch
from fedpipe_core.edge_model import own_head
from fedpipe_core.losses import training_loss
from fedpipe_core.model import share
from fedpipe_core.resources import (
    LEAST_FORWARD,
    MOST_FORWARD,
    container_free_bytes,
    declared_step_cost,
    free_memory_bytes,
    measured_activation_cost,
    measured_step_cost,
    saved_tensor_bytes,
)

FLOAT = 4


def batch_of(rows: int, tokens: int) -> Batch:
    generator = torch.Generator().manual_seed(rows * 100 + tokens)
    return {
        "input_ids": torch.randint(5, 65, (rows, tokens), generator=generator),
        "attention_mask": torch.ones(rows, tokens, dtype=torch.int64),
        "labels": torch.randint(4, (rows,), generator=generator),
    }


def kept_bytes(base: nn.Module, batch: Batch, adapted: list[str]) -> int:
    """What autograd keeps when the inputs of `adapted` are needed for a gradient of their own, counted by hand."""
    model = share(base)
    own_head(model)
    model.get_input_embeddings().register_forward_hook(lambda *call: call[2].requires_grad_(True))
    for name in adapted:
        module = model.get_submodule(name)
        change = nn.Parameter(torch.zeros(1, module.in_features))  # an adapter's A of rank 1
        module.register_forward_hook(
            lambda _, inputs, output, change=change: output + functional.linear(inputs[0], change).mul(0.0)
        )
    return saved_tensor_bytes(lambda: training_loss(model, batch), model.parameters())[0]


def test_saved_bytes_of_a_small_network_are_what_one_counts_by_hand():
    inputs = torch.randn(4, 8)
    weight = torch.randn(8, 16, requires_grad=True)
    # x·W keeps x for W's gradient (4·8); relu keeps its result (4·16), which the square keeps as well
    size, kept = saved_tensor_bytes(lambda: (inputs @ weight).relu().square().sum(), [weight])
    assert size == FLOAT * (4 * 8 + 4 * 16)
    assert inputs.untyped_storage().data_ptr() in kept


def test_saved_bytes_count_a_view_with_its_storage_and_leave_out_what_is_ignored():
    weight = torch.randn(8, 16, requires_grad=True)
    rows = torch.randn(4, 8, requires_grad=True)
    assert saved_tensor_bytes(lambda: torch.sum(rows @ weight))[0] == FLOAT * (4 * 8 + 8 * 16)
    assert saved_tensor_bytes(lambda: torch.sum(rows @ weight), [weight])[0] == FLOAT * 4 * 8

    def thrice() -> torch.Tensor:
        return torch.sum(rows @ weight + rows[:2].sum() * (rows.T @ rows).sum())

    assert saved_tensor_bytes(thrice, [weight])[0] == FLOAT * (4 * 8 + 1 + 1)  # `rows` once, and the product's factors


def test_saved_bytes_of_a_forward_pass_without_gradients_are_none():
    assert saved_tensor_bytes(lambda: torch.sum(torch.ones(3) * torch.ones(3))) == (0, set())


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("tokens", [8, 24])
def test_activation_cost_of_two_sizes_foretells_a_third(tiny_base, architecture, tokens):
    base = tiny_base(architecture).model
    cost = measured_activation_cost(base, batch_of(2, tokens), batch_of(8, tokens))
    foretold = cost.fixed_bytes + cost.per_token_bytes * 48 * tokens
    assert kept_bytes(base, batch_of(48, tokens), adapted=[]) == pytest.approx(foretold, rel=0.01)


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_an_adapter_adds_its_modules_input_unless_it_is_kept_anyway(tiny_base, architecture):
    base = tiny_base(architecture).model
    small, large = batch_of(2, 8), batch_of(8, 8)
    cost = measured_activation_cost(base, small, large)
    plain = kept_bytes(base, large, adapted=[])
    for name in adaptable_modules(base):
        added = kept_bytes(base, large, adapted=[name]) - plain
        expected = cost.per_token_module_bytes[name] * 64
        rank_one = FLOAT * base.get_submodule(name).in_features  # its A, which lies outside the model's parameters
        assert added == pytest.approx(expected + rank_one, abs=FLOAT * 2)
    assert 0.0 in cost.per_token_module_bytes.values()


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_activation_cost_names_every_module_at_every_bit_width(tiny_base, bits):
    base = tiny_base("gpt2", bits).model
    cost = measured_activation_cost(base, batch_of(2, 8), batch_of(4, 8))
    assert list(cost.per_token_module_bytes) == list(adaptable_modules(base))
    assert cost.per_token_bytes > 0
    assert not any(parameter.requires_grad for parameter in base.parameters())


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
    batch = batch_of(1, 4)
    assert measured_step_cost(tiny_base("bert").model, batch, batch).per_token_seconds > 0


def test_steps_that_all_take_the_same_time_cost_a_fixed_time(tiny_base):
    ticks = itertools.count()
    cost = measured_step_cost(tiny_base("bert").model, batch_of(1, 4), batch_of(8, 8), clock=lambda: float(next(ticks)))
    assert cost.fixed_seconds == pytest.approx(1.0)
    assert (cost.per_token_feature_seconds, cost.per_token_rank_seconds) == pytest.approx((0, 0), abs=1e-9)


def test_quantized_bases_are_priced_by_what_dequantization_takes(tiny_base):
    batch = batch_of(1, 4)
    added = measured_step_cost(tiny_base("gpt2").model, batch, batch, bits=(32, 16, 8, 4)).dequantization_seconds
    assert list(added) == [8, 4]
    assert all(0 < seconds < 1 for seconds in added.values())


def test_declared_step_cost_prices_a_rank_by_its_share_of_the_work(tiny_base):
    shape = model_shape(tiny_base("bert").model, labels=4)
    cost = declared_step_cost(500.0, 0.25, shape)
    assert (cost.fixed_seconds, cost.per_token_seconds) == (0.25, 1 / 500)
    # adapters as large as the matrices they stand beside cost 6 FLOPs per parameter where those cost 4
    assert cost.per_token_rank_seconds * shape.linear_parameters == pytest.approx(1.5 / 500)


def test_free_memory_of_the_machine_is_a_sensible_number():
    assert 2**20 < free_memory_bytes(torch.device("cpu")) < 2**50


def test_a_containers_limit_counts_cached_files_as_free(tmp_path):
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 150\n")
    assert container_free_bytes(tmp_path) == 450
    (tmp_path / "memory.current").write_text("1300\n")
    assert container_free_bytes(tmp_path) == 0


def test_a_container_without_a_limit_says_nothing(tmp_path):
    assert container_free_bytes(tmp_path) is None
    for name, text in {"memory.max": "max", "memory.current": "700", "memory.stat": ""}.items():
        (tmp_path / name).write_text(text)
    assert container_free_bytes(tmp_path) is None


def test_counting_what_autograd_keeps_holds_nothing_afterwards():
    seen = []

    def forward():
        result = torch.exp(torch.ones(3, requires_grad=True) * 2)  # keeps its own result for the backward pass
        seen.append(weakref.ref(result))
        return result.sum()

    assert saved_tensor_bytes(forward)[0] > 0
    assert seen[0]() is None
