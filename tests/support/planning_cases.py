"""Models, profiles and configs for the planner's tests, made by hand."""

import numpy as np

from fedpipe_core.config import FederationConfig
from fedpipe_core.profile_schemas import ActivationCost, EdgeProfile, ModelShape, ModuleShape, StepCost

GIB = 2**30


def small_encoder() -> ModelShape:
    """Six blocks of six matrices, 384 wide: a MiniLM."""
    sizes = {"query": (384, 384), "key": (384, 384), "value": (384, 384), "out": (384, 384), "up": (1536, 384)}
    return _shape({**sizes, "down": (384, 1536)}, blocks=6, other_parameters=12_000_000, labels=150)


def large_decoder() -> ModelShape:
    """Thirty-two blocks of four matrices, 4096 wide: the attention of a Llama."""
    shape = _shape(dict.fromkeys("qkvo", (4096, 4096)), blocks=32, other_parameters=262_000_000, labels=2)
    return shape.model_copy(update={"linear_parameters": 6_500_000_000})


def tiny_model(blocks: int = 2, checkpointing: bool = False) -> ModelShape:
    """A model small enough to enumerate every plan."""
    shape = _shape({"in": (16, 8), "out": (8, 16)}, blocks=blocks, other_parameters=100, labels=3)
    return shape if checkpointing else shape.model_copy(update={"hidden_features": 0})


def _shape(sizes: dict[str, tuple[int, int]], blocks: int, other_parameters: int, labels: int) -> ModelShape:
    modules = {
        f"layer.{block}.{name}": ModuleShape(out_features=out, in_features=into, layer=block)
        for block in range(blocks)
        for name, (out, into) in sizes.items()
    }
    hidden = next(iter(sizes.values()))[1]
    return ModelShape(
        modules=modules,
        linear_parameters=sum(m.out_features * m.in_features for m in modules.values()),
        other_parameters=other_parameters,
        head_parameters=(hidden + 1) * labels,
        output_features=labels,
        scored_positions="example",
        hidden_features=hidden,
    )


def make_profile(shape: ModelShape, edge_id: str = "edge-00", *, seed: int = 0, **changes: object) -> EdgeProfile:
    """A plausible profile: 5,000 tokens per second, 1 GiB, 100 Mbit, 500 examples, log-normal importance."""
    weights = sum(m.out_features * m.in_features for m in shape.modules.values())
    values = {
        "edge_id": edge_id,
        "num_examples": 500,
        "num_validation_examples": 50,
        "tokens_per_example": 16.0,
        "longest_example_tokens": 24,
        "data_fingerprint": "fingerprint",
        "memory_bytes": GIB,
        "bandwidth_bytes_per_second": 12.5e6,
        "step_cost": step_cost(weights, tokens_per_second=5000.0),
        "activation_cost": ActivationCost(
            fixed_bytes=1000,
            per_token_bytes=shape.num_blocks * 70.0 * max(shape.hidden_features, 8),
            per_token_module_bytes={name: 4.0 * m.in_features for name, m in shape.modules.items()},
        ),
        "scores": random_scores(shape, seed),
        "declared": True,
    }
    return EdgeProfile.model_validate(values | changes)


def step_cost(weights: int, tokens_per_second: float) -> StepCost:
    """A step whose adapters cost per weight what a trained weight costs beside a frozen one."""
    per_token = 1.0 / tokens_per_second
    return StepCost(fixed_seconds=0.01, per_token_seconds=per_token, per_token_rank_seconds=1.5 * per_token / weights)


def throttled(profile: EdgeProfile, factor: float) -> EdgeProfile:
    """The same edge, computing `factor` times slower."""
    cost = profile.step_cost
    slower = StepCost(
        fixed_seconds=cost.fixed_seconds * factor,
        per_token_seconds=cost.per_token_seconds * factor,
        per_token_rank_seconds=cost.per_token_rank_seconds * factor,
    )
    return profile.model_copy(update={"step_cost": slower})


def random_scores(shape: ModelShape, seed: int) -> dict[str, list[float]]:
    """Log-normal importance over modules, falling by 0.7 from rank to rank; all sum to 1."""
    importance = np.random.default_rng(seed).lognormal(0.0, 1.0, len(shape.modules))
    table = importance[:, None] * 0.7 ** np.arange(8)
    table /= table.sum()
    return {name: [float(score) for score in row] for name, row in zip(shape.modules, table, strict=True)}


def make_config(edge_ids: list[str], **sections: object) -> FederationConfig:
    """A config of these edges; sections replace the defaults, a pin is given as `pins={edge_id: {...}}`."""
    pins = sections.pop("pins", {})
    edges = [{"edge_id": edge_id, "pin": pins.get(edge_id, {})} for edge_id in edge_ids]  # type: ignore[attr-defined]
    document = {
        "name": "test",
        "model": {"base": "somewhere"},
        "data": {"train": "{edge_id}.csv", "test": "test.csv", "labels": 3},
        "edges": edges,
    }
    return FederationConfig.model_validate(document | sections)
