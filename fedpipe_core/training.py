"""One edge's share of one round: some optimizer steps on its own batches.

The optimizer starts fresh in every round, since the factors it knew were replaced by the global ones.
"""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedpipe_core.config import TrainingSpec
from fedpipe_core.edge_model import EdgeModel, move_batch
from fedpipe_core.errors import UpdateRefusedError
from fedpipe_core.losses import count_learned, training_loss
from fedpipe_core.packing import count_examples

LARGEST_STEPS_FACTOR = 2.0  # on the rate of an edge that makes few steps


@dataclass(frozen=True)
class TrainingReport:
    """What a round cost an edge. `loss` is the mean over the round's steps."""

    steps: int
    examples_processed: int
    loss: float
    seconds: float


def rate_factor(spec: TrainingSpec, round_index: int, rounds: int) -> float:
    """Share of the peak learning rate in a round: linear from 1 in the first to `final_rate_fraction` in the last."""
    progress = (round_index - 1) / max(1, rounds - 1)
    return 1.0 - progress * (1.0 - spec.final_rate_fraction)


def steps_rate_factor(spec: TrainingSpec, steps: int) -> float:
    """√(rate_steps / steps), at most 2; 1 when no `rate_steps` is set.

    Steps of Adam move a weight by about the rate, so an edge that makes few of them in a round, being slow or taking
    large batches, counts for little in the average of all, and the average drifts to what the fast ones hold: the
    objective inconsistency of FedNova (2007.07481). The root is what the square-root rule for batches (2205.10343)
    comes to for a given number of examples.
    """
    return min(LARGEST_STEPS_FACTOR, math.sqrt(spec.rate_steps / steps)) if spec.rate_steps else 1.0


def train(edge: EdgeModel, batches: Iterator[Mapping[str, Tensor]], spec: TrainingSpec, rate: float) -> TrainingReport:
    """Train what the instance trains with AdamW at `rate` times the configured rates, linear warm-up and clipping.

    Raises UpdateRefusedError when loss or gradient is no longer a finite number; that edge's update must not count.
    """
    optimizer = _optimizer(edge, spec, rate)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (spec.warmup_steps + 1)))
    parameters = [*edge.adapter_parameters(), *edge.head_parameters()]
    losses: list[float] = []
    started, examples = time.perf_counter(), 0
    for step, batch in enumerate(batches, start=1):
        losses.append(_finite("loss", _backward(edge.model, batch, spec.micro_batch_size), step))
        _finite("gradient norm", nn.utils.clip_grad_norm_(parameters, spec.max_gradient_norm), step)
        optimizer.step()
        warmup.step()
        optimizer.zero_grad(set_to_none=True)
        examples += count_examples(batch)
    return TrainingReport(len(losses), examples, sum(losses) / len(losses), time.perf_counter() - started)


def _backward(model: nn.Module, batch: Mapping[str, Tensor], micro_batch_size: int | None) -> Tensor:
    """Add the gradients of a batch's mean loss, at most `micro_batch_size` rows at once, and return the loss."""
    rows = len(batch["labels"])
    size = micro_batch_size or rows
    parts = [{name: value[start : start + size] for name, value in batch.items()} for start in range(0, rows, size)]
    learned = [count_learned(part) for part in parts]
    total = torch.zeros(())
    for part, count in zip(parts, learned, strict=True):
        loss = training_loss(model, move_batch(part, model)) * (count / sum(learned))
        loss.backward()  # type: ignore[no-untyped-call]
        total = total + loss.detach().cpu()
    return total


def _optimizer(edge: EdgeModel, spec: TrainingSpec, rate: float) -> torch.optim.AdamW:
    peak = spec.learning_rate * rate
    groups = [
        {"params": edge.adapter_parameters(), "lr": peak},
        {"params": edge.head_parameters(), "lr": peak * spec.head_rate_factor},
    ]
    # Fused, it makes no copies: those of an embedding are as large as all activations.
    whole = bool(edge.origin)
    return torch.optim.AdamW(groups, weight_decay=spec.weight_decay, fused=True if whole else None)


def _finite(name: str, value: Tensor, step: int) -> float:
    number = value.item()
    if not math.isfinite(number):
        raise UpdateRefusedError(
            f"{name} became {number} at step {step}; check this edge's data, or lower training.learning_rate"
        )
    return number
