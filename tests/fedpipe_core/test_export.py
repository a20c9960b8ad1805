from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import ARCHITECTURES, LABELS, random_adapter, tiny_examples
from torch import Tensor, nn

from fedpipe_core.adapters import Adapter
from fedpipe_core.architecture import adaptable_modules
from fedpipe_core.batches import pad_batch
from fedpipe_core.config import ReleaseSpec
from fedpipe_core.edge_model import build_global_model, load_global_adapter
from fedpipe_core.export import DTYPES, EXPORT_SCHEMES, TunedModel, folder_sha256, merge
from fedpipe_core.model import Base

RANK = 3


def adapter_for(base: Base) -> Adapter:
    return random_adapter(base.model, dict.fromkeys(adaptable_modules(base.model), RANK))


@torch.inference_mode()
def logits(model: nn.Module) -> Tensor:
    batch = pad_batch(tiny_examples(8), list(range(8)))
    found: Tensor = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    return found.float()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_merged_model_computes_what_base_and_adapter_compute(tiny_base: Callable[..., Base], architecture: str) -> None:
    base = tiny_base(architecture)
    adapter = adapter_for(base)
    edge = build_global_model(base.model, RANK)
    load_global_adapter(edge, adapter)
    torch.testing.assert_close(logits(merge(base.model, adapter)), logits(edge.model), rtol=1e-4, atol=1e-4)


def test_merging_leaves_the_base_as_it_was(tiny_base: Callable[..., Base]) -> None:
    base = tiny_base("bert")
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    merge(base.model, adapter_for(base))
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())


def test_merging_an_adapter_without_change_gives_the_base_and_the_adapters_head(
    tiny_base: Callable[..., Base],
) -> None:
    base = tiny_base("bert")
    head = {name: torch.ones_like(value) for name, value in adapter_for(base).head.items()}
    merged = merge(base.model, Adapter({}, head))
    assert torch.equal(merged.get_parameter("classifier.weight"), head["classifier.weight"])
    query = "bert.encoder.layer.0.attention.self.query.weight"
    assert torch.equal(merged.get_parameter(query), base.model.get_parameter(query))


@pytest.mark.parametrize("scheme", ReleaseSpec().exports)
@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_written_export_reads_back_as_the_merged_model(
    tiny_base: Callable[..., Base], tmp_path: Path, architecture: str, scheme: str
) -> None:
    base = tiny_base(architecture)
    tuned = TunedModel(base, adapter_for(base), "fp32", None)
    EXPORT_SCHEMES[scheme].write(tuned, tmp_path)
    again = EXPORT_SCHEMES[scheme].load(tuned, tmp_path)
    torch.testing.assert_close(logits(again), logits(merge(base.model, tuned.adapter)), rtol=1e-4, atol=1e-4)


def test_every_configurable_export_can_be_written() -> None:
    assert set(ReleaseSpec().exports) == set(EXPORT_SCHEMES)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_merged_model_is_written_in_the_configured_format_and_the_base_stays(
    tiny_base: Callable[..., Base], tmp_path: Path, dtype: str
) -> None:
    base = tiny_base("bert")
    EXPORT_SCHEMES["merged"].write(TunedModel(base, adapter_for(base), dtype, None), tmp_path)
    assert {value.dtype for value in load_file(tmp_path / "model.safetensors").values()} == {DTYPES[dtype]}
    assert {value.dtype for value in base.model.parameters()} == {torch.float32}
    assert base.model.config.dtype == torch.float32  # type: ignore[union-attr]


def test_merged_model_knows_its_labels_names_and_the_base_does_not(
    tiny_base: Callable[..., Base], tmp_path: Path
) -> None:
    base = tiny_base("bert")
    names = [f"label {index}" for index in range(LABELS)]
    tuned = TunedModel(base, adapter_for(base), "fp32", names)
    EXPORT_SCHEMES["merged"].write(tuned, tmp_path)
    found = EXPORT_SCHEMES["merged"].load(tuned, tmp_path).config
    assert [found.id2label[index] for index in range(LABELS)] == names  # type: ignore[index, union-attr]
    assert found.label2id == {name: index for index, name in enumerate(names)}  # type: ignore[union-attr]
    assert base.model.config.id2label[0] == "LABEL_0"  # type: ignore[index, union-attr]


def test_adapter_folder_leaves_out_modules_nobody_trained(tiny_base: Callable[..., Base], tmp_path: Path) -> None:
    base = tiny_base("bert")
    first, *others = adaptable_modules(base.model)
    tuned = TunedModel(base, random_adapter(base.model, {first: 2, others[0]: 0}), "fp32", None)
    EXPORT_SCHEMES["adapter"].write(tuned, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {name for name in tensors if "lora_" in name} == {
        f"base_model.model.{first}.lora_{factor}.weight" for factor in "AB"
    }


def test_folder_hash_tells_names_and_contents_apart(tmp_path: Path) -> None:
    def hash_of(files: dict[str, str]) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, text in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return folder_sha256(folder)

    base = {"a.json": "1", "sub/b.json": "2"}
    assert hash_of(base) == hash_of(dict(reversed(base.items())))
    changed = [{"a.json": "2", "sub/b.json": "2"}, {"a.json": "1", "sub/c.json": "2"}, {"a.json": "1"}]
    assert len({hash_of(files) for files in (base, *changed)}) == 4
