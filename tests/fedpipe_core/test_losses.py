from collections.abc import Callable

import pytest
import torch
from tiny_models import WRITERS, tiny_dialogues

from fedpipe_core.batches import pad_batch
from fedpipe_core.losses import token_logits, training_loss
from fedpipe_core.model import Base
from fedpipe_core.tokenizing import IGNORED, TokenizedExamples

ROWS = tiny_dialogues(6)


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
    logits, targets, rows = token_logits(model, batch)
    learned = [[label for label in labels if label != IGNORED] for labels in ROWS.labels]
    assert [targets[rows == row].tolist() for row in range(6)] == learned
    assert len(logits) == sum(map(len, learned))


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
    _, targets, _ = token_logits(tiny_writer("llama").model, pad_batch(plain, [0]))
    assert targets.tolist() == [8, 9]
