"""Methods by name: what a config may say of one, and what it leaves to be filled in.

What a method trains and how it is planned is `methods`'.
"""

from typing import Any, Literal

from pydantic import Field

from fedpipe_core.config_base import Rank, Spec

Method = Literal["fedpipe", "fedlora", "full", "fedadapter"]

# What a method sets where the config says nothing of it.
DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "full": {"release": {"exports": ("merged",)}},
    "fedadapter": {"aggregation": {"rule": "rankwise"}},
}
NEEDS_PEFT = ("adapter", "nf4+adapter")  # exports that hold low-rank factors


class FedAdapterSpec(Spec):
    """Where `method: fedadapter` starts, and how far it may grow."""

    depth: int = Field(1, ge=1, le=1000, description="Blocks with bottlenecks at first, counted from the last")
    width: Rank = Field(8, description="Width of every bottleneck at first")
    depth_step: int = Field(1, ge=1, le=1000, description="Blocks by which a trial goes deeper")
    width_step: Rank = Field(8, description="By how much a trial goes wider")
    largest_width: Rank = Field(64, description="Width beyond which no trial goes")
    trial_rounds: int = Field(1, ge=1, le=10000, description="A trial takes place in every so many rounds")


def with_method_defaults(document: Any) -> Any:
    """The config with what its method sets; what the config says itself stays."""
    found = DEFAULTS.get(document.get("method", "")) if isinstance(document, dict) else None
    if not found:
        return document
    filled = dict(document)
    for section, values in found.items():
        given = filled.get(section) or {}
        if isinstance(given, Spec):  # a section made before: only what was said counts
            given = given.model_dump(exclude_unset=True)
        filled[section] = {**values, **given} if isinstance(given, dict) else given
    return filled


def method_faults(config: Any) -> list[str]:
    """What does not go together with the method."""
    method, aggregation = config.method, config.aggregation
    faults = []
    if method == "fedadapter" and aggregation.rule != "rankwise":
        faults.append(
            f"method fedadapter averages bottlenecks component by component, which aggregation.rule "
            f"{aggregation.rule} does not; set it to rankwise or leave it out"
        )
    if method == "fedadapter" and not config.data.validation_fraction:
        faults.append(
            "method fedadapter judges its trials on the edges' validation rows; raise data.validation_fraction"
        )
    if method == "full" and (aggregation.server_step != 1.0 or aggregation.server_momentum):
        faults.append("aggregation.server_step and server_momentum act on adapters, of which method full has none")
    needless = [name for name in config.release.exports if name in NEEDS_PEFT]
    if method == "full" and needless:
        faults.append(f"release.exports names {needless[0]}, but method full trains no adapter; take it out")
    return faults
