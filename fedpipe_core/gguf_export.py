"""GGUF exports, which llama.cpp and all that builds on it runs: F16, and matrices in Q8_0 (8 bits, blocks of 32).

One file holds weights, sizes and tokenizer. Names of tensors and fields are the `gguf` package's; what it does not say
is how a tensor is turned for an architecture, which stands here. Matrices are merged and written one at a time.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fedpipe_core.errors import ModelError
from fedpipe_core.export import ExportScheme, TunedModel
from fedpipe_core.gguf_tokenizer import tokenizer_kind, write_tokenizer_fields
from fedpipe_core.merged_weights import MergedWeights
from fedpipe_core.model import Base
from fedpipe_core.model_weights import auto_class

FILE = "model.gguf"
ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3", "gpt2": "GPT2"}
_Q8_BLOCK = 32
_KEPT_DENSE = "position_embd"  # llama.cpp adds its rows up in float32


def check_gguf(base: Base) -> None:
    """Raise ModelError when the base is none that is written here; every supported model is also read by llama.cpp."""
    config: Any = base.model.config
    kind, where = config.model_type, f"model in {base.folder}"
    if kind not in ARCHITECTURES:
        raise ModelError(
            f"{where} is of type {kind}, which cannot be written as GGUF here; leave gguf out of release.exports, or "
            f"tune one of {', '.join(ARCHITECTURES)}"
        )
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope != "default":
        raise ModelError(
            f"{where} scales its positions by {rope}, which is not written as GGUF here; leave gguf out of "
            "release.exports"
        )
    tokenizer_kind(base.tokenizer)


def _write(quantization: str, tuned: TunedModel, folder: Path) -> None:
    """Write `model.gguf`; `quantization` is F16 or Q8_0. Vectors stay F32, and matrices that blocks do not fit F16."""
    import gguf

    check_gguf(tuned.base)
    folder.mkdir(parents=True, exist_ok=True)
    config: Any = tuned.base.model.config
    architecture = gguf.MODEL_ARCH[ARCHITECTURES[config.model_type]]
    writer: Any = gguf.GGUFWriter(folder / FILE, gguf.MODEL_ARCH_NAMES[architecture])
    _write_sizes(writer, config, f"MOSTLY_{quantization}")
    template = tuned.chat_template or tuned.base.tokenizer.chat_template
    write_tokenizer_fields(writer, tuned.base.tokenizer, tuned.base.vocabulary, template)
    weights = tuned.weights
    names = _gguf_names(weights, architecture, config.num_hidden_layers)
    kinds = {name: _tensor_type(weights, name, names[name], quantization) for name in names}
    for name, written in names.items():
        shape = gguf.quant_shape_to_byte_shape(_turned_shape(weights, name), kinds[name])
        size = int(np.prod(shape))  # bytes: the shape's last part counts them
        writer.add_tensor_info(written, shape, np.dtype(np.uint8), size, raw_dtype=kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in names:
        values = _turned(weights.tensor(name).detach().float().numpy(), weights, name)
        writer.write_tensor_data(gguf.quantize(np.ascontiguousarray(values), kinds[name]))
    writer.close()


def _write_sizes(writer: Any, config: Any, file_type: str) -> None:
    import gguf

    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    writer.add_name(f"{config.model_type} tuned by FedPipe")
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(heads)
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(kv_heads or heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_rope_dimension_count(width)
    writer.add_key_length(width)
    writer.add_value_length(width)


def _gguf_names(weights: MergedWeights, architecture: Any, blocks: int) -> dict[str, str]:
    """What GGUF calls each tensor. Raises ModelError where it knows none of that name."""
    import gguf

    known = gguf.get_tensor_name_map(architecture, blocks)
    names = {name: known.get_name(name, try_suffixes=(".weight", ".bias")) for name in weights.shapes}
    unknown = [name for name, found in names.items() if found is None]
    if unknown:
        raise ModelError(
            f"GGUF has no name for {len(unknown)} tensors of {weights.base.folder}, such as {unknown[0]}; leave gguf "
            "out of release.exports"
        )
    return {name: str(found) for name, found in names.items()}


def _tensor_type(weights: MergedWeights, name: str, written: str, quantization: str) -> Any:
    import gguf

    shape = _turned_shape(weights, name)
    if len(shape) < 2 or written.startswith(_KEPT_DENSE):
        return gguf.GGMLQuantizationType.F32
    fits = quantization != "Q8_0" or shape[-1] % _Q8_BLOCK == 0
    return gguf.GGMLQuantizationType[quantization if fits else "F16"]


def _turned_shape(weights: MergedWeights, name: str) -> tuple[int, ...]:
    shape = tuple(weights.shapes[name])
    return shape[::-1] if _is_transposed(weights, name) else shape


def _turned(values: "np.ndarray[Any, Any]", weights: MergedWeights, name: str) -> "np.ndarray[Any, Any]":
    """A tensor as llama.cpp reads it: GPT-2's Conv1D as (out, in), Llama's queries and keys in its rotary order."""
    if _is_transposed(weights, name):
        return values.T
    config: Any = weights.base.model.config
    if ARCHITECTURES[config.model_type] != "LLAMA":
        return values
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    return values if heads is None else rotary_pairs(values, heads)


def rotary_pairs(values: "np.ndarray[Any, Any]", heads: int) -> "np.ndarray[Any, Any]":
    """Rows (heads · width, ...) so that the two parts of a rotated pair lie side by side, as `ggml_rope` turns them.

    `transformers` rotates row i of a head with row i + width / 2.
    """
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def _is_transposed(weights: MergedWeights, name: str) -> bool:
    module, _, leaf = name.rpartition(".")
    owner = weights.base.model.get_submodule(module)
    return leaf == "weight" and type(owner).__name__ == "Conv1D"


def _load(tuned: TunedModel, folder: Path) -> nn.Module:
    """By the reader of `transformers`, which makes dense weights of the file: what it answers is the file's, what it
    takes to answer is not."""
    import torch

    load: Callable[..., Any] = auto_class(tuned.task).from_pretrained
    model: nn.Module = load(folder, gguf_file=FILE, dtype=torch.float32, local_files_only=True).eval()
    return model


GGUF_SCHEMES: dict[str, ExportScheme] = {
    "gguf-f16": ExportScheme(partial(_write, "F16"), _load, check_gguf),
    "gguf-q8_0": ExportScheme(partial(_write, "Q8_0"), _load, check_gguf),
}
