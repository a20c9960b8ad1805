"""A frozen int8 matrix that keeps nothing for the backward pass, and computes alike in training and evaluation.

bitsandbytes' own forward pass keeps the input of every matrix, although a frozen weight never needs it, where no hook
can count it; on a CPU it computes by one of two formulas, as the module's mode says. How it quantizes is left as it is.
"""

from typing import Any

import torch
from bitsandbytes.nn import Linear8bitLt
from torch import Tensor
from torch.nn import functional


class FrozenInt8Linear(Linear8bitLt):  # type: ignore[misc]
    """y = x·Wᵀ + b with W = codes·scales / 127, dequantized in the dtype of x: codes (out, in) int8, scales (out,)."""

    def forward(self, x: Tensor) -> Tensor:
        """The product for x (…, in)."""
        if self.weight.CB is not None:
            self.init_8bit_state()
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        product: Tensor = _FrozenProduct.apply(x, self.state.CB, self.state.SCB, self.bias)  # type: ignore[no-untyped-call]
        return product


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(codes, scales)
        return functional.linear(x, _dequantized(codes, scales, x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        codes, scales = ctx.saved_tensors
        return gradients[0] @ _dequantized(codes, scales, gradients[0].dtype), None, None, None


def _dequantized(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.to(dtype).mul_((scales / 127.0).to(dtype)[:, None])
