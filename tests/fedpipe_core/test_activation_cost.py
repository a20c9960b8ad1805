"""The bytes that autograd keeps, held against what one counts by hand."""

import weakref

import pytest
import torch
from tiny_models import random_batch
from torch import nn
from torch.nn import functional

from fedpipe_core.activation_cost import measured_activation_cost, saved_tensor_bytes
from fedpipe_core.architecture import adaptable_modules
from fedpipe_core.batches import Batch
from fedpipe_core.edge_model import own_head
from fedpipe_core.losses import training_loss
from fedpipe_core.model import share

FLOAT = 4


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
    cost = measured_activation_cost(base, random_batch(2, tokens), random_batch(8, tokens))
    foretold = cost.fixed_bytes + cost.per_token_bytes * 48 * tokens
    assert kept_bytes(base, random_batch(48, tokens), adapted=[]) == pytest.approx(foretold, rel=0.01)


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_an_adapter_adds_its_modules_input_unless_it_is_kept_anyway(tiny_base, architecture):
    base = tiny_base(architecture).model
    small, large = random_batch(2, 8), random_batch(8, 8)
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
    cost = measured_activation_cost(base, random_batch(2, 8), random_batch(4, 8))
    assert list(cost.per_token_module_bytes) == list(adaptable_modules(base))
    assert cost.per_token_bytes > 0
    assert not any(parameter.requires_grad for parameter in base.parameters())


def test_counting_what_autograd_keeps_holds_nothing_afterwards():
    seen = []

    def forward():
        result = torch.exp(torch.ones(3, requires_grad=True) * 2)  # keeps its own result for the backward pass
        seen.append(weakref.ref(result))
        return result.sum()

    assert saved_tensor_bytes(forward)[0] > 0
    assert seen[0]() is None
