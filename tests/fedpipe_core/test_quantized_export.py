from pathlib import Path

import pytest
import torch
from tiny_models import LABELS, random_adapter, save_tiny_model, tiny_examples

from fedpipe_core.architecture import adaptable_modules, dense_modules
from fedpipe_core.batches import pad_batch
from fedpipe_core.config import ModelSpec
from fedpipe_core.export import TunedModel, merge
from fedpipe_core.export_proof import agreement, answers
from fedpipe_core.model import load_base
from fedpipe_core.quantized_export import QUANTIZED_SCHEMES

BITS = {"int8": 8, "nf4": 4, "nf4+adapter": 4}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> TunedModel:
    # bitsandbytes' fused CPU kernels take widths that 64 divides
    folder = save_tiny_model(tmp_path_factory.mktemp("model"), "bert", hidden_size=64, intermediate_size=128)
    base = load_base(ModelSpec(base=str(folder)), LABELS, 32, seed=0)
    adapter = random_adapter(base.model, dict.fromkeys(adaptable_modules(base.model), 2), size=0.1)
    return TunedModel(base, adapter, "fp32", None)


@pytest.mark.parametrize("scheme", BITS)
def test_quantized_export_answers_nearly_like_the_merged_model(tuned: TunedModel, tmp_path: Path, scheme: str) -> None:
    QUANTIZED_SCHEMES[scheme].write(tuned, tmp_path)
    again = QUANTIZED_SCHEMES[scheme].load(tuned, tmp_path)
    batches = [pad_batch(tiny_examples(64), list(range(64)))]
    reference = answers(merge(tuned.base.model, tuned.adapter), batches)
    assert agreement(answers(again, batches), reference) > 0.8


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_folder_loads_with_transformers_alone_and_its_blocks_are_quantized(
    tuned: TunedModel, tmp_path: Path, scheme: str
) -> None:
    from transformers import AutoModelForSequenceClassification

    QUANTIZED_SCHEMES[scheme].write(tuned, tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    kinds = {type(model.get_submodule(name)).__name__ for name in adaptable_modules(tuned.base.model)}
    assert kinds == {{8: "Linear8bitLt", 4: "Linear4bit"}[BITS[scheme]]}
    assert {type(model.get_submodule(name)) for name in dense_modules(tuned.base.model)} == {torch.nn.Linear}
    head = dict(tuned.adapter.head)["classifier.weight"]
    torch.testing.assert_close(model.classifier.weight, head)


def test_quantizing_leaves_the_base_as_it_was(tuned: TunedModel, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in tuned.base.model.state_dict().items()}
    QUANTIZED_SCHEMES["nf4"].write(tuned, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in tuned.base.model.state_dict().items())
