from collections.abc import Callable

import pytest
import torch
from tiny_models import WRITERS, tiny_dialogues
from transformers import Gemma2Config, Gemma2ForCausalLM

from fedpipe_core import losses, output_layer
from fedpipe_core.activation_cost import saved_tensor_bytes
from fedpipe_core.architecture import adaptable_modules
from fedpipe_core.batches import pad_batch
from fedpipe_core.edge_model import build_edge_model
from fedpipe_core.forms import FORMS, InstanceSpec
from fedpipe_core.losses import learned_tokens, token_logits, training_loss
from fedpipe_core.model import Base
from fedpipe_core.tokenizing import IGNORED, TokenizedExamples

ROWS = tiny_dialogues(6)
BATCH = pad_batch(ROWS, range(6))


@pytest.mark.parametrize("architecture", WRITERS)
@torch.inference_mode()
def test_token_loss_is_the_one_transformers_computes(tiny_writer: Callable[..., Base], architecture: str) -> None:
    model, batch = tiny_writer(architecture).model, pad_batch(ROWS, range(6))
    torch.testing.assert_close(training_loss(model, batch), model(**batch).loss)


@torch.inference_mode()
def test_padding_changes_no_loss(tiny_writer: Callable[..., Base]) -> None:
    model = tiny_writer("llama").model
    narrow, wide = pad_batch(ROWS, range(6)), pad_batch(ROWS, range(6), pad_to_multiple_of=32)
    torch.testing.assert_close(training_loss(model, narrow), training_loss(model, wide))


@torch.inference_mode()
def test_the_prompts_own_tokens_are_not_learned(tiny_writer: Callable[..., Base]) -> None:
    model, batch = tiny_writer("llama").model, pad_batch(ROWS, range(6))
    _, targets, rows, _ = learned_tokens(model, batch)
    learned = [[label for label in labels if label != IGNORED] for labels in ROWS.labels]
    assert [targets[rows == row].tolist() for row in range(6)] == learned
    assert sum(len(logits) for logits, *_ in token_logits(learned_tokens(model, batch))) == sum(map(len, learned))


@torch.inference_mode()
def test_loss_of_a_batch_is_the_mean_over_its_tokens(tiny_writer: Callable[..., Base]) -> None:
    model = tiny_writer("llama").model
    single = [float(training_loss(model, pad_batch(ROWS, [row]))) for row in range(6)]
    counts = [sum(label != IGNORED for label in labels) for labels in ROWS.labels]
    mean = sum(loss * count for loss, count in zip(single, counts, strict=True)) / sum(counts)
    assert float(training_loss(model, pad_batch(ROWS, range(6)))) == pytest.approx(mean, rel=1e-5)


@torch.inference_mode()
def test_a_row_whose_first_token_is_learned_loses_only_that_token(tiny_writer: Callable[..., Base]) -> None:
    plain = TokenizedExamples([[7, 8, 9]], [[7, 8, 9]], pad_token_id=4)
    assert learned_tokens(tiny_writer("llama").model, pad_batch(plain, [0])).targets.tolist() == [8, 9]


def assert_gradients_are_those_of_transformers(
    model: torch.nn.Module, parameters: list[torch.nn.Parameter], factor: float = 1
) -> None:
    """Of `factor` times the loss of `BATCH`."""
    ours, theirs = training_loss(model, BATCH), model(**BATCH, use_cache=False).loss
    found, expected = (torch.autograd.grad(factor * loss, parameters) for loss in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("parted", [True, False])
@pytest.mark.parametrize("architecture", WRITERS)
def test_gradients_of_tokens_scored_some_at_a_time_are_those_of_transformers(
    tiny_writer: Callable[..., Base], architecture: str, parted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_writer(architecture).model
    monkeypatch.setattr(losses, "SCORED_AT_ONCE", 4)
    monkeypatch.setitem(output_layer._parted, type(base), parted)
    edge = build_edge_model(base, dict.fromkeys(adaptable_modules(base), 2), 2, scaling=1.0)
    assert_gradients_are_those_of_transformers(edge.model, edge.adapter_parameters())


@pytest.mark.parametrize("parted", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "tied", "gpt2"])
def test_gradients_of_all_parameters_are_those_of_transformers(
    tiny_writer: Callable[..., Base], architecture: str, parted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_writer(architecture).model
    monkeypatch.setattr(losses, "SCORED_AT_ONCE", 4)
    monkeypatch.setitem(output_layer._parted, type(base), parted)
    edge = FORMS["whole"].build(base, InstanceSpec({}, (), tail_cap=0, scaling=1.0))
    assert_gradients_are_those_of_transformers(edge.model, list(edge.model.parameters()), factor=3)


def test_a_model_that_caps_its_logits_is_scored_by_its_own_code() -> None:
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 1}
    config = Gemma2Config(vocab_size=65, hidden_size=32, intermediate_size=48, final_logit_softcapping=0.5, **sizes)
    model = Gemma2ForCausalLM(config).eval()
    torch.testing.assert_close(training_loss(model, BATCH), model(**BATCH).loss)
    assert output_layer._parted[Gemma2ForCausalLM]


def test_no_logits_are_kept_for_the_backward_pass() -> None:
    states = torch.randn(50, 8, requires_grad=True)
    weight, targets = torch.randn(1000, 8), torch.randint(1000, (50,))
    kept, _ = saved_tensor_bytes(lambda: losses._SummedLoss.apply(states, targets, lambda part: part @ weight.T))
    assert kept == 4 * 50 * 8
