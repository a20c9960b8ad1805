"""The loss of one batch: cross-entropy in nats, of one answer per example or of the next token.

Which of the two follows from the labels' shape. Computed in float32 whatever the base's dtype. A language model's
logits exist for some tokens at a time, in the backward pass as well: their gradient is taken right after them, and what
is kept for the backward pass is the gradient of the states they were made of.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedpipe_core.costs import SCORED_AT_ONCE
from fedpipe_core.output_layer import Score, states_and_score
from fedpipe_core.precision import computed_like
from fedpipe_core.tokenizing import IGNORED


class LearnedTokens(NamedTuple):
    """States (n, features) that predict the n learned tokens, their ids (n,), and the row each lies in (n,)."""

    states: Tensor
    targets: Tensor
    rows: Tensor
    score: Score


def training_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean cross-entropy over the examples, labels (batch,), or over the learned tokens, labels (batch, tokens)."""
    with computed_like(model):
        if batch["labels"].dim() == 1:
            return functional.cross_entropy(class_logits(model, batch), batch["labels"])
        learned = learned_tokens(model, batch)
        total: Tensor = _SummedLoss.apply(learned.states, learned.targets, learned.score)  # type: ignore[no-untyped-call]
        return total / len(learned.targets)


def count_learned(batch: Mapping[str, Tensor]) -> int:
    """Over how many examples, or tokens, `training_loss` is a mean."""
    labels = batch["labels"]
    return len(labels) if labels.dim() == 1 else int((labels[:, 1:] != IGNORED).sum())


def class_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """A classifier's logits, (batch, labels)."""
    logits: Tensor = model(**_inputs(batch)).logits
    return logits.float()


def learned_tokens(model: nn.Module, batch: Mapping[str, Tensor]) -> LearnedTokens:
    """What predicts a batch's learned tokens: the state at position t predicts token t + 1."""
    targets = batch["labels"][:, 1:]
    columns = (targets != IGNORED).any(dim=0).nonzero()[:, 0]
    targets = targets[:, columns]
    # All that waits for a GPU comes before the forward pass, which would else have to end first.
    rows, places = (targets != IGNORED).nonzero(as_tuple=True)
    states, score = states_and_score(model, _inputs(batch), columns)
    return LearnedTokens(states[rows, places], targets[rows, places], rows, score)


def token_logits(learned: LearnedTokens) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Logits (n, vocabulary), ids (n,) and rows (n,) of the learned tokens, at most `SCORED_AT_ONCE` at a time."""
    for start in range(0, len(learned.targets), SCORED_AT_ONCE):
        part = slice(start, start + SCORED_AT_ONCE)
        yield learned.score(learned.states[part]).float(), learned.targets[part], learned.rows[part]


class _SummedLoss(torch.autograd.Function):
    """Cross-entropy summed over all tokens, whose gradient by the states is computed with it, some at a time."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, targets: Tensor, score: Score) -> Tensor:
        if not ctx.needs_input_grad[0]:
            return _add_losses(states, targets, score, None)
        gradient = torch.empty_like(states)
        total = _add_losses(states, targets, score, gradient)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *total_gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * total_gradients[0].to(gradient.dtype), None, None


def _add_losses(states: Tensor, targets: Tensor, score: Score, gradient: Tensor | None) -> Tensor:
    """The summed loss; `gradient`, if any, is filled with its gradient by the states."""
    total = torch.zeros((), device=states.device)
    for start in range(0, len(targets), SCORED_AT_ONCE):
        part = slice(start, start + SCORED_AT_ONCE)
        with torch.set_grad_enabled(gradient is not None), _uncounted():
            given = states[part].detach().requires_grad_(gradient is not None)
            loss = functional.cross_entropy(score(given).float(), targets[part], reduction="sum")
            if gradient is not None:
                gradient[part] = torch.autograd.grad(loss, given)[0]
        total = total + loss.detach()
    return total


def _uncounted() -> Any:
    """Hooks that count what is kept for the backward pass see nothing of what is gone again before it."""
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def _inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in batch.items() if key != "labels"}
