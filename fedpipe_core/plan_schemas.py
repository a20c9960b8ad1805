"""What each edge is asked to do, and what that is predicted to cost. Importing this module imports no torch."""

from pydantic import Field, FiniteFloat, NonNegativeInt, PositiveInt

from fedpipe_core.config import Bits
from fedpipe_core.profile_schemas import EdgeProfile
from fedpipe_core.record import Record


class PredictedCost(Record):
    """What the cost model expects of a plan."""

    peak_memory_bytes: NonNegativeInt
    round_seconds: FiniteFloat = Field(ge=0)
    upload_bytes: NonNegativeInt
    download_bytes: NonNegativeInt


class TrialRole(Record):
    """What an edge tries in a round for all others, beside what they had so far."""

    candidate: str = Field(description="same, deeper or wider")
    relative_seconds: FiniteFloat = Field(gt=0, description="Its round's predicted seconds over those of `same`")


class EdgePlan(Record):
    """What one edge does in every round."""

    edge_id: str
    ranks: dict[str, PositiveInt] = Field(
        description="Rank of every adapted module, or width of a bottleneck; a module not named gets no adapter"
    )
    batch_size: PositiveInt
    local_steps: PositiveInt
    base_bits: Bits
    checkpointing: bool = Field(False, description="Recompute each block's activations in the backward pass")
    predicted: PredictedCost
    binding: str = Field(description="What keeps the plan from being larger: memory, deadline, data, menu or pin")
    under_training: FiniteFloat = Field(0.0, ge=0, le=1, description="Share of the planned examples left unprocessed")
    trial: TrialRole | None = Field(None, description="The edge's part in a trial of other sizes, if there is one")


class FederationPlan(Record):
    """Every edge's plan and the deadline they share."""

    round_seconds: FiniteFloat = Field(gt=0)
    solver: str = Field(description="How the plan was found; names a fall-back")
    edges: dict[str, EdgePlan]
    profiles: dict[str, str] = Field(default_factory=dict, description="sha256 of each profile the plan rests on")
    dropped: dict[str, str] = Field(default_factory=dict, description="Edges for which no plan fits, with the reason")

    @property
    def planned_modules(self) -> list[str]:
        """Modules that any edge trains, sorted: those the global adapter has."""
        return sorted({name for plan in self.edges.values() for name in plan.ranks})

    @property
    def largest_rank(self) -> int:
        """Largest rank any edge trains; 0 where none trains adapters."""
        return max((rank for plan in self.edges.values() for rank in plan.ranks.values()), default=0)


class SavedPlan(Record):
    """A plan with the profiles it rests on, kept in a file for a later run."""

    plan: FederationPlan
    profiles: dict[str, EdgeProfile]
