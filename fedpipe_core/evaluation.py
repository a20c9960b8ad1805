"""What a model is worth on a set of examples: its answer and loss on every one, and the metrics that follow."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from fedpipe_core.batches import Batch, evaluation_batches
from fedpipe_core.config import FederationConfig
from fedpipe_core.config_inputs import GenerationSpec
from fedpipe_core.data import Examples
from fedpipe_core.dialogues import Dialogues
from fedpipe_core.edge_model import move_batch
from fedpipe_core.generation import write_texts
from fedpipe_core.losses import class_logits, learned_tokens, token_logits
from fedpipe_core.predictions import Answers, Predictions, metric_of
from fedpipe_core.seeding import drawn
from fedpipe_core.side_by_side import side_by_side
from fedpipe_core.text_metrics import text_counts
from fedpipe_core.token_predictions import TokenPredictions
from fedpipe_core.tokenizing import Prompts, TokenizedExamples, tokenize_prompts


@dataclass(frozen=True)
class WritingTask:
    """Prompts to continue, how, and the tokenizer that reads the answers."""

    prompts: Prompts
    spec: GenerationSpec
    tokenizer: Any


def share_of(examples: TokenizedExamples, config: FederationConfig) -> TokenizedExamples:
    """The rows on which a round is judged that is not judged on all, drawn by seed."""
    return examples.select(drawn("evaluation", len(examples), config.evaluation.examples_per_round, config.seed))


def writing_task(examples: Examples | Dialogues, config: FederationConfig, tokenizer: Any) -> WritingTask | None:
    """The prompts of these rows that a judged model continues, drawn by seed; None where the config asks for none."""
    spec = config.evaluation.generate
    if spec is None or not isinstance(examples, Dialogues):
        return None
    chosen = examples.select(drawn("generation", len(examples), spec.examples, config.seed))
    return WritingTask(tokenize_prompts(chosen, tokenizer, config.model.max_tokens), spec, tokenizer)


def predict(
    model: nn.Module,
    examples: TokenizedExamples,
    batch_size: int,
    batches_at_once: int = 1,
    writing: WritingTask | None = None,
) -> Answers:
    """Answer every example, in the examples' own order; the loss is cross-entropy in nats.

    A language model also continues the prompts of `writing`, if any.
    `batches_at_once` threads of one core each share the batches.
    """
    if not examples.per_token:
        predicted, losses = _answers(model, examples, batch_size, batches_at_once, _classify)
        labels = np.array(examples.labels, dtype=np.int64)
        return Predictions(evaluation_sha256(examples), labels, predicted.astype(np.int64), losses)
    counted = _answers(model, examples, batch_size, batches_at_once, _score_tokens)
    tokens, right = (values.astype(np.int64) for values in counted[:2])
    found = TokenPredictions(evaluation_sha256(examples, writing), tokens, right, counted[2])
    if writing is None:
        return found
    texts = write_texts(model, writing.tokenizer, writing.prompts, writing.spec, batches_at_once)
    return replace(found, written=text_counts(writing.spec, texts, writing.prompts.references))


def metrics_of(predictions: Answers) -> dict[str, float]:
    """Every metric that was measured, by name."""
    return {name: metric_of(predictions, name) for name in predictions.metrics}


def evaluation_sha256(examples: TokenizedExamples, writing: WritingTask | None = None) -> str:
    """Name of an evaluation set: equal for the same tokens, labels and prompts in the same order."""
    content: list[Any] = [examples.token_ids, examples.labels]
    if writing is not None:
        content += [
            writing.prompts.token_ids,
            writing.prompts.references,
            writing.spec.model_dump(exclude={"batch_size"}),
        ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _answers(
    model: nn.Module,
    examples: TokenizedExamples,
    batch_size: int,
    batches_at_once: int,
    answer: Callable[[nn.Module, Batch], torch.Tensor],
) -> Any:
    """What `answer` gives for every example, (values, examples), float64."""
    values = np.zeros((3 if examples.per_token else 2, len(examples)))

    def fill(indexed: tuple[list[int], Batch]) -> None:
        indices, batch = indexed
        values[:, indices] = answer(model, batch).double().cpu().numpy()

    side_by_side(fill, evaluation_batches(examples, batch_size), batches_at_once)
    return values


@torch.inference_mode()
def _classify(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Predicted labels and losses of one batch, (2, examples)."""
    moved = move_batch(batch, model)
    logits = class_logits(model, moved)
    losses = functional.cross_entropy(logits, moved["labels"], reduction="none")
    return torch.stack([logits.argmax(dim=-1).double(), losses.double()])


@torch.inference_mode()
def _score_tokens(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Learned tokens, right ones among them and summed losses of one batch, (3, examples)."""
    moved = move_batch(batch, model)
    learned = learned_tokens(model, moved)
    sums = torch.zeros(3, len(moved["labels"]), dtype=torch.float64, device=learned.rows.device)
    for logits, targets, rows in token_logits(learned):
        losses = functional.cross_entropy(logits, targets, reduction="none").double()
        right = (logits.argmax(dim=-1) == targets).double()
        sums.index_add_(1, rows, torch.stack([torch.ones_like(losses), right, losses]))
    return sums
