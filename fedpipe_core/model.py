"""The base model: where it lies, its hash, how it is loaded at a bit width, which of its matrices take an adapter.

A base is loaded once per bit width and shared: `share` gives every edge a module tree of its own over the same frozen
tensors. What an edge trains on top is `edge_model`'s business.
"""

import copy
import hashlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedpipe_core.config import ModelSpec
from fedpipe_core.errors import ModelError
from fedpipe_core.schemas import ModelShape, ModuleShape

_WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class Base:
    """A frozen base model in memory. `folder` holds its files, `sha256` names their content."""

    model: nn.Module
    tokenizer: Any
    folder: Path
    sha256: str
    bits: int


def resolve_base(base: str) -> Path:
    """Find the folder of a base given as a folder, as `package:NAME` or as a hub id (the hub's cache when offline).

    Raises ModelError when there is none.
    """
    if base.startswith("package:"):
        return _package_folder(base.removeprefix("package:"))
    if Path(base).is_dir():
        return _checked_folder(Path(base))
    if Path(base).is_absolute() or base.startswith("."):
        raise ModelError(f"model.base {base} is not a folder; give a folder in Hugging Face format or a hub id")
    return _hub_folder(base)


def base_sha256(folder: Path) -> str:
    """Hash config, tokenizer and weights of a base in order of name; the same files give the same hash anywhere."""
    digest = hashlib.sha256()
    for path in sorted(_hashed_files(folder), key=lambda path: path.name):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def load_base(spec: ModelSpec, labels: int, bits: int, seed: int) -> Base:
    """Load the base at a bit width: 32 and 16 dense, 8 int8, 4 NF4 with double quantization; the head stays dense.

    Every parameter is frozen and dropout is off, so a forward pass is a function of weights and input alone. The new
    head is drawn from `seed`.

    Raises ModelError when the folder cannot be read as a model of the configured task.
    """
    folder = resolve_base(spec.base)
    tokenizer = _load_tokenizer(folder, spec)
    model = _load_model(folder, spec, labels, bits, seed)
    _agree_on_padding(model, tokenizer)
    _turn_dropout_off(model)
    _prepare_quantized(model)
    model.requires_grad_(False)
    return Base(model.eval(), tokenizer, folder, base_sha256(folder), bits)


def share(model: nn.Module) -> nn.Module:
    """Copy the module tree but not the tensors: adapters put on the copy leave the original and its siblings alone."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        state = getattr(module, "state", None)  # bitsandbytes keeps int8 weights here after `init_8bit_state`
        if state is not None:
            shared[id(state)] = state
    return copy.deepcopy(model, shared)


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's parameters."""
    return next(model.parameters()).device


def adaptable_modules(model: nn.Module) -> dict[str, ModuleShape]:
    """Find the matrices that can carry an adapter: every linear map inside the repeated blocks, by type and shape.

    Names and shapes are in the model's own order. GPT-2's transposed `Conv1D` counts, with its shape turned to
    (out_features, in_features); embeddings and heads lie outside the blocks and do not count.
    """
    blocks = _block_prefixes(model)
    found = {}
    for name, module in model.named_modules():
        prefix = next((prefix for prefix in blocks if name.startswith(prefix)), None)
        if prefix is not None and (size := linear_size(module)) is not None:
            layer = int(name.removeprefix(prefix).split(".")[0])
            found[name] = ModuleShape(out_features=size[0], in_features=size[1], layer=layer)
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no linear map inside repeated blocks, so there is nothing to adapt"
        )
    return found


def head_modules(model: nn.Module) -> list[str]:
    """Linear maps outside the repeated blocks: a classifier and its pooler. They are trained in full."""
    blocks = _block_prefixes(model)
    return [
        name
        for name, module in model.named_modules()
        if linear_size(module) is not None and not any(name.startswith(prefix) for prefix in blocks)
    ]


def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The head's parameters by full name."""
    heads = tuple(f"{name}." for name in head_modules(model))
    return {name: parameter for name, parameter in model.named_parameters() if name.startswith(heads)}


def model_shape(model: nn.Module, labels: int) -> ModelShape:
    """Describe a model to the cost model. It must be loaded at 32 or 16 bits: a packed weight hides its true size."""
    modules = adaptable_modules(model)
    linear = sum(shape.out_features * shape.in_features for shape in modules.values())
    head = sum(parameter.numel() for parameter in head_parameters(model).values())
    total = sum(parameter.numel() for parameter in model.parameters())
    return ModelShape(
        modules=modules,
        linear_parameters=linear,
        other_parameters=total - linear - head,
        head_parameters=head,
        hidden_features=int(getattr(model.config, "hidden_size", 0)) if _checkpoints(model) else 0,
        output_features=labels,
        scored_positions="example",
    )


