"""The loss of one batch: cross-entropy in nats, of one answer per example or of the next token.

Which of the two follows from the labels' shape. Computed in float32 whatever the base's dtype.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedpipe_core.tokenizing import IGNORED


def training_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean cross-entropy over the examples, labels (batch,), or over the learned tokens, labels (batch, tokens)."""
    if batch["labels"].dim() == 1:
        return functional.cross_entropy(class_logits(model, batch), batch["labels"])
    logits, targets, _ = token_logits(model, batch)
    return functional.cross_entropy(logits, targets)


def count_learned(batch: Mapping[str, Tensor]) -> int:
    """Over how many examples, or tokens, `training_loss` is a mean."""
    labels = batch["labels"]
    return len(labels) if labels.dim() == 1 else int((labels[:, 1:] != IGNORED).sum())


def class_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """A classifier's logits, (batch, labels)."""
    logits: Tensor = model(**_inputs(batch)).logits
    return logits.float()


def token_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (n, vocabulary) and ids (n,) of the n learned tokens, and the row each lies in (n,).

    The logits of position t predict token t + 1. They are computed only where some row learns the next token: over a
    large vocabulary the others would take more memory than the rest of the step.
    """
    targets = batch["labels"][:, 1:]
    columns = (targets != IGNORED).any(dim=0).nonzero()[:, 0]
    logits = model(**_inputs(batch), logits_to_keep=columns, use_cache=False).logits  # (batch, columns, vocabulary)
    targets = targets[:, columns]
    learned = targets != IGNORED
    rows = torch.arange(len(targets), device=targets.device)[:, None].expand_as(targets)
    return logits[learned].float(), targets[learned], rows[learned]


def _inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in batch.items() if key != "labels"}
