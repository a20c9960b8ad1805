"""One edge's profile: what it has and what its data finds important, as numbers only.

Declared resources replace measured ones, so that a plan made of declarations is a function of config and seed alone.
"""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

from fedpipe_core.batches import Batch, longest_example_tokens, pad_batch, tokens_per_example, training_batches
from fedpipe_core.config import FederationConfig, ResourcesSpec
from fedpipe_core.errors import RunError
from fedpipe_core.importance import score_modules
from fedpipe_core.methods import METHODS
from fedpipe_core.model import Base, device_of
from fedpipe_core.resources import declared_step_cost, free_memory_bytes, measured_activation_cost, measured_step_cost
from fedpipe_core.schemas import EdgeProfile, ModelShape, StepCost
from fedpipe_core.tokenizing import TokenizedExamples

GIB = 2**30
COUNTED_EXAMPLES = (1, 4)  # in the two batches whose kept bytes are counted, which grow by the token exactly
# Examples timed: on a CPU a token costs more once tensors exceed a MiB, which a smaller batch would hide.
MOST_PROBED = 16


@dataclass(frozen=True)
class EdgeData:
    """One edge's rows, tokenized and split, and their salted fingerprint."""

    train: TokenizedExamples
    validation: TokenizedExamples
    fingerprint: str

    @property
    def shortened(self) -> str:
        """What did not fit, in words; empty where everything did."""
        rows = len(self.train) + len(self.validation)
        cut, dropped = self.train.cut + self.validation.cut, self.train.dropped + self.validation.dropped
        said = [f"{cut} of {rows} prompts lost their start"] if cut else []
        said += [f"{dropped} rows are left out because their answer does not fit"] if dropped else []
        return ", ".join(said)


def profile_edge(
    edge_id: str, base: Base, shape: ModelShape, data: EdgeData, config: FederationConfig, bandwidth: float | None
) -> EdgeProfile:
    """Measure one edge. `bandwidth` is the measured link in bytes per second, None where resources are declared.

    Raises DataError when the edge has no training rows.
    """
    started = time.perf_counter()
    declared = next(edge.resources for edge in config.edges if edge.edge_id == edge_id)
    scores = _scores(edge_id, base, data, config)
    return EdgeProfile(
        edge_id=edge_id,
        num_examples=len(data.train),
        num_validation_examples=len(data.validation),
        tokens_per_example=tokens_per_example(data.train, max(config.planning.batch_sizes)),
        longest_example_tokens=longest_example_tokens(data.train),
        data_fingerprint=data.fingerprint,
        memory_bytes=round(declared.memory_gib * GIB) if declared else free_memory_bytes(device_of(base.model)),
        bandwidth_bytes_per_second=_bandwidth(edge_id, declared, bandwidth),
        step_cost=_step_cost(base, shape, data, config, declared),
        activation_cost=measured_activation_cost(
            base.model, *(probe_batch(data.train, size) for size in COUNTED_EXAMPLES)
        ),
        value_bytes=2 if base.bits == 16 else 4,
        scores=scores,
        declared=declared is not None,
        profile_seconds=time.perf_counter() - started,
    )


def _step_cost(
    base: Base, shape: ModelShape, data: EdgeData, config: FederationConfig, declared: ResourcesSpec | None
) -> StepCost:
    if declared is not None:
        return declared_step_cost(declared.tokens_per_second, declared.step_seconds, shape)
    small, large = (probe_batch(data.train, size) for size in probe_sizes(config.planning.batch_sizes))
    whole = METHODS[config.method].form == "whole"
    return measured_step_cost(base.model, small, large, config.model.bits, whole=whole)


def probe_sizes(batch_sizes: Sequence[int]) -> tuple[int, int]:
    """Examples of the two batches on which step time is measured, none larger than a plan's may be."""
    large = min(MOST_PROBED, max(batch_sizes))
    return max(1, large // 8), large


def _scores(edge_id: str, base: Base, data: EdgeData, config: FederationConfig) -> dict[str, list[float]]:
    if METHODS[config.method].sizes:  # nobody asks for them
        return {}
    spec = config.planning
    parts = (config.seed, "profile", edge_id)
    batches = training_batches(data.train, spec.profile_batch_size, spec.profile_steps, parts)
    return score_modules(base.model, batches, spec, config.seed)


def probe_batch(examples: TokenizedExamples, size: int) -> Batch:
    """The longest rows, again and again if they are few, so that every batch is as wide as the widest."""
    longest = sorted(range(len(examples)), key=lambda index: -len(examples.token_ids[index]))
    return pad_batch(examples, list(itertools.islice(itertools.cycle(longest), size)))


def _bandwidth(edge_id: str, declared: ResourcesSpec | None, measured: float | None) -> float:
    if declared is not None:
        return declared.bandwidth_mbit * 1e6 / 8
    if measured is None:
        raise RunError(f"{edge_id}: the link to the store was not measured; declare resources.bandwidth_mbit")
    return measured
