"""One edge's profile: what it has and what its data finds important, as numbers only.

Declared resources replace measured ones, so that a plan made of declarations is a function of config and seed alone.
"""

import time
from dataclasses import dataclass

from fedpipe_core.batches import (
    Batch,
    TokenizedExamples,
    longest_example_tokens,
    pad_batch,
    tokens_per_example,
    training_batches,
)
from fedpipe_core.config import FederationConfig, ResourcesSpec
from fedpipe_core.importance import score_modules
from fedpipe_core.model import Base, device_of
from fedpipe_core.resources import declared_step_cost, free_memory_bytes, measured_activation_cost, measured_step_cost
from fedpipe_core.schemas import EdgeProfile, ModelShape

GIB = 2**30
PROBE_SIZES = (2, 8)  # examples of the batches on which activations and step time are measured


@dataclass(frozen=True)
class EdgeData:
    """One edge's rows, tokenized and split, and their salted fingerprint."""

    train: TokenizedExamples
    validation: TokenizedExamples
    fingerprint: str


def profile_edge(
    edge_id: str, base: Base, shape: ModelShape, data: EdgeData, config: FederationConfig, bandwidth: float | None
) -> EdgeProfile:
    """Measure one edge. `bandwidth` is the measured link in bytes per second, None where resources are declared."""
    started = time.perf_counter()
    declared = next(edge.resources for edge in config.edges if edge.edge_id == edge_id)
    small, large = (_probe_batch(data.train, size) for size in PROBE_SIZES)
    scores = _scores(edge_id, base, data, config)
    return EdgeProfile(
        edge_id=edge_id,
        num_examples=len(data.train),
        num_validation_examples=len(data.validation),
        tokens_per_example=tokens_per_example(data.train, max(config.planning.batch_sizes)),
        longest_example_tokens=longest_example_tokens(data.train),
        data_fingerprint=data.fingerprint,
        memory_bytes=round(declared.memory_gib * GIB) if declared else free_memory_bytes(device_of(base.model)),
        bandwidth_bytes_per_second=_bandwidth(declared, bandwidth),
        step_cost=(
            declared_step_cost(declared.tokens_per_second, shape)
            if declared
            else measured_step_cost(base.model, small, large)
        ),
        activation_cost=measured_activation_cost(base.model, small, large),
        scores=scores,
        declared=declared is not None,
        profile_seconds=time.perf_counter() - started,
    )


def _scores(edge_id: str, base: Base, data: EdgeData, config: FederationConfig) -> dict[str, list[float]]:
    spec = config.planning
    parts = (config.seed, "profile", edge_id)
    batches = training_batches(data.train, spec.profile_batch_size, spec.profile_steps, parts)
    return score_modules(base.model, batches, spec, config.seed)


def _probe_batch(examples: TokenizedExamples, size: int) -> Batch:
    """The longest rows, so that both batches are as wide as the widest."""
    longest = sorted(range(len(examples)), key=lambda index: -len(examples.token_ids[index]))
    return pad_batch(examples, (longest * size)[:size] if len(longest) < size else longest[:size])


def _bandwidth(declared: ResourcesSpec | None, measured: float | None) -> float:
    if declared is not None:
        return declared.bandwidth_mbit * 1e6 / 8
    return measured or float("inf")
