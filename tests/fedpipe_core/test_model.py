import json
import shutil
from collections import Counter

import pytest
import torch
from tiny_models import ARCHITECTURES, DECODERS, LABELS, VOCABULARY, WRITERS, save_tiny_model, tiny_examples
from torch import nn

from fedpipe_core.architecture import adaptable_modules, head_parameters, model_shape
from fedpipe_core.batches import pad_batch
from fedpipe_core.config import ModelSpec
from fedpipe_core.errors import ModelError
from fedpipe_core.evaluation import predict
from fedpipe_core.model import Base, base_shape, load_base, share
from fedpipe_core.tokenizing import TokenizedExamples


def load(folder, bits: int = 32, labels: int = LABELS, seed: int = 0) -> Base:
    return load_base(ModelSpec(base=str(folder)), labels, bits, seed)


def logits(model: nn.Module, count: int = 6) -> torch.Tensor:
    batch = pad_batch(tiny_examples(count), range(count))
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()


def edit_config(folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def storages(model: nn.Module) -> Counter:
    """Bytes by address of everything a model holds, the scales and int8 weights of quantized modules too."""
    found = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        state, scales = getattr(module, "state", None), getattr(module, "quant_state", None)
        found += [value for value in (getattr(state, "CB", None), getattr(state, "SCB", None)) if value is not None]
        found += [scales.absmax, scales.state2.absmax] if scales is not None else []
    return Counter({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in found})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_a_base_loads_frozen_at_every_bit_width(tiny_base, architecture, bits):
    base = tiny_base(architecture, bits)
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not any(module.training for module in base.model.modules())
    assert torch.isfinite(logits(base.model)).all()
    assert (base.bits, base.folder.name.startswith(architecture)) == (bits, True)


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantization_packs_every_matrix_of_the_blocks_and_nothing_else(tiny_base, architecture, bits):
    model = tiny_base(architecture, bits).model
    packed = {name for name, value in model.named_parameters() if not value.is_floating_point()}
    assert packed == {f"{name}.weight" for name in adaptable_modules(model)}
    weights = sum(model.get_parameter(name).nbytes for name in packed)
    count = sum(shape.out_features * shape.in_features for shape in adaptable_modules(model).values())
    assert weights == count * bits // 8


def test_4_bit_matrices_are_never_repacked_for_inference(tiny_base):
    # On CPUs with AVX512_BF16 a forward pass without gradients would repack them, and later gradients would be wrong.
    model = tiny_base("bert", 4).model
    assert {model.get_submodule(name).support_avx512bf16_for_cpu for name in adaptable_modules(model)} == {False}


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_fewer_bits_answer_less_alike(tiny_base, architecture):
    exact = logits(tiny_base(architecture).model)
    errors = [float((logits(tiny_base(architecture, bits).model) - exact).norm() / exact.norm()) for bits in (16, 8, 4)]
    assert max(errors[:2]) < 0.03 < errors[2] < 0.7


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_weights_kept_as_float16_compute_as_float32(tmp_path, bits):
    base = load(save_tiny_model(tmp_path, "bert", dtype=torch.float16), bits)
    dense = [value for value in base.model.parameters() if value.is_floating_point()]
    assert {value.dtype for value in dense} == {torch.float32}


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_loading_a_base_kept_as_float16_never_makes_half_precision_the_default(tmp_path, bits, monkeypatch):
    folder, made = save_tiny_model(tmp_path, "llama", dtype=torch.float16), []
    set_default_dtype = torch.set_default_dtype
    monkeypatch.setattr(torch, "set_default_dtype", lambda dtype: made.append(dtype) or set_default_dtype(dtype))
    load(folder, bits)
    assert torch.float16 not in made


def test_a_new_head_follows_from_the_seed_and_leaves_other_random_streams_alone(tiny_folder):
    state = torch.get_rng_state()
    first, again, other = (load(tiny_folder("bert"), labels=7, seed=seed).model for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    heads = [model.get_parameter("classifier.weight") for model in (first, again, other)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_a_new_head_is_the_same_at_every_bit_width_of_one_dtype(tiny_folder):
    heads = [head_parameters(load(tiny_folder("bert"), bits, labels=7, seed=3).model) for bits in (32, 8, 4)]
    for name, value in heads[0].items():
        assert all(torch.equal(value, other[name]) for other in heads[1:])


def test_a_head_of_as_many_labels_is_kept(tmp_path):
    folder = save_tiny_model(tmp_path, "bert")
    assert torch.equal(logits(load(folder, seed=1).model), logits(load(folder, seed=2).model))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("bits", [32, 4])
def test_a_head_of_other_labels_is_replaced_and_said_so(tiny_folder, caplog, architecture, bits):
    base = load(tiny_folder(architecture), bits, labels=9)
    assert logits(base.model).shape == (6, 9)
    assert "a head of another size" in caplog.text


def test_weights_of_another_size_than_the_config_says_are_refused(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder("bert"), tmp_path / "copy")
    edit_config(folder, intermediate_size=40)
    with pytest.raises(ModelError, match=r"not those of the BertForSequenceClassification.*6 tensors .*intermediate"):
        load(folder)


def test_a_backbone_that_lacks_weights_is_refused(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder("bert"), tmp_path / "copy")
    edit_config(folder, num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"such as bert\.encoder\.layer\.2"):
        load(folder)


@pytest.mark.parametrize("bits", [32, 4])
def test_a_folder_whose_config_cannot_be_read_is_refused(tiny_folder, tmp_path, bits):
    folder = shutil.copytree(tiny_folder("bert"), tmp_path / "copy")
    (folder / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(ModelError, match=f"in {folder} cannot be loaded"):
        load(folder, bits)


def test_weights_that_are_cut_short_are_refused(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder("bert"), tmp_path / "copy")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match=f"model in {folder} cannot be loaded for sequence-classification at 32 bits"):
        load(folder)


def test_a_folder_without_a_tokenizer_is_refused(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder("llama"), tmp_path / "copy", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(ModelError, match=f"tokenizer in {folder} cannot be loaded"):
        load(folder)


def test_weights_that_are_quantized_already_are_refused(tiny_base, tmp_path):
    tiny_base("bert", 4).model.save_pretrained(tmp_path)
    tiny_base("bert", 4).tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is quantized already; give the dense one"):
        load(tmp_path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dropout_is_off_in_training_mode_too(tmp_path, architecture):
    rates = {
        "attention_dropout": 0.5,
        "hidden_dropout_prob": 0.5,
        "attn_pdrop": 0.5,
        "resid_pdrop": 0.5,
        "dropout": 0.5,
    }
    model = load(save_tiny_model(tmp_path, architecture, **rates)).model
    still = logits(model)
    assert torch.equal(logits(model.train()), still)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_model_and_tokenizer_agree_on_a_padding_token(tiny_base, architecture):
    base = tiny_base(architecture)
    padding = VOCABULARY["<eos>"] if architecture in DECODERS else VOCABULARY["[PAD]"]
    assert base.tokenizer.pad_token_id == base.model.config.pad_token_id == padding


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_answer_does_not_depend_on_the_batch_it_is_padded_in(tiny_base, architecture):
    base = tiny_base(architecture)
    rows = tiny_examples(12, base.tokenizer.pad_token_id)
    alone, together = (predict(base.model, rows, batch_size) for batch_size in (1, 12))
    assert alone.losses == pytest.approx(together.losses, abs=1e-5)


def test_a_text_that_ends_with_the_padding_token_answers_alike_in_every_batch(tiny_base):
    base = tiny_base("gpt2")
    rows = TokenizedExamples([[7, 8, 4], [9, 10, 11, 12, 13, 4]], [0, 1], pad_token_id=4)
    alone, together = (predict(base.model, rows, batch_size) for batch_size in (1, 2))
    assert alone.losses == pytest.approx(together.losses, abs=1e-5)


def test_a_tokenizer_without_any_token_to_pad_with_is_refused(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder("gpt2"), tmp_path / "copy")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": None}))
    with pytest.raises(ModelError, match="neither a pad token nor an end-of-sequence token"):
        load(folder)


def test_a_padding_token_that_the_model_does_not_know_is_refused(tmp_path):
    folder = save_tiny_model(tmp_path, "bert", vocab_size=len(VOCABULARY))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "<new>"}))
    with pytest.raises(ModelError, match=r"pads with id 65 but the model knows 65 tokens"):
        load(folder)


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_shared_models_hold_the_same_memory_and_answer_alike(tiny_base, architecture, bits):
    model = tiny_base(architecture, bits).model
    logits(model)  # bitsandbytes moves its tensors in the first call
    first, second = share(model), share(model)
    assert storages(first) == storages(second) == storages(model)
    assert torch.equal(logits(first), logits(model))
    assert not {id(module) for module in first.modules()} & {id(module) for module in model.modules()}


def test_shared_int8_models_keep_what_a_call_leaves_behind_apart(tiny_base):
    model = tiny_base("bert", 8).model
    name = next(iter(adaptable_modules(model)))
    first, second = (share(model).get_submodule(name) for _ in range(2))
    assert first.state is not second.state
    assert first.state.CB is second.state.CB


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_bases_shape_is_known_before_its_weights_are_read(tiny_folder, tiny_base, architecture):
    spec = ModelSpec(base=str(tiny_folder(architecture)))
    assert base_shape(spec, LABELS) == model_shape(tiny_base(architecture).model, LABELS)


@pytest.mark.parametrize("architecture", WRITERS)
def test_a_writers_shape_is_known_before_its_weights_are_read(tiny_writer, architecture):
    base = tiny_writer(architecture)
    assert base_shape(ModelSpec(base=str(base.folder), task="causal-lm"), None) == model_shape(base.model, None)
