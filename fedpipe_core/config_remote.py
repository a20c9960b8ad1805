"""The config's sections for edges on machines of their own: how long they are waited for, and who signs what."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from fedpipe_core.config_base import Spec

PublicKey = Annotated[str, Field(pattern=r"^ed25519:[A-Za-z0-9+/]{43}=$")]


class SigningSpec(Spec):
    """Whether records are signed, so that others who can write to the store cannot pass for an edge."""

    mode: Literal["required", "off"] | None = Field(
        None,
        description="`required` refuses every record without its signer's signature, `off` trusts everyone who can "
        "write to the store; has to be said when an edge names a `work_pool`",
    )

    @field_validator("mode", mode="before")
    @classmethod
    def _off_is_a_word(cls, mode: object) -> object:
        return "off" if mode is False else mode  # YAML reads a bare `off` as false

    coordinator_key: PublicKey | None = Field(
        None,
        description="Public key of the coordinator, which signs config, plans and adapters with the private one in the "
        "file that FEDPIPE_SIGNING_KEY names",
    )


class RemoteSpec(Spec):
    """How long is waited for edges on machines of their own. May differ when a run is resumed."""

    start_seconds: float = Field(
        300,
        gt=0,
        le=86400,
        description="How long a worker may take to come for an edge, and then the edge to show life",
    )
    profile_seconds: float = Field(3600, gt=0, le=604800, description="How long all edges' profiles are waited for")
    grace_seconds: float = Field(
        300, ge=0, le=604800, description="How much longer than its plan says a round may last; later edges are dropped"
    )
    lease_seconds: float = Field(
        20, ge=1, le=3600, description="Silence after which an edge, or for an edge the coordinator, is taken for dead"
    )
    poll_seconds: float = Field(0.5, gt=0, le=60, description="Longest pause between two looks at the store")
    restarts: int = Field(3, ge=0, le=1000, description="How often a run starts an edge that died again")
