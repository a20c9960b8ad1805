import pytest
import torch
from bitsandbytes.nn import Int8Params, Linear8bitLt
from torch import nn

from fedpipe_core.activation_cost import saved_tensor_bytes
from fedpipe_core.architecture import adaptable_modules
from fedpipe_core.int8_linear import FrozenInt8Linear


def quantized(dense: nn.Linear) -> FrozenInt8Linear:
    module = Linear8bitLt(dense.in_features, dense.out_features, dense.bias is not None, has_fp16_weights=False)
    module.weight = Int8Params(dense.weight.detach().clone(), has_fp16_weights=False, requires_grad=False)
    module.bias = dense.bias
    module = module.to("cpu").requires_grad_(False)
    module.__class__ = FrozenInt8Linear
    return module


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_an_int8_product_is_near_the_dense_one(bias, training):
    torch.manual_seed(0)
    dense = nn.Linear(48, 32, bias=bias)
    inputs = torch.randn(5, 7, 48)
    found = quantized(dense).train(training)(inputs)
    assert found.shape == (5, 7, 32)
    assert (found - dense(inputs)).norm() < 0.01 * dense(inputs).norm()


def test_the_gradient_is_that_of_the_dequantized_matrix():
    torch.manual_seed(0)
    module = quantized(nn.Linear(6, 4)).double()
    inputs = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, (inputs,), atol=1e-6)


def test_a_frozen_int8_matrix_keeps_its_weights_alone():
    module = quantized(nn.Linear(64, 32))
    inputs = torch.randn(100, 64, requires_grad=True)
    kept, _ = saved_tensor_bytes(lambda: module(inputs), module.parameters())
    assert kept <= 4 * 32  # the scales


def test_int8_bases_are_made_of_such_matrices(tiny_base):
    model = tiny_base("gpt2", 8).model
    assert all(isinstance(model.get_submodule(name), FrozenInt8Linear) for name in adaptable_modules(model))
