import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, LABELS, WRITERS, random_adapter, save_tiny_model, save_tiny_writer
from torch import nn
from transformers.models.auto import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedpipe_core.adapters import Adapter
from fedpipe_core.architecture import adaptable_modules
from fedpipe_core.config import ModelSpec
from fedpipe_core.errors import ModelError
from fedpipe_core.export import EXPORT_SCHEMES, TunedModel, merge
from fedpipe_core.forms import FORMS
from fedpipe_core.merged_weights import MergedWeights, write_weights
from fedpipe_core.model import Base, load_base

SMALL_SHARD = 10_000


def adapter_for(model: nn.Module) -> Adapter:
    return random_adapter(model, dict.fromkeys(adaptable_modules(model), 3))


def in_memory(base: Base, adapter: Adapter, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The merge of the whole model, which the rounds are judged on, in the format of the release."""
    merged = copy.deepcopy(merge(base.model, adapter))  # it shares its tensors with the base
    return dict(merged.to(dtype).state_dict())


def outline(base: Base) -> Base:
    """The base with no weight in memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(base.model.config)
    return replace(base, model=model)


@pytest.fixture
def writer(tmp_path: Path) -> Base:
    folder = save_tiny_writer(tmp_path / "model", "tied")
    return load_base(ModelSpec(base=str(folder), task="causal-lm"), None, 32, seed=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tensors_equal_those_of_the_model_merged_in_memory(
    tiny_base: Callable[..., Base], architecture: str, dtype: torch.dtype
) -> None:
    base = tiny_base(architecture)
    adapter = adapter_for(base.model)
    weights, expected = MergedWeights(base, adapter), in_memory(base, adapter, dtype)
    assert set(weights.shapes) == set(expected)
    assert all(torch.equal(weights.tensor(name).to(dtype), expected[name]) for name in expected)


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_tensors_of_a_model_trained_whole_equal_those_it_is_judged_by(
    tiny_base: Callable[..., Base], architecture: str
) -> None:
    check_trained_whole(tiny_base(architecture))


def test_tied_embeddings_trained_whole_equal_those_they_are_judged_by(writer: Base) -> None:
    check_trained_whole(writer)


def check_trained_whole(base: Base) -> None:
    generator = torch.Generator().manual_seed(0)
    changes = {
        name: 0.1 * torch.randn(value.shape, generator=generator) for name, value in base.model.named_parameters()
    }
    weights = MergedWeights(base, Adapter({}, changes), "whole")
    expected = FORMS["whole"].judged(base.model, weights.adapter).state_dict()
    assert set(weights.shapes) >= set(changes)
    assert all(torch.equal(weights.tensor(name), expected[name]) for name in weights.shapes)
    assert not any(torch.equal(weights.tensor(name), value) for name, value in base.model.named_parameters())


@pytest.mark.parametrize("architecture", WRITERS)
def test_shards_hold_what_the_model_merged_in_memory_holds(tmp_path: Path, architecture: str) -> None:
    folder = save_tiny_writer(tmp_path / "model", architecture)
    base = load_base(ModelSpec(base=str(folder), task="causal-lm"), None, 32, seed=0)
    adapter = adapter_for(base.model)
    write_weights(MergedWeights(base, adapter), tmp_path / "out", torch.bfloat16, SMALL_SHARD)
    weight_map = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    shards = {path.name: load_file(path) for path in (tmp_path / "out").glob("*.safetensors")}
    assert set(weight_map.values()) == set(shards)
    assert len(shards) > 2
    expected = in_memory(base, adapter, torch.bfloat16)
    assert sum(len(shard) for shard in shards.values()) == len({value.data_ptr() for value in expected.values()})
    base.model.config.save_pretrained(tmp_path / "out")  # type: ignore[operator, union-attr]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.items())


def test_outline_without_weights_is_written_like_the_loaded_base(writer: Base, tmp_path: Path) -> None:
    adapter = adapter_for(writer.model)
    for name, base in (("loaded", writer), ("outline", outline(writer))):
        EXPORT_SCHEMES["merged"].write(TunedModel(base, adapter, "bf16", None), tmp_path / name)
    for path in (tmp_path / "loaded").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "outline" / path.name).read_bytes(), path.name


def test_weights_kept_without_the_models_prefix_are_found(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, "bert")
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("bert."): value for name, value in tensors.items() if name.startswith("bert.")}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    base = load_base(ModelSpec(base=str(folder)), LABELS, 32, seed=0)
    adapter = adapter_for(base.model)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(base.model.config)
    weights, expected = MergedWeights(replace(base, model=model), adapter), in_memory(base, adapter, torch.float32)
    assert all(torch.equal(weights.tensor(name), value) for name, value in expected.items())


def test_outline_whose_files_lack_a_tensor_is_refused(writer: Base) -> None:
    tensors = load_file(writer.folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, writer.folder / "model.safetensors", metadata={"format": "pt"})
    weights = MergedWeights(outline(writer), Adapter({}, {}))
    with pytest.raises(ModelError, match=r"holds no tensor model\.norm\.weight; load the model whole"):
        weights.tensor("model.norm.weight")
