"""What a model is worth on a set of examples: its answer and loss on every one, and the metrics that follow."""

import hashlib
import json

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from fedpipe_core.batches import TokenizedExamples, evaluation_batches
from fedpipe_core.edge_model import move_batch
from fedpipe_core.predictions import Predictions


@torch.inference_mode()
def predict(model: nn.Module, examples: TokenizedExamples, batch_size: int) -> Predictions:
    """Answer every example, in the examples' own order; the loss is cross-entropy in nats."""
    predicted = np.zeros(len(examples), dtype=np.int64)
    losses = np.zeros(len(examples), dtype=np.float64)
    for indices, batch in evaluation_batches(examples, batch_size):
        inputs = move_batch(batch, model)
        labels = inputs.pop("labels")
        logits = model(**inputs).logits.float()
        predicted[indices] = logits.argmax(dim=-1).cpu().numpy()
        losses[indices] = functional.cross_entropy(logits, labels, reduction="none").cpu().numpy()
    return Predictions(evaluation_sha256(examples), np.array(examples.labels, dtype=np.int64), predicted, losses)


def metrics_of(predictions: Predictions) -> dict[str, float]:
    """Accuracy, macro-F1 over the labels that occur, and mean loss."""
    return {name: predictions.metric(name) for name in ("accuracy", "macro_f1", "loss")}


def evaluation_sha256(examples: TokenizedExamples) -> str:
    """Name of an evaluation set: equal for the same tokens and labels in the same order."""
    return hashlib.sha256(json.dumps([examples.token_ids, examples.labels]).encode()).hexdigest()
