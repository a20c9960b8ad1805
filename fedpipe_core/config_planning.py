"""What the planner may choose from, and what of one edge's plan is fixed by hand."""

from typing import Literal

from pydantic import Field, field_validator

from fedpipe_core.config_base import Bits, Rank, Spec

ImportanceMethod = Literal["adalora", "gradient_spectrum", "uniform", "random", "last_layers"]


class PlanPin(Spec):
    """What the planner must keep for one edge; it plans around it."""

    ranks: dict[str, int] | None = Field(
        None, description="Rank of every adapted module, by module name; all others get none"
    )
    batch_size: int | None = Field(None, ge=1, le=65536, description="Examples per optimizer step")
    local_steps: int | None = Field(None, ge=1, le=1_000_000, description="Optimizer steps per round")
    base_bits: Bits | None = Field(None, description="Bit width of the base")


class PlanningSpec(Spec):
    """What the planner may choose from."""

    importance: ImportanceMethod = Field("gradient_spectrum", description="How modules are scored")
    profile_steps: int = Field(5, ge=2, le=1000, description="Training steps of the importance profile at each edge")
    profile_batch_size: int = Field(4, ge=1, le=1024, description="Examples per step of the importance profile")
    probe_rank: Rank = Field(8, description="Rank of the adapters that the profile trains on every module")
    ranks: tuple[Rank, ...] = Field((2, 4, 8, 16), min_length=1, description="Ranks the planner may give a module")
    batch_sizes: tuple[int, ...] = Field(
        (8, 16, 32), min_length=1, description="Batch sizes, in examples, the planner may choose"
    )
    round_seconds: float | None = Field(
        None,
        gt=0,
        description="Deadline of a round in seconds, shared by all edges; chosen by the planner when left out",
    )
    under_training_penalty: float = Field(
        3.0,
        ge=0,
        description="Weight of the share of a round's planned examples an edge cannot process before the deadline",
    )
    overtime: float = Field(
        1.0,
        ge=1,
        le=100,
        description="How many times its planned examples an edge may process while a slower one is still at its own; "
        "1 lets it wait",
    )
    parameter_price: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="What a share of the menu's adapter parameters must bring, as a share of the menu's importance, to "
        "be trained; 0 trains all that fits",
    )
    checkpointing: Literal["auto", "never"] = Field(
        "auto", description="`auto` lets the planner recompute activations on an edge whose memory is short"
    )
    unfit_edges: Literal["refuse", "drop"] = Field(
        "refuse",
        description="What becomes of an edge for which no plan fits: `refuse` ends the run and names it, `drop` goes "
        "on without it",
    )
    solver: Literal["milp", "greedy"] = Field("milp", description="`milp` refines the greedy plan with an exact solver")
    solver_seconds: float = Field(
        60.0, gt=0, le=86400, description="Time limit of `milp` over all edges; edges it does not reach stay greedy"
    )

    @field_validator("ranks", "batch_sizes")
    @classmethod
    def _ascending(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(set(values)))
