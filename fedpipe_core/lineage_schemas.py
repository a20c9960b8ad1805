"""What stands behind a released version, as records: its run's objects by hash, its lineage, and a verification of it.

Importing this module imports no torch. Nothing here holds a row, a token or a label of an edge's data.
"""

from pydantic import Field, NonNegativeInt, PositiveInt

from fedpipe_core.record import Record


class RunManifest(Record):
    """Every object that a released adapter came from, with its hash; the registered version carries the manifest's."""

    run: str
    objects: dict[str, str] = Field(description="sha256 of each object, by its key in the store")


class EdgeData(Record):
    """What is known of an edge's data outside the edge."""

    num_examples: PositiveInt
    num_validation_examples: NonNegativeInt
    data_fingerprint: str = Field(description="Salted hash of the rows")


class AcceptedUpdate(Record):
    """An update that counts in a round's aggregate."""

    sha256: str
    num_examples: PositiveInt = Field(description="Its weight")


class RefusedUpdate(Record):
    """An edge that does not count in a round's aggregate."""

    sha256: str | None = Field(description="None when no update was there")
    reason: str


class RoundLineage(Record):
    """One round: what it started from, whose updates counted, and what they came to."""

    round: PositiveInt
    start_sha256: str
    adapter_sha256: str
    accepted: dict[str, AcceptedUpdate]
    refused: dict[str, RefusedUpdate]


class Lineage(Record):
    """Where a registered version comes from."""

    model: str
    version: PositiveInt
    aliases: tuple[str, ...]
    run: str
    store: str
    code_version: str
    code_commit: str | None
    config_sha256: str
    config: dict[str, object]
    base: str
    base_sha256: str
    adapter_sha256: str
    manifest_sha256: str | None
    edges: dict[str, EdgeData]
    rounds: list[RoundLineage]


class Fault(Record):
    """One thing that is not what it was when the version was released."""

    subject: str = Field(description="Key of the object, or the round or version concerned")
    found: str = Field(description="What is wrong with it, in words")


class RoundVerification(Record):
    """A round's aggregate as recorded and as computed again; None when it could not be."""

    round: PositiveInt
    updates: NonNegativeInt = Field(description="Updates that count")
    recorded_sha256: str
    recomputed_sha256: str | None


class Verification(Record):
    """What verifying a registered version found; `verified` when nothing was at fault."""

    model: str
    version: PositiveInt
    run: str
    store: str
    adapter_sha256: str
    objects: NonNegativeInt = Field(description="Objects whose hash was compared")
    rounds: list[RoundVerification]
    faults: list[Fault]
    verified: bool
