"""One edge's profile: what it has and what its data finds important, as numbers only.

Declared resources replace measured ones, so that a plan made of declarations is a function of config and seed alone.
"""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from fedpipe_core.activation_cost import measured_activation_cost
from fedpipe_core.batches import Batch, longest_example_tokens, pad_batch, tokens_per_example, training_batches
from fedpipe_core.config import FederationConfig, ResourcesSpec
from fedpipe_core.costs import CostModel, Work
from fedpipe_core.importance import score_modules
from fedpipe_core.methods import METHODS
from fedpipe_core.model import Base
from fedpipe_core.profile_schemas import EdgeProfile, ModelShape, StepCost
from fedpipe_core.step_cost import TIMED_RANKS, declared_step_cost, measured_step_cost
from fedpipe_core.tokenizing import TokenizedExamples

GIB = 2**30
COUNTED_EXAMPLES = (1, 4)  # in the two batches whose kept bytes are counted, which grow by the token exactly
# Examples timed. On a CPU an adapter costs more per token once the tensors of a pass exceed 2 MiB (`allocator`), which
# fewer would hide: with 16, steps of 32 were predicted up to a quarter too short.
MOST_PROBED = 32


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


@dataclass(frozen=True)
class Limits:
    """What an edge may use, measured or declared: memory for training, base included, and its link to the store."""

    memory_bytes: int
    bandwidth_bytes_per_second: float


def declared_limits(resources: ResourcesSpec) -> Limits:
    """The limits that the config declares."""
    return Limits(round(resources.memory_gib * GIB), resources.bandwidth_mbit * 1e6 / 8)


def profile_edge(
    edge_id: str, base: Base, shape: ModelShape, data: EdgeData, config: FederationConfig, limits: Limits
) -> EdgeProfile:
    """Measure one edge on a base of any width, in batches that its memory holds.

    Raises DataError when the edge has no training rows.
    """
    started = time.perf_counter()
    declared = next(edge.resources for edge in config.edges if edge.edge_id == edge_id)
    sketch = _sketch(edge_id, base, shape, data, config, limits)
    return sketch.model_copy(
        update={
            "scores": _scores(base, shape, data, config, sketch),
            "step_cost": sketch.step_cost if declared else _step_cost(base, shape, data, config, sketch),
            "profile_seconds": time.perf_counter() - started,
        }
    )


def _sketch(
    edge_id: str, base: Base, shape: ModelShape, data: EdgeData, config: FederationConfig, limits: Limits
) -> EdgeProfile:
    """The profile before anything is trained: enough to tell which batch fits. An undeclared step time is made up."""
    declared = next(edge.resources for edge in config.edges if edge.edge_id == edge_id)
    per_second, step_seconds = (declared.tokens_per_second, declared.step_seconds) if declared else (1.0, 0.0)
    return EdgeProfile(
        edge_id=edge_id,
        num_examples=len(data.train),
        num_validation_examples=len(data.validation),
        tokens_per_example=tokens_per_example(data.train, max(config.planning.batch_sizes)),
        longest_example_tokens=longest_example_tokens(data.train),
        data_fingerprint=data.fingerprint,
        memory_bytes=limits.memory_bytes,
        bandwidth_bytes_per_second=limits.bandwidth_bytes_per_second,
        step_cost=declared_step_cost(per_second, step_seconds, shape),
        activation_cost=measured_activation_cost(
            base.model, *(probe_batch(data.train, size) for size in COUNTED_EXAMPLES)
        ),
        value_bytes=value_bytes(base.model),
        scores={},
        declared=declared is not None,
    )


def value_bytes(model: nn.Module) -> Literal[2, 4]:
    """Bytes of an activation: those of the weights that are never quantized."""
    return 2 if next(model.parameters()).element_size() == 2 else 4


def most_examples(sketch: EdgeProfile, shape: ModelShape, bits: int, rank: int, wanted: int) -> int:
    """Examples of the largest batch, halved from `wanted`, whose step with every module adapted fits; at least one."""
    costs, ranks = CostModel(shape, sketch), dict.fromkeys(shape.modules, rank)
    while wanted > 1 and costs.peak_memory_bytes(Work(ranks, wanted, 1, bits), 0) > sketch.memory_bytes:
        wanted //= 2
    return wanted


def _step_cost(
    base: Base, shape: ModelShape, data: EdgeData, config: FederationConfig, sketch: EdgeProfile
) -> StepCost:
    sizes = probe_sizes(config.planning.batch_sizes)
    most = most_examples(sketch, shape, base.bits, max(TIMED_RANKS), max(sizes))
    small, large = (probe_batch(data.train, min(size, most)) for size in sizes)
    whole = METHODS[config.method].form == "whole"
    return measured_step_cost(base.model, small, large, config.model.bits, whole=whole)


def probe_sizes(batch_sizes: Sequence[int]) -> tuple[int, int]:
    """Examples of the two batches on which step time is measured, none larger than a plan's may be."""
    large = min(MOST_PROBED, max(batch_sizes))
    return max(1, large // 8), large


def _scores(
    base: Base, shape: ModelShape, data: EdgeData, config: FederationConfig, sketch: EdgeProfile
) -> dict[str, list[float]]:
    if METHODS[config.method].sizes:  # nobody asks for them
        return {}
    spec = config.planning
    parts = (config.seed, "profile", sketch.edge_id)
    size = most_examples(sketch, shape, base.bits, spec.probe_rank, spec.profile_batch_size)
    batches = training_batches(data.train, size, spec.profile_steps, parts)
    return score_modules(base.model, batches, spec, config.seed)


def probe_batch(examples: TokenizedExamples, size: int) -> Batch:
    """The longest rows, again and again if they are few, so that every batch is as wide as the widest."""
    longest = sorted(range(len(examples)), key=lambda index: -len(examples.token_ids[index]))
    return pad_batch(examples, list(itertools.islice(itertools.cycle(longest), size)))
