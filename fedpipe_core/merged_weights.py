"""The tensors of base + adapter, each read and merged when it is asked for, and written shard by shard.

The base's weights are read from its own files, where they lie in their own number format, and what those files keep
under another name comes from the model in memory. So writing a model of any size takes one shard and the matrix in
work; a model that lies on torch's `meta` device, a mere outline, will do. In what format a user loads it is `export`'s.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fedpipe_core.adapters import Adapter
from fedpipe_core.errors import ModelError
from fedpipe_core.methods import Form
from fedpipe_core.model import Base

SHARD_BYTES = 2**30
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True, eq=False)
class MergedWeights:
    """W + B·A for every adapted matrix, the trained head, and all else as the base has it.

    Of form `whole` every parameter is in the head, as its change from the base.
    """

    base: Base
    adapter: Adapter
    form: Form = "lora"

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """Shape by name, in the model's order; what is one tensor in two places, as tied embeddings are, once."""
        named: dict[int, tuple[str, Tensor]] = {}
        for name, tensor in self.base.model.state_dict(keep_vars=True).items():
            named.setdefault(id(tensor), (name, tensor))
        return {name: tensor.shape for name, tensor in named.values()}

    def tensor(self, name: str) -> Tensor:
        """One tensor: merged ones in float32, others in the format they are kept in.

        Raises ModelError when neither the base's files nor memory hold it.
        """
        if name in self.adapter.head:
            trained = self.adapter.head[name]
            return trained + self._stored(name) if self.form == "whole" else trained
        module, _, leaf = name.rpartition(".")
        factors = self.adapter.factors.get(module) if leaf == "weight" else None
        if factors is None:
            return self._stored(name)
        # GPT-2's Conv1D keeps its weight as (in_features, out_features).
        linear = isinstance(self.base.model.get_submodule(module), nn.Linear)
        change = factors.dense().float().cpu()
        return (change if linear else change.T).add_(self._stored(name))

    @cached_property
    def _places(self) -> dict[str, tuple[Path, str]]:
        """File and name there of every tensor of the model that the base's files hold under its own name."""
        files, prefix = _files_by_name(self.base.folder), f"{getattr(self.base.model, 'base_model_prefix', '')}."
        return {
            name: (files[kept], kept)
            for name in self.shapes
            for kept in (name, name.removeprefix(prefix), prefix + name)
            if kept in files
        }

    def _stored(self, name: str) -> Tensor:
        """The base's own tensor. The file is opened for it alone: an open file keeps all that was read of it mapped."""
        if name in self._places:
            file, kept = self._places[name]
            with safe_open(file, framework="pt") as opened:
                if opened.get_slice(kept).get_shape() == list(self.shapes[name]):
                    found: Tensor = opened.get_tensor(kept)
                    return found
        found = self.base.model.state_dict()[name]
        if found.is_meta:
            raise ModelError(f"{self.base.folder} holds no tensor {name}; load the model whole to merge it")
        return found.cpu()


def write_weights(weights: MergedWeights, folder: Path, dtype: torch.dtype, shard_bytes: int = SHARD_BYTES) -> None:
    """Write `model.safetensors`, or shards of at most `shard_bytes` with their index, one after the other."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from transformers.core_model_loading import revert_weight_conversion

    folder.mkdir(parents=True, exist_ok=True)
    outline = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in weights.shapes.items()}
    pattern = _WEIGHTS.replace(".safetensors", "{suffix}.safetensors")
    split = split_torch_state_dict_into_shards(outline, filename_pattern=pattern, max_shard_size=shard_bytes)
    written: dict[str, str] = {}
    for file, names in split.filename_to_tensors.items():
        shard = dict(_converted(weights, names, dtype))
        shard = revert_weight_conversion(weights.base.model, shard)  # to the names that other programs know
        save_file(shard, folder / file, metadata={"format": "pt"})
        written |= dict.fromkeys(shard, file)
        del shard
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": written}
        (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _converted(weights: MergedWeights, names: list[str], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for name in names:
        yield name, weights.tensor(name).detach().to(dtype).contiguous()


def _files_by_name(folder: Path) -> dict[str, Path]:
    """Which file of a folder holds a tensor, of those that `transformers` would read; none where they are pickled."""
    if (folder / _INDEX).is_file():
        index: dict[str, Any] = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        return {name: folder / file for name, file in index["weight_map"].items()}
    if not (folder / _WEIGHTS).is_file():
        return {}
    with safe_open(folder / _WEIGHTS, framework="pt") as opened:
        return dict.fromkeys(opened.keys(), folder / _WEIGHTS)