def _checkpoints(model: nn.Module) -> bool:
    return bool(getattr(model, "supports_gradient_checkpointing", False))


def linear_size(module: nn.Module) -> tuple[int, int] | None:
    """(out_features, in_features) of a linear map of any kind, None for any other module."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if type(module).__name__ == "Conv1D":  # GPT-2's weight is (in_features, out_features)
        in_features, out_features = module.get_parameter("weight").shape
        return out_features, in_features
    return None


def _block_prefixes(model: nn.Module) -> list[str]:
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    return [f"{name}." for name, module in lists if len(module) and any(linear_size(part) for part in module.modules())]


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"model.base package:{package}: no such package is installed; install it or name a folder")
    root = Path(next(iter(spec.submodule_search_locations)))
    folders = sorted(path.parent for path in root.rglob("config.json") if _has_weights(path.parent))
    if not folders:
        raise ModelError(f"model.base package:{package} holds no folder with config.json and weights")
    return folders[0]


def _checked_folder(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise ModelError(f"model folder {folder} has no config.json; needed a folder in Hugging Face format")
    if not _has_weights(folder):
        raise ModelError(f"model folder {folder} has no weights; needed *.safetensors beside config.json")
    return folder


def _has_weights(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in _WEIGHT_PATTERNS)


def _hub_folder(base: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.md"]
    try:
        return _checked_folder(Path(snapshot_download(base, allow_patterns=patterns)))
    except ModelError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"model.base {base!r} is neither a folder nor a model of the hub or its local cache ({reason}); "
            "give a folder in Hugging Face format, package:NAME or a hub id"
        ) from None


def _hashed_files(folder: Path) -> Iterator[Path]:
    for pattern in ("config.json", "tokenizer*.json", "vocab.*", *_WEIGHT_PATTERNS):
        yield from folder.glob(pattern)


def _load_tokenizer(folder: Path, spec: ModelSpec) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=spec.trust_remote_code)
    except Exception as error:
        raise ModelError(f"tokenizer in {folder} cannot be loaded: {' '.join(str(error).split())[:300]}") from None


def _load_model(folder: Path, spec: ModelSpec, labels: int, bits: int, seed: int) -> nn.Module:
    from transformers import AutoModelForSequenceClassification

    quiet_transformers()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {32: torch.float32, 16: torch.bfloat16}.get(bits, torch.bfloat16 if device == "cuda" else torch.float32)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": spec.trust_remote_code, "num_labels": labels}
    if bits < 16:
        options |= {"quantization_config": _quantization(folder, spec, labels, bits, dtype), "device_map": device}
    try:
        with _seeded(seed):
            model: nn.Module = AutoModelForSequenceClassification.from_pretrained(folder, **options)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"model in {folder} cannot be loaded for {spec.task} at {bits} bits: {reason}") from None
    return model if bits < 16 else model.to(device)


def _quantization(folder: Path, spec: ModelSpec, labels: int, bits: int, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    skip = _head_names_on_meta(folder, spec, labels)
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skip,
    )


def _head_names_on_meta(folder: Path, spec: ModelSpec, labels: int) -> list[str]:
    """Names of the head's modules, read from the architecture without loading a weight."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(folder, num_labels=labels, trust_remote_code=spec.trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=spec.trust_remote_code)
    return head_modules(model)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw a new head from `seed` and leave the caller's random state as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _agree_on_padding(model: Any, tokenizer: Any) -> None:
    """Decoder classifiers find an example's last token by the pad id, so model and tokenizer must agree on one."""
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ModelError("the tokenizer has neither a pad token nor an end-of-sequence token; add one to its files")
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id


def _turn_dropout_off(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]


def _prepare_quantized(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Else one forward pass without gradients repacks the weights in place, and later gradients are wrong.
            module.support_avx512bf16_for_cpu = False
        if hasattr(module, "init_8bit_state") and module.weight.CB is not None:
            module.init_8bit_state()  # moves the int8 weights where `share` finds them


def quiet_transformers() -> None:
    """Keep load reports and progress bars off the user's terminal."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
