"""The loss of one batch: cross-entropy in nats, of one answer per example or of the next token.

Which of the two follows from the labels' shape. Computed in float32 whatever the base's dtype. A language model's
logits exist for some tokens at a time, in the backward pass as well: their gradient is taken right after them, and what
is kept for the backward pass is the gradient of the states they were made of.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
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
        score = learned.score
        total: Tensor = _SummedLoss.apply(learned.states, learned.targets, score, *score.trained)  # type: ignore[no-untyped-call]
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
    """Cross-entropy summed over all tokens, whose gradients are computed with it, some tokens at a time.

    They are those by the states, and by what of the scoring layer is trained.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, targets: Tensor, score: Score, *trained: nn.Parameter) -> Tensor:
        if not any(ctx.needs_input_grad):
            return _add_losses(states, targets, score, ())
        gradient = torch.empty_like(states)
        # No tensors to be saved: what autograd counts as kept would name them a second time, as they are gradients.
        ctx.trained = [torch.zeros_like(parameter) for parameter in trained]
        total = _add_losses(states, targets, score, trained, gradient, ctx.trained)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *total_gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        found = [value * total_gradients[0].to(value.dtype) for value in (gradient, *ctx.trained)]
        return found[0], None, None, *found[1:]


def _add_losses(
    states: Tensor,
    targets: Tensor,
    score: Callable[[Tensor], Tensor],
    trained: Sequence[nn.Parameter],
    gradient: Tensor | None = None,
    trained_gradients: Sequence[Tensor] = (),
) -> Tensor:
    """The summed loss; `gradient`, if any, is filled with its gradient by the states, and those by `trained` added."""
    total = torch.zeros((), device=states.device)
    for start in range(0, len(targets), SCORED_AT_ONCE):
        part = slice(start, start + SCORED_AT_ONCE)
        with torch.set_grad_enabled(gradient is not None), _uncounted():
            given = states[part].detach().requires_grad_(gradient is not None)
            loss = functional.cross_entropy(score(given).float(), targets[part], reduction="sum")
            if gradient is not None:
                gradient[part], *found = torch.autograd.grad(loss, (given, *trained))
                for added, more in zip(trained_gradients, found, strict=True):
                    added.add_(more)
        total = total + loss.detach()
    return total


def _uncounted() -> Any:
    """Hooks that count what is kept for the backward pass see nothing of what is gone again before it."""
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def _inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in batch.items() if key != "labels"}
