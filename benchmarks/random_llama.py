"""A randomly initialised Llama at NF4, made on its device matrix by matrix: no more than one is ever held dense."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fedpipe_core.architecture import adaptable_modules
from fedpipe_core.model_weights import keep_weights_in_place

SPREAD = 0.02  # standard deviation of every matrix, Llama's own


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int


EIGHT_B = Shape(4096, 32, 32, 8, 14336, 128256)  # Llama 3.1 8B's
SMALL = Shape(512, 4, 8, 2, 1792, 8192)  # the same proportions


def random_llama(shape: Shape, max_tokens: int, device: torch.device, dtype: torch.dtype) -> Any:
    """The model: matrices of the blocks at NF4 with double quantization, all else dense in `dtype`; frozen."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**vars(shape), max_position_embeddings=max_tokens))
    for name in adaptable_modules(model):
        _replace(model, name, _quantized(model.get_submodule(name), device, dtype))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            _replace(model, name, nn.Parameter(_values(parameter, device, dtype), requires_grad=False))
    rotary = model.model.rotary_emb  # its frequencies are computed, not loaded
    model.model.rotary_emb = type(rotary)(model.config).to(device)
    model.is_loaded_in_4bit = True  # where PEFT looks
    keep_weights_in_place(model)
    return model.requires_grad_(False).eval()


def _quantized(linear: Any, device: torch.device, dtype: torch.dtype) -> nn.Module:
    quantized = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    dense = torch.empty(linear.weight.shape, device=device, dtype=dtype).normal_(std=SPREAD)
    weight = bitsandbytes.nn.Params4bit(dense, requires_grad=False, quant_type="nf4", module=quantized)
    quantized.weight = weight.to(device)  # quantizes
    return quantized


def _values(parameter: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A norm's ones, or a random matrix."""
    if parameter.dim() == 1:
        return torch.ones(parameter.shape, device=device, dtype=dtype)
    return torch.empty(parameter.shape, device=device, dtype=dtype).normal_(std=SPREAD)


def _replace(model: Any, name: str, value: Any) -> None:
    path = Path(name.replace(".", "/"))
    setattr(model.get_submodule(".".join(path.parent.parts)), path.name, value)
