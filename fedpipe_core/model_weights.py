"""A model's weights from a folder, dense or quantized as they are read, and what makes quantized ones behave."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedpipe_core.architecture import block_prefixes, dense_modules, head_parameters, output_layer
from fedpipe_core.config import ModelSpec
from fedpipe_core.errors import ModelError
from fedpipe_core.startup import quiet_transformers

_log = logging.getLogger(__name__)


def auto_class(task: str) -> Any:
    """The class of `transformers` that loads a model of the task from a folder."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForCausalLM if task == "causal-lm" else AutoModelForSequenceClassification


def load_weights(folder: Path, spec: ModelSpec, labels: int | None, bits: int, seed: int) -> nn.Module:
    """A model of the task with the weights of a folder, in evaluation mode; `load_base` tells of bits and head.

    Raises ModelError when the folder cannot be read as one.
    """
    quiet_transformers()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {32: torch.float32, 16: torch.bfloat16}.get(bits, torch.bfloat16 if device == "cuda" else torch.float32)
    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True}
    options |= {} if labels is None else {"num_labels": labels}
    options["trust_remote_code"] = spec.trust_remote_code
    try:
        unquantized = dense_modules(empty_model(folder, spec, labels))
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
    _prepare_quantized(loaded)
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


def empty_model(folder: Path, spec: ModelSpec, labels: int | None) -> nn.Module:
    """The architecture without weights.

    Raises ModelError when the folder holds weights that are quantized already.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=spec.trust_remote_code, local_files_only=True)
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"model in {folder} is quantized already; give the dense one, model.bits decides its width")
    if labels is not None:
        config.num_labels = labels
    options = {"trust_remote_code": spec.trust_remote_code, "dtype": torch.float32}
    with torch.device("meta"):  # at the config's own dtype, half say, that would be every thread's default meanwhile
        model: nn.Module = auto_class(spec.task).from_config(config, **options)
    return model


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw a new head from `seed` and leave the caller's random state as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


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
