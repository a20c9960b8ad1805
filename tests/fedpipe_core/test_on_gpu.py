"""An edge's whole work on a GPU, at every width of the base: profile, plan's prediction, round, evaluation, export."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import LABELS, save_tiny_model, save_tiny_writer, tiny_dialogues, tiny_examples

from fedpipe_core.activation_cost import measured_activation_cost
from fedpipe_core.adapters import initial_adapter, split_for_edge
from fedpipe_core.architecture import adaptable_modules, head_parameters
from fedpipe_core.batches import pad_batch, training_batches
from fedpipe_core.config import ModelSpec, PlanningSpec, TrainingSpec
from fedpipe_core.edge_model import build_edge_model, load_adapter, read_adapter
from fedpipe_core.evaluation import metrics_of, predict
from fedpipe_core.export import EXPORT_SCHEMES, TunedModel
from fedpipe_core.importance import Batches, score_modules
from fedpipe_core.losses import training_loss
from fedpipe_core.model import Base, load_base
from fedpipe_core.quantized_export import QUANTIZED_SCHEMES
from fedpipe_core.step_cost import measured_step_cost
from fedpipe_core.tokenizing import TokenizedExamples
from fedpipe_core.training import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# bitsandbytes multiplies by blocks of 64
SIZES = {"hidden_size": 64, "intermediate_size": 128}
ENCODER = ("bert", "sequence-classification", tiny_examples(64))
DECODER = ("llama", "causal-lm", tiny_dialogues(64))
SCHEMES = {**EXPORT_SCHEMES, **QUANTIZED_SCHEMES}
Kind = tuple[str, str, TokenizedExamples]


@pytest.fixture
def base_of(tmp_path: Path) -> Callable[..., Base]:
    def load(kind: Kind, bits: int) -> Base:
        architecture, task, _ = kind
        write = save_tiny_writer if task == "causal-lm" else save_tiny_model
        folder = write(tmp_path / f"{architecture}-{bits}", architecture, **SIZES)
        return load_base(ModelSpec(base=str(folder), task=task), None if task == "causal-lm" else LABELS, bits, seed=0)

    return load


def batches_of(examples: TokenizedExamples, steps: int) -> Batches:
    return training_batches(examples, 8, steps, [0])


each_kind = pytest.mark.parametrize("kind", [ENCODER, DECODER], ids=["encoder", "decoder"])
each_width = pytest.mark.parametrize("bits", [32, 16, 8, 4])


@each_kind
@each_width
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_round_lowers_the_loss_and_leaves_the_base(
    base_of: Callable[..., Base], kind: Kind, bits: int, checkpointing: bool
) -> None:
    base, examples = base_of(kind, bits), kind[2]
    before = {name: value.clone() for name, value in base.model.state_dict().items() if torch.is_tensor(value)}
    shapes = adaptable_modules(base.model)
    ranks = dict.fromkeys(list(shapes)[3:], 4)
    edge = build_edge_model(base.model, ranks, 8, scaling=1.0, checkpointing=checkpointing)
    head = {name: value.detach().float().cpu() for name, value in head_parameters(base.model).items()}
    load_adapter(edge, *split_for_edge(initial_adapter(shapes, 8, head, seed=0), ranks, seed=0))
    start = metrics_of(predict(edge.model, examples, 16))["loss"]
    train(edge, batches_of(examples, 30), TrainingSpec(learning_rate=0.01), rate=1.0)
    assert metrics_of(predict(edge.model, examples, 16))["loss"] < start - 0.05
    assert {factors.A.dtype for factors in read_adapter(edge).factors.values()} == {torch.float32}
    assert all(torch.equal(base.model.state_dict()[name], value) for name, value in before.items())


@each_kind
@each_width
@pytest.mark.parametrize("method", ["adalora", "gradient_spectrum"])
def test_modules_are_scored_and_steps_are_timed(
    base_of: Callable[..., Base], kind: Kind, bits: int, method: str
) -> None:
    base, examples = base_of(kind, bits), kind[2]
    scores = score_modules(base.model, batches_of(examples, 5), PlanningSpec(importance=method, probe_rank=2), seed=0)
    assert sum(map(sum, scores.values())) == pytest.approx(1)
    sizes = pad_batch(examples, range(4)), pad_batch(examples, range(16))
    assert measured_step_cost(base.model, *sizes, bits=(8, 4)).per_token_seconds > 0
    assert measured_activation_cost(base.model, *sizes).per_token_bytes > 0


@each_width
def test_the_loss_is_nearly_that_of_float32(base_of: Callable[..., Base], bits: int) -> None:
    dense, narrow = base_of(DECODER, 32), base_of(DECODER, bits)
    (batch,) = batches_of(DECODER[2], 1)
    moved = {name: value.to("cuda") for name, value in batch.items()}
    exact, found = (float(training_loss(base.model, moved)) for base in (dense, narrow))
    assert found == pytest.approx(exact, rel=0.02)


@each_kind
@pytest.mark.parametrize("scheme", ["adapter", "merged", "int8", "nf4", "nf4+adapter"])
def test_an_export_read_back_answers_like_the_tuned_model(
    base_of: Callable[..., Base], tmp_path: Path, kind: Kind, scheme: str
) -> None:
    base, examples = base_of(kind, 32), kind[2]
    head = {name: value.detach().float().cpu() for name, value in head_parameters(base.model).items()}
    tuned = TunedModel(base, initial_adapter(adaptable_modules(base.model), 2, head, seed=0), "fp32", None)
    SCHEMES[scheme].write(tuned, tmp_path / "export")
    again = SCHEMES[scheme].load(tuned, tmp_path / "export")
    expected, found = (metrics_of(predict(model, examples, 16))["loss"] for model in (base.model, again))
    assert found == pytest.approx(expected, rel=0.03)
