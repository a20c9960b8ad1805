"""The base model in memory: how it is loaded at a bit width, and how many edges share it.

A base is loaded once per bit width; `share` gives every edge a module tree of its own over the same frozen tensors.
Where it lies is `base_folder`'s business, how its weights are read `model_weights`', what it is made of
`architecture`'s, what an edge trains `edge_model`'s.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedpipe_core.allocator import return_freed_memory
from fedpipe_core.architecture import model_shape, predicts_tokens
from fedpipe_core.base_folder import base_sha256, resolve_base
from fedpipe_core.config import ModelSpec
from fedpipe_core.errors import ModelError
from fedpipe_core.model_weights import empty_model, load_weights
from fedpipe_core.profile_schemas import ModelShape
from fedpipe_core.startup import import_libraries, quiet_transformers


@dataclass(frozen=True)
class Base:
    """A frozen base model in memory. `folder` holds its files, `sha256` names their content."""

    model: nn.Module
    tokenizer: Any
    folder: Path
    sha256: str
    bits: int

    @property
    def vocabulary(self) -> int:
        """How many tokens the model knows."""
        return int(self.model.get_input_embeddings().num_embeddings)  # type: ignore[operator]


def load_base(spec: ModelSpec, labels: int | None, bits: int, seed: int) -> Base:
    """Load the base at a bit width: 32 and 16 dense, 8 int8, 4 NF4 with double quantization; the head stays dense.

    Every parameter is frozen and dropout is off, so a forward pass is a function of weights and input alone. A
    classifier's head that the folder lacks, or that answers another number of labels, is drawn from `seed`.

    Raises ModelError when the folder cannot be read as a model of the configured task.
    """
    return_freed_memory()
    import_libraries()
    folder = resolve_base(spec.base)
    tokenizer = _load_tokenizer(folder, spec)
    model = load_weights(folder, spec, labels, bits, seed)
    _agree_on_padding(model, tokenizer, folder)
    _turn_dropout_off(model)
    model.requires_grad_(False)
    return Base(model, tokenizer, folder, base_sha256(folder), bits)


def base_shape(spec: ModelSpec, labels: int | None) -> ModelShape:
    """What the cost model needs to know of a base, from its config alone: no weight is read.

    Raises ModelError when there is no such base, or its weights are quantized already.
    """
    quiet_transformers()
    return model_shape(empty_model(resolve_base(spec.base), spec, labels), labels)


def share(model: nn.Module) -> nn.Module:
    """Copy the module tree but not the tensors: adapters put on the copy leave the original and its siblings alone."""
    tensors = [*model.parameters(), *model.buffers()]
    shared: dict[int, Any] = {id(tensor): tensor for tensor in tensors}
    for module in model.modules():
        # bitsandbytes keeps 4-bit scales in `quant_state`, and int8 weights in `state` beside what a call leaves there
        for kept in (getattr(module, "quant_state", None), *_tensors_of(getattr(module, "state", None))):
            shared[id(kept)] = kept
    return copy.deepcopy(model, shared)


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's parameters."""
    return next(model.parameters()).device


def _tensors_of(state: Any) -> list[Tensor]:
    return [value for value in getattr(state, "__dict__", {}).values() if isinstance(value, Tensor)]


def _load_tokenizer(folder: Path, spec: ModelSpec) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=spec.trust_remote_code, local_files_only=True)
    except Exception as error:
        raise ModelError(f"tokenizer in {folder} cannot be loaded: {' '.join(str(error).split())[:300]}") from None


def _agree_on_padding(model: Any, tokenizer: Any, folder: Path) -> None:
    """Decoder classifiers find an example's last token by the pad id, so model and tokenizer must agree on one."""
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ModelError(
                f"tokenizer in {folder} has neither a pad token nor an end-of-sequence token; add one to its files"
            )
        tokenizer.pad_token = tokenizer.eos_token
    rows = model.get_input_embeddings().num_embeddings
    if tokenizer.pad_token_id >= rows:
        raise ModelError(
            f"tokenizer in {folder} pads with id {tokenizer.pad_token_id} but the model knows {rows} tokens; "
            "set `pad_token` in its tokenizer_config.json to a token of the model"
        )
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if not predicts_tokens(model):
        model.config.get_text_config().use_cache = False  # it never continues a text; the cache holds memory


def _turn_dropout_off(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for key, value in vars(module).items():
            if "drop" in key and isinstance(value, float):  # many architectures keep a rate and call the function
                setattr(module, key, 0.0)
