"""The tuned model in forms others can load: a PEFT folder, and the merged model that `transformers` loads alone.

Merging is done on the dense base in float32; a quantized base would round most of the change away. `merge` makes the
model that is judged in memory, `merged_weights` writes one of any size. Each scheme says how it is written and how a
user reads it back, so that what is judged is what was written.
"""

import copy
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedpipe_core.adapters import Adapter
from fedpipe_core.architecture import head_modules, predicts_tokens
from fedpipe_core.base_folder import BASE_FILE
from fedpipe_core.merged_weights import MergedWeights, write_weights
from fedpipe_core.merging import merge
from fedpipe_core.methods import Form
from fedpipe_core.model import Base, share
from fedpipe_core.model_weights import auto_class

__all__ = ["EXPORT_SCHEMES", "ExportScheme", "TunedModel", "folder_sha256", "merge", "write_tokenizer"]

PEFT_TASKS = {"sequence-classification": "SEQ_CLS", "causal-lm": "CAUSAL_LM"}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, eq=False)
class TunedModel:
    """A dense base, the global adapter for it, and how the merged model is written.

    `base_id` is what the config calls the base; its folder when left out.
    """

    base: Base
    adapter: Adapter
    dtype: str
    label_names: list[str] | None
    chat_template: str | None = None
    base_id: str | None = None
    form: Form = "lora"

    @property
    def weights(self) -> MergedWeights:
        """The merged model's tensors, each made when it is asked for."""
        return MergedWeights(self.base, self.adapter, self.form)

    @property
    def task(self) -> str:
        """What the model does, as the config names it."""
        return "causal-lm" if predicts_tokens(self.base.model) else "sequence-classification"


@dataclass(frozen=True)
class ExportScheme:
    """How one form is written to a folder, and how that folder becomes a model again.

    `check` raises ModelError for a base that the form cannot hold, so that it is told before training.
    """

    write: Callable[[TunedModel, Path], None]
    load: Callable[[TunedModel, Path], nn.Module]
    check: Callable[[Base], None] = lambda base: None


def folder_sha256(folder: Path) -> str:
    """Hash over the names and contents of a folder's files."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digest.update(path.relative_to(folder).as_posix().encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _write_adapter(tuned: TunedModel, folder: Path) -> None:
    """Factors in PEFT's own format with a rank per module, and the head as modules to save."""
    from peft import LoraConfig, get_peft_model

    ranks = {re.escape(name): rank for name, rank in tuned.adapter.ranks.items() if rank}
    config = LoraConfig(
        task_type=PEFT_TASKS[tuned.task],
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        target_modules=[name for name, rank in tuned.adapter.ranks.items() if rank],
        rank_pattern=ranks,
        alpha_pattern=ranks,  # scaling 1: it is folded into B
        modules_to_save=head_modules(tuned.base.model) or None,
    )
    model: Any = get_peft_model(share(tuned.base.model), config)
    model.peft_config["default"].base_model_name_or_path = str(tuned.base.folder)
    with torch.no_grad():
        for name, factors in tuned.adapter.factors.items():
            if factors.rank:
                layer = model.base_model.model.get_submodule(name)
                layer.lora_A["default"].weight.copy_(factors.A)
                layer.lora_B["default"].weight.copy_(factors.B)
        for name, value in tuned.adapter.head.items():
            module, _, leaf = name.rpartition(".")
            saved = model.base_model.model.get_submodule(module).modules_to_save["default"]
            getattr(saved, leaf).copy_(value)
    model.save_pretrained(folder)
    (folder / BASE_FILE).write_text(json.dumps(_base_reference(tuned), indent=1) + "\n", encoding="utf-8")
    write_tokenizer(tuned, folder)


def _base_reference(tuned: TunedModel) -> dict[str, Any]:
    """The base by id and hash, and what its config has to say for the adapter to fit."""
    config: Any = tuned.base.model.config
    names = tuned.label_names or (None if tuned.task == "causal-lm" else [*config.id2label.values()])
    labels = {} if names is None else {"num_labels": len(names), "id2label": dict(enumerate(names))}
    return {
        "base": tuned.base_id or str(tuned.base.folder),
        "sha256": tuned.base.sha256,
        "architectures": [type(tuned.base.model).__name__],
        "config": {**labels, "pad_token_id": config.get_text_config().pad_token_id},
    }


def _load_adapter(tuned: TunedModel, folder: Path) -> nn.Module:
    from peft import PeftModel

    model: nn.Module = PeftModel.from_pretrained(share(tuned.base.model), folder).eval()
    return model


def _write_merged(tuned: TunedModel, folder: Path) -> None:
    """A folder in Hugging Face format with the tokenizer and the labels' names; weights are written shard by shard."""
    dtype = DTYPES[tuned.dtype]
    write_weights(tuned.weights, folder, dtype)
    model: Any = tuned.base.model
    config = copy.deepcopy(model.config)
    config.dtype, config.architectures = dtype, [type(model).__name__]
    if tuned.label_names is not None:
        config.id2label = dict(enumerate(tuned.label_names))
        config.label2id = {name: index for index, name in enumerate(tuned.label_names)}
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    if model.is_remote_code():
        from transformers.dynamic_module_utils import custom_object_save

        custom_object_save(model, folder, config=config)
    write_tokenizer(tuned, folder)


def write_tokenizer(tuned: TunedModel, folder: Path) -> None:
    """The base's tokenizer; its chat template becomes the one that renders a prompt as training did."""
    tokenizer = copy.copy(tuned.base.tokenizer)  # threads share the base's
    if tuned.chat_template is not None:
        tokenizer.chat_template = tuned.chat_template
    tokenizer.save_pretrained(folder)


def _load_merged(tuned: TunedModel, folder: Path) -> nn.Module:
    model: nn.Module = auto_class(tuned.task).from_pretrained(folder, local_files_only=True).eval()
    return model


EXPORT_SCHEMES: dict[str, ExportScheme] = {
    "adapter": ExportScheme(_write_adapter, _load_adapter),
    "merged": ExportScheme(_write_merged, _load_merged),
}
