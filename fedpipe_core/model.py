"""The base model in memory: how it is loaded at a bit width, and how many edges share it.

A base is loaded once per bit width; `share` gives every edge a module tree of its own over the same frozen tensors.
Where it lies is `base_folder`'s business, what it is made of `architecture`'s, what an edge trains `edge_model`'s.
"""

import copy
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedpipe_core.allocator import return_freed_memory
from fedpipe_core.architecture import (
    adaptable_modules,
    block_prefixes,
    head_modules,
    head_parameters,
    linear_size,
    model_shape,
    output_layer,
    predicts_tokens,
)
from fedpipe_core.base_folder import base_sha256, resolve_base
from fedpipe_core.config import ModelSpec
from fedpipe_core.errors import ModelError
from fedpipe_core.profile_schemas import ModelShape
from fedpipe_core.startup import import_libraries

__all__ = [
    "Base",
    "adaptable_modules",
    "auto_class",
    "base_sha256",
    "base_shape",
    "bitsandbytes_config",
    "device_of",
    "head_modules",
    "head_parameters",
    "keep_weights_in_place",
    "linear_size",
    "load_base",
    "model_shape",
    "predicts_tokens",
    "quiet_transformers",
    "resolve_base",
    "share",
]
_log = logging.getLogger(__name__)


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
    model = _load_model(folder, spec, labels, bits, seed)
    _agree_on_padding(model, tokenizer, folder)
    _turn_dropout_off(model)
    _prepare_quantized(model)
    model.requires_grad_(False)
    return Base(model, tokenizer, folder, base_sha256(folder), bits)


def base_shape(spec: ModelSpec, labels: int | None) -> ModelShape:
    """What the cost model needs to know of a base, from its config alone: no weight is read.

    Raises ModelError when there is no such base, or its weights are quantized already.
    """
    quiet_transformers()
    return model_shape(_empty_model(resolve_base(spec.base), spec, labels), labels)


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


def auto_class(task: str) -> Any:
    """The class of `transformers` that loads a model of the task from a folder."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForCausalLM if task == "causal-lm" else AutoModelForSequenceClassification


def _load_model(folder: Path, spec: ModelSpec, labels: int | None, bits: int, seed: int) -> nn.Module:
    quiet_transformers()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {32: torch.float32, 16: torch.bfloat16}.get(bits, torch.bfloat16 if device == "cuda" else torch.float32)
    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True}
    options |= {} if labels is None else {"num_labels": labels}
    options["trust_remote_code"] = spec.trust_remote_code
    try:
        unquantized = _dense_modules(_empty_model(folder, spec, labels))
        if bits < 16:
            options |= {"quantization_config": bitsandbytes_config(unquantized, bits, dtype), "device_map": device}
        with _seeded(seed):
            model, found = auto_class(spec.task).from_pretrained(
                folder, ignore_mismatched_sizes=True, output_loading_info=True, **options
            )
    except ModelError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"model in {folder} cannot be loaded for {spec.task} at {bits} bits: {reason}") from None
    _check_weights(model, found, folder)
    loaded: nn.Module = model.eval()
    if bits >= 16:
        return loaded.to(device)
    _let_go_of_file(loaded)
    return loaded


def _let_go_of_file(model: nn.Module) -> None:
    """Copy what stays dense beside quantized weights: on a CPU it would keep the whole dense file mapped."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def _check_weights(model: nn.Module, found: dict[str, Any], folder: Path) -> None:
    """Only a head may be missing or of another size; a backbone with random weights would train without a warning.

    Raises ModelError when the weights are of another model than config.json describes.
    """
    head, output = head_parameters(model), output_layer(model)
    if not head and output is None:
        raise ModelError(f"{type(model).__name__} in {folder} has no head behind its blocks; choose a classifier")
    replaced = {name for name, *_ in found["mismatched_keys"]}
    # Norms between blocks and head start as the identity, so only the blocks and what lies before them must be there.
    needed = (*block_prefixes(model), *_embeddings(model, output))
    wrong = sorted(
        [name for name in replaced if name not in head]
        + [name for name in found["missing_keys"] if name.startswith(needed)]
    )
    if wrong:
        raise ModelError(
            f"weights in {folder} are not those of the {type(model).__name__} in its config.json: {len(wrong)} tensors "
            f"are missing or of another size, such as {wrong[0]}; give the folder of one complete model"
        )
    if replaced:
        _log.warning("%s: a head of another size (%s) is replaced by a new one", folder, ", ".join(sorted(replaced)))


def _embeddings(model: Any, output: nn.Module | None) -> list[str]:
    known = (model.get_input_embeddings(), output)
    return [f"{name}." for name, module in model.named_modules() if any(module is layer for layer in known)]


def bitsandbytes_config(unquantized: list[str], bits: int, dtype: torch.dtype) -> Any:
    """How `transformers` quantizes all other linear maps: 8 bits is int8, 4 is NF4 with double quantization."""
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=unquantized)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=unquantized,
    )


def _empty_model(folder: Path, spec: ModelSpec, labels: int | None) -> nn.Module:
    """The architecture without weights.

    Raises ModelError when the folder holds weights that are quantized already.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=spec.trust_remote_code, local_files_only=True)
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"model in {folder} is quantized already; give the dense one, model.bits decides its width")
    if labels is not None:
        config.num_labels = labels
    with torch.device("meta"):
        model: nn.Module = auto_class(spec.task).from_config(config, trust_remote_code=spec.trust_remote_code)
    return model


def _dense_modules(model: nn.Module) -> list[str]:
    """Linear maps outside the blocks, which are never quantized."""
    blocks = tuple(block_prefixes(model))
    return [name for name, part in model.named_modules() if linear_size(part) and not f"{name}.".startswith(blocks)]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw a new head from `seed` and leave the caller's random state as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


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


def keep_weights_in_place(model: nn.Module) -> None:
    """Keep forward passes without gradients from repacking 4-bit weights, after which gradients and saves are wrong."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _prepare_quantized(model: nn.Module) -> None:
    keep_weights_in_place(model)
    for module in model.modules():
        if hasattr(module, "init_8bit_state"):
            from fedpipe_core.int8_linear import FrozenInt8Linear

            module.init_8bit_state()  # type: ignore[operator]  # moves the int8 weights where `share` finds them
            module.__class__ = FrozenInt8Linear


def quiet_transformers() -> None:
    """Keep progress bars, load reports, and warnings that ask for nothing off the user's terminal."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False but the target module is `Conv1D`")
    warnings.filterwarnings("ignore", message="`gradient_checkpointing_enable` is deprecated")  # its successor is newer
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # PEFT reads it
