"""An edge's profile of what a benchmark measured, where memory, link, rows and importance do not matter."""

from fedpipe_core.profile_schemas import ActivationCost, EdgeProfile, StepCost


def measured_profile(
    step_cost: StepCost, activation_cost: ActivationCost, examples: int, tokens: int, value_bytes: int
) -> EdgeProfile:
    """The profile of an edge with that many examples of that many tokens, on a base of `value_bytes` a value."""
    return EdgeProfile(
        edge_id="edge",
        num_examples=examples,
        num_validation_examples=0,
        tokens_per_example=tokens,
        data_fingerprint="random",
        memory_bytes=1,
        bandwidth_bytes_per_second=1.0,
        step_cost=step_cost,
        activation_cost=activation_cost,
        value_bytes=value_bytes,
        scores={},
        declared=False,
    )
