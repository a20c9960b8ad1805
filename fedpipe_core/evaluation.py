"""What a model is worth on a set of examples: its answer and loss on every one, and the metrics that follow."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from fedpipe_core.batches import Batch, TokenizedExamples, evaluation_batches
from fedpipe_core.edge_model import move_batch
from fedpipe_core.predictions import Predictions


def predict(model: nn.Module, examples: TokenizedExamples, batch_size: int, batches_at_once: int = 1) -> Predictions:
    """Answer every example, in the examples' own order; the loss is cross-entropy in nats.

    `batches_at_once` threads of one core each share the batches. They never wait for each other, so they stay fast on
    a machine that has other work, where one operation spread over all cores waits for the slowest.
    """
    predicted = np.zeros(len(examples), dtype=np.int64)
    losses = np.zeros(len(examples), dtype=np.float64)

    def answer(indexed: tuple[list[int], Batch]) -> None:
        indices, batch = indexed
        predicted[indices], losses[indices] = _answer(model, batch)

    with ThreadPoolExecutor(batches_at_once, initializer=torch.set_num_threads, initargs=(1,)) as threads:
        run = map if batches_at_once == 1 else threads.map
        for _ in run(answer, evaluation_batches(examples, batch_size)):
            pass
    return Predictions(evaluation_sha256(examples), np.array(examples.labels, dtype=np.int64), predicted, losses)


@torch.inference_mode()
def _answer(model: nn.Module, batch: Batch) -> tuple[Any, Any]:
    """Predicted labels and losses of one batch, each (examples,)."""
    inputs = move_batch(batch, model)
    labels = inputs.pop("labels")
    logits = model(**inputs).logits.float()
    losses = functional.cross_entropy(logits, labels, reduction="none")
    return logits.argmax(dim=-1).cpu().numpy(), losses.cpu().numpy()


def metrics_of(predictions: Predictions) -> dict[str, float]:
    """Accuracy, macro-F1 over the labels that occur, and mean loss."""
    return {name: predictions.metric(name) for name in ("accuracy", "macro_f1", "loss")}


def evaluation_sha256(examples: TokenizedExamples) -> str:
    """Name of an evaluation set: equal for the same tokens and labels in the same order."""
    return hashlib.sha256(json.dumps([examples.token_ids, examples.labels]).encode()).hexdigest()
