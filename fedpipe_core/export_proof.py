"""What a reloaded export is worth beside others: how often it answers alike, and how long an example takes.

Both are measured on padded batches of the held-out set. Metrics and losses are `fedpipe_core.evaluation`'s matter.
"""

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fedpipe_core.batches import Batch
from fedpipe_core.edge_model import move_batch
from fedpipe_core.result_schemas import Latency
from fedpipe_core.side_by_side import side_by_side

WARM_UPS = 2
FEWEST_PAIRS = 8
MOST_PAIRS = 60
PAIRING_SECONDS = 3.0
_REPLICATES = 2000


def answers(model: nn.Module, batches: Sequence[Batch], batches_at_once: int = 1) -> Tensor:
    """The most likely label of every example, or of a language model the next token at every token, in one row.

    `batches_at_once` threads of one core each share the batches, as in `evaluation.predict`.
    """

    @torch.inference_mode()
    def answer(batch: Batch) -> Tensor:
        inputs = _inputs(batch, model)
        likeliest = model(**inputs).logits.argmax(dim=-1)
        found: Tensor = likeliest[inputs["attention_mask"].bool()] if likeliest.ndim > 1 else likeliest
        return found

    return torch.cat(side_by_side(answer, batches, batches_at_once)).cpu()


def agreement(found: Tensor, reference: Tensor) -> float:
    """Share of equal answers."""
    return float((found == reference).float().mean())


def measure_latency(model: nn.Module, base: nn.Module, batch: Batch) -> Latency:
    """Time both models on one batch in turns, who goes first changing every time, until three seconds have passed.

    What else the machine does hits both, so the median of the pairs' ratios is steadier than either median; its
    interval is a percentile bootstrap.
    """
    examples = len(batch["input_ids"])
    run, run_base = _runner(model, batch), _runner(base, batch)
    for _ in range(WARM_UPS):
        run()
        run_base()
    pairs: list[tuple[float, float]] = []
    deadline = time.perf_counter() + PAIRING_SECONDS
    while len(pairs) < FEWEST_PAIRS or (len(pairs) < MOST_PAIRS and time.perf_counter() < deadline):
        if len(pairs) % 2:
            base_seconds = run_base()
            pairs.append((run(), base_seconds))
        else:
            pairs.append((run(), run_base()))
    seconds = np.array(pairs) / examples
    ratios = seconds[:, 0] / seconds[:, 1]
    draws = np.random.default_rng(0).integers(len(ratios), size=(_REPLICATES, len(ratios)))
    low, high = np.percentile(np.median(ratios[draws], axis=1), [2.5, 97.5])
    return Latency(
        seconds=float(np.median(seconds[:, 0])),
        base_seconds=float(np.median(seconds[:, 1])),
        ratio=float(np.median(ratios)),
        ratio_low=float(low),
        ratio_high=float(high),
        pairs=len(pairs),
    )


def _runner(model: nn.Module, batch: Batch) -> Callable[[], float]:
    inputs = _inputs(batch, model)

    @torch.inference_mode()
    def run() -> float:
        started = time.perf_counter()
        model(**inputs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - started

    return run


def _inputs(batch: Batch, model: nn.Module) -> Batch:
    return {name: value for name, value in move_batch(batch, model).items() if name != "labels"}
