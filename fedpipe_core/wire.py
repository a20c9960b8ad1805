"""Adapters as bytes: one safetensors file per adapter, equal bytes for equal values."""

import json
from typing import Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fedpipe_core.adapters import Adapter
from fedpipe_core.errors import IntegrityError
from fedpipe_core.low_rank import LowRank

WireDtype = Literal["fp32", "bf16", "int8", "nf4"]
_PLAIN = {"fp32": torch.float32, "bf16": torch.bfloat16}


def encode_adapter(adapter: Adapter, dtype: WireDtype) -> bytes:
    """The adapter as one safetensors file."""
    tensors = {name: value.detach().to(_PLAIN[dtype]).contiguous() for name, value in _named_tensors(adapter).items()}
    return safetensors.torch.save(tensors, {"fedpipe": json.dumps({"dtype": dtype, "format": 1})})


def decode_adapter(data: bytes) -> Adapter:
    """The adapter in float32. Raises IntegrityError on bytes `encode_adapter` cannot have written."""
    try:
        tensors = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise IntegrityError(
            f"adapter of {len(data)} bytes is not a safetensors file ({error}); fetch it again"
        ) from None
    head = {name.removeprefix("head/"): value.float() for name, value in tensors.items() if name.startswith("head/")}
    modules = sorted({name[len("factors/") : -2] for name in tensors if name.startswith("factors/")})
    return Adapter(
        {m: LowRank(tensors[f"factors/{m}/B"].float(), tensors[f"factors/{m}/A"].float()) for m in modules}, head
    )


def _named_tensors(adapter: Adapter) -> dict[str, Tensor]:
    tensors = {f"head/{name}": value for name, value in adapter.head.items()}
    for module, factors in adapter.factors.items():
        tensors[f"factors/{module}/B"], tensors[f"factors/{module}/A"] = factors.B, factors.A
    return tensors
