"""What crosses a process: frozen records, written as JSON beside the safetensors they describe.

Importing this module imports no torch. Every record refuses unknown keys, so a reader of another version fails loudly.
"""

from typing import Literal

from pydantic import Field, FiniteFloat, NonNegativeInt, PositiveInt

from fedpipe_core.evaluation_schemas import EdgeEvaluation
from fedpipe_core.record import Record

BESIDE = "edges_"  # begins the names of the edges' metrics where the coordinator's stand beside them


class DataReference(Record):
    """The object a record vouches for."""

    key: str = Field(description="Key of the object, relative to the store")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size_bytes: NonNegativeInt


class FederationRecord(Record):
    """What a run is: written first, compared on `--resume`."""

    run: str
    config: dict[str, object]
    config_sha256: str
    seed: int
    code_version: str
    code_commit: str | None
    base_sha256: str


class GlobalRecord(Record):
    """The adapter a round starts from, and the updates it was made of."""

    run: str
    round: PositiveInt
    base_sha256: str
    adapter: DataReference
    counted: dict[str, str] = Field(default_factory=dict, description="sha256 of each update that made this adapter")
    refused: dict[str, str] = Field(default_factory=dict, description="sha256 of each update that did not count")
    dropped: dict[str, str] = Field(default_factory=dict, description="Edges that did not count, with the reason")
    opposed: tuple[str, ...] = Field((), description="Edges refused for their direction, until they agree again")
    pardoned: tuple[str, ...] = Field(
        (), description="Edges that count though they oppose the others, since held-out rows are better met with them"
    )
    ranks: dict[str, int] = Field(description="Rank per module")


class UpdateRecord(Record):
    """What one edge returned from one round."""

    run: str
    round: PositiveInt
    edge_id: str
    base_sha256: str
    global_sha256: str = Field(description="The global adapter the edge started from")
    adapter: DataReference
    num_examples: PositiveInt = Field(description="Weight in the average: the edge's training rows")
    examples_processed: NonNegativeInt
    steps: NonNegativeInt
    train_loss: FiniteFloat
    train_seconds: FiniteFloat = Field(ge=0)
    round_seconds: FiniteFloat = Field(ge=0, description="From reading the global adapter to the update's upload")
    transfer_seconds: FiniteFloat = Field(0.0, ge=0, description="Of which reading the adapter and writing the update")
    started_at: FiniteFloat | None = Field(None, description="When the edge began, by its clock, in seconds since 1970")
    peak_memory_bytes: NonNegativeInt = Field(0, description="Weights, optimizer state and kept activations, measured")
    download_bytes: NonNegativeInt
    metrics: dict[str, FiniteFloat] = Field(
        default_factory=dict, description="The global adapter the round started from, on this edge's validation rows"
    )
    trained_metrics: dict[str, FiniteFloat] = Field(
        default_factory=dict, description="What the edge made of it, on the same rows; measured in trials alone"
    )


class FailureRecord(Record):
    """Why one edge returned no update from one round."""

    run: str
    round: PositiveInt
    edge_id: str
    reason: str


class LeaseRecord(Record):
    """A sign of life of a coordinator or an edge; the one kind of record that is written over, again and again."""

    owner: str = Field(description="Id of the process that holds the lease: an edge's is its flow run's")
    beat: NonNegativeInt = Field(description="Counts up, so that every sign of life differs from the last")
    ended: Literal["done", "left", "failed", "orphaned"] | None = Field(
        None, description="How the holder ended; nothing while it lives"
    )
    reason: str = Field("", description="Why it ended, in words")


class RoundRecord(Record):
    """Closes a round."""

    round: PositiveInt
    participants: list[str]
    dropped: dict[str, str]
    seconds: FiniteFloat
    train_seconds: dict[str, FiniteFloat]
    simulated_seconds: dict[str, FiniteFloat] = Field(
        default_factory=dict, description="The cost model's seconds for edges whose resources are declared"
    )
    upload_bytes: NonNegativeInt
    download_bytes: NonNegativeInt
    train_loss: dict[str, FiniteFloat] = Field(default_factory=dict)
    edge_metrics: dict[str, dict[str, FiniteFloat]] = Field(
        default_factory=dict, description="What the round started from, on the rows of each edge that trained"
    )
    metrics: dict[str, FiniteFloat] = Field(
        description="What the round led to: on the coordinator's rows, or else on the edges' together; where both "
        "judge, the edges' beside it under names that begin with `edges_`"
    )
    evaluations: dict[str, EdgeEvaluation] = Field(
        default_factory=dict, description="What the round led to, on each edge's own rows, where the edges judge"
    )
    not_judged: dict[str, str] = Field(
        default_factory=dict, description="Edges asked to judge whose rows did not count, with the reason"
    )
    adapter_sha256: str
    records: dict[str, str] = Field(
        default_factory=dict, description="sha256 of every record the round rests on, by its key"
    )

    @property
    def judges(self) -> str:
        """On whose rows `metrics` rests, in words."""
        beside = any(name.startswith(BESIDE) for name in self.metrics)
        return "edges' rows" if self.evaluations and not beside else "held-out set"
