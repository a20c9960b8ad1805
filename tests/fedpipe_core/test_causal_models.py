"""What a causal language model goes through from base to export, for every way its matrices are laid out."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import WRITERS, random_adapter, save_tiny_writer, tiny_dialogues, tiny_tokenizer
from transformers.models.auto import AutoModelForCausalLM

from fedpipe_core.activation_cost import measured_activation_cost
from fedpipe_core.adapters import initial_adapter, split_for_edge
from fedpipe_core.architecture import adaptable_modules, head_parameters, model_shape
from fedpipe_core.batches import pad_batch, training_batches
from fedpipe_core.config import ModelSpec, PlanningSpec, TrainingSpec
from fedpipe_core.edge_model import (
    build_edge_model,
    build_global_model,
    load_adapter,
    load_global_adapter,
    read_adapter,
)
from fedpipe_core.errors import ModelError
from fedpipe_core.evaluation import metrics_of, predict
from fedpipe_core.export import EXPORT_SCHEMES, TunedModel, merge
from fedpipe_core.importance import score_modules
from fedpipe_core.losses import training_loss
from fedpipe_core.model import Base, load_base
from fedpipe_core.step_cost import measured_step_cost
from fedpipe_core.training import train
from fedpipe_core.wire import decode_adapter, encode_adapter

ROWS = tiny_dialogues(24)
BATCH = pad_batch(ROWS, range(8))
MODULES_PER_BLOCK = {"llama": 7, "gpt2": 4, "gpt_neox": 4, "phi3": 4, "tied": 7}
VOCABULARY = 65


@pytest.mark.parametrize("architecture", WRITERS)
def test_matrices_are_found_by_type_and_shape_and_the_output_layer_is_no_head(
    tiny_writer: Callable[..., Base], architecture: str
) -> None:
    model = tiny_writer(architecture).model
    shape = model_shape(model, None)
    assert len(adaptable_modules(model)) == 2 * MODULES_PER_BLOCK[architecture]
    assert head_parameters(model) == {}
    assert (shape.head_parameters, shape.output_features, shape.scored_positions) == (0, VOCABULARY, "token")


@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("architecture", WRITERS)
def test_a_few_steps_lower_the_loss_and_the_base_stays(
    tiny_writer: Callable[..., Base], architecture: str, bits: int
) -> None:
    base = tiny_writer(architecture, bits).model
    before = {name: value.clone() for name, value in base.state_dict().items() if isinstance(value, torch.Tensor)}
    shapes = adaptable_modules(base)
    ranks = dict.fromkeys(shapes, 4)
    edge = build_edge_model(base, ranks, 4, scaling=1.0)
    load_adapter(edge, *split_for_edge(initial_adapter(shapes, 4, {}, seed=0), ranks, seed=0))
    first = training_loss(edge.model, BATCH).item()
    train(edge, training_batches(ROWS, 8, 6, [0]), TrainingSpec(learning_rate=0.02), rate=1.0)
    assert training_loss(edge.model, BATCH).item() < first - 0.1
    assert read_adapter(edge).head == {}
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items() if name in before)


@pytest.mark.parametrize("architecture", WRITERS)
@torch.inference_mode()
def test_merged_model_computes_what_base_and_adapter_compute(
    tiny_writer: Callable[..., Base], architecture: str
) -> None:
    base = tiny_writer(architecture)
    adapter = random_adapter(base.model, dict.fromkeys(adaptable_modules(base.model), 3))
    edge = build_global_model(base.model, 3)
    load_global_adapter(edge, adapter)
    merged, beside = merge(base.model, adapter), edge.model
    torch.testing.assert_close(training_loss(merged, BATCH), training_loss(beside, BATCH), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", ["adapter", "merged"])
@pytest.mark.parametrize("architecture", WRITERS)
def test_written_export_reads_back_as_the_merged_model(
    tiny_writer: Callable[..., Base], architecture: str, scheme: str, tmp_path: Path
) -> None:
    base = tiny_writer(architecture)
    adapter = random_adapter(base.model, dict.fromkeys(adaptable_modules(base.model), 3), size=0.1)
    tuned = TunedModel(base, adapter, "fp32", label_names=None, chat_template="{{ messages[0]['content'] }}")
    EXPORT_SCHEMES[scheme].write(tuned, tmp_path)
    found = metrics_of(predict(EXPORT_SCHEMES[scheme].load(tuned, tmp_path), ROWS, 8))
    assert found == pytest.approx(metrics_of(predict(merge(base.model, adapter), ROWS, 8)), rel=1e-4)
    assert base.tokenizer.chat_template is None


def test_tied_embeddings_are_written_once_and_read_as_one(tiny_writer: Callable[..., Base], tmp_path: Path) -> None:
    base = tiny_writer("tied")
    tuned = TunedModel(base, random_adapter(base.model, {"model.layers.0.mlp.up_proj": 2}), "bf16", None)
    EXPORT_SCHEMES["merged"].write(tuned, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_exported_model_keeps_its_cache_for_writing(tiny_writer: Callable[..., Base], tmp_path: Path) -> None:
    base = tiny_writer("llama")
    tuned = TunedModel(base, random_adapter(base.model, {"model.layers.0.mlp.up_proj": 2}), "fp32", None)
    EXPORT_SCHEMES["merged"].write(tuned, tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.use_cache


def test_adapter_without_a_head_travels_in_every_number_format(tiny_writer: Callable[..., Base]) -> None:
    adapter = random_adapter(tiny_writer("llama").model, {"model.layers.0.mlp.up_proj": 2})
    for dtype in ("fp32", "bf16", "int8", "nf4"):
        assert decode_adapter(encode_adapter(adapter, dtype)).head == {}


@pytest.mark.parametrize("method", ["adalora", "gradient_spectrum"])
def test_modules_are_scored_without_a_head_to_train(tiny_writer: Callable[..., Base], method: str) -> None:
    batches = training_batches(ROWS, 4, 6, [0])
    scores = score_modules(tiny_writer("llama").model, batches, PlanningSpec(importance=method, probe_rank=2), seed=0)
    values = [value for listed in scores.values() for value in listed]
    assert len(set(values)) > 2
    assert sum(values) == pytest.approx(1)


def test_steps_and_activations_are_measured_without_a_head_to_train(tiny_writer: Callable[..., Base]) -> None:
    model, small, large = tiny_writer("llama").model, pad_batch(ROWS, range(2)), pad_batch(ROWS, range(8))
    assert measured_step_cost(model, small, large).per_token_seconds > 0
    assert measured_activation_cost(model, small, large).per_token_bytes > 0


def test_missing_output_layer_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_writer(tmp_path, "llama")
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"1 tensors are missing or of another size, such as lm_head\.weight"):
        load_base(ModelSpec(base=str(folder), task="causal-lm"), None, 32, seed=0)


def test_pad_token_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_writer(tmp_path, "llama")
    tokenizer = tiny_tokenizer(decoder=True)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match="pads with id 65 but the model knows 65 tokens"):
        load_base(ModelSpec(base=str(folder), task="causal-lm"), None, 32, seed=0)


@pytest.mark.parametrize("packing", [False, True])
def test_gradients_summed_over_passes_train_like_the_batch_at_once(
    tiny_writer: Callable[..., Base], packing: bool
) -> None:
    base = tiny_writer("llama").model
    shapes = adaptable_modules(base)
    ranks = dict.fromkeys(shapes, 2)
    found = []
    for micro_batch_size in (None, 3):
        edge = build_edge_model(base, ranks, 2, scaling=1.0)
        load_adapter(edge, *split_for_edge(initial_adapter(shapes, 2, {}, seed=0), ranks, seed=0))
        spec = TrainingSpec(learning_rate=0.01, micro_batch_size=micro_batch_size)
        batches = training_batches(ROWS, 8, 4, [0], packed_width=24 if packing else None)
        report = train(edge, batches, spec, rate=1.0)
        assert report.examples_processed == 32
        found.append((report.loss, read_adapter(edge).factors["model.layers.0.mlp.up_proj"].dense()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("architecture", WRITERS)
def test_attention_runs_in_one_fused_kernel(tiny_writer: Callable[..., Base], architecture: str) -> None:
    model, batch = tiny_writer(architecture).model, pad_batch(ROWS, range(4))
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        training_loss(model, batch)
    assert "aten::scaled_dot_product_attention" in {event.key for event in profiler.key_averages()}
