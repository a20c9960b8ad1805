"""What edges find a global adapter worth on rows of their own, as records: numbers and counts, never a row.

Importing this module imports no torch.
"""

from pydantic import Field, FiniteFloat, PositiveInt

from fedpipe_core.record import Record


class EdgeEvaluation(Record):
    """A global adapter's worth on one edge's own rows, beside the base that this edge holds."""

    rows: PositiveInt = Field(description="Rows judged")
    rows_sha256: str = Field(description="Salted hash of these rows: tells whether they changed, not what they are")
    metrics: dict[str, FiniteFloat]
    counted: dict[str, PositiveInt] = Field(
        description="What each metric is a mean over, its weight: rows, learned tokens or continued prompts"
    )


class EvaluationRecord(Record):
    """What one edge answered to one global adapter."""

    run: str
    round: PositiveInt = Field(description="The round that starts from the adapter; one more than there are at last")
    edge_id: str
    base_sha256: str
    global_sha256: str
    evaluation: EdgeEvaluation
    seconds: FiniteFloat = Field(ge=0, description="From reading the global adapter to the last answer")


class JudgedRecord(Record):
    """Closes the judging of one global adapter at the edges; whoever answers later does not count."""

    run: str
    round: PositiveInt
    global_sha256: str
    evaluations: dict[str, EdgeEvaluation]
    dropped: dict[str, str] = Field(description="Edges whose rows did not count, with the reason")
    metrics: dict[str, FiniteFloat] = Field(description="The edges' values combined, each weighted by what it counts")
