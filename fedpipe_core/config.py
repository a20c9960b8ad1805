"""The federation's config: every field with its range, unit and effect.

How a config is read from a file, and how its faults are told, is `fedpipe_core.config_file`'s.
Importing this module imports no torch, so the command line answers at once.
"""

from typing import Any

from pydantic import Field, model_validator

from fedpipe_core.config_base import Bits, Name, Rank, Spec
from fedpipe_core.config_faults import config_faults
from fedpipe_core.config_inputs import (
    DataSpec,
    EvaluationSpec,
    GenerationMetric,
    GenerationSpec,
    ModelSpec,
    PartitionSpec,
)
from fedpipe_core.config_methods import FedAdapterSpec, Method, with_method_defaults
from fedpipe_core.config_planning import PlanningSpec, PlanPin
from fedpipe_core.config_release import Metric, ReleaseSpec, TrackingSpec
from fedpipe_core.config_remote import PublicKey, RemoteSpec, SigningSpec
from fedpipe_core.config_training import AggregationSpec, ExchangeSpec, TrainingSpec

__all__ = [
    "AggregationSpec",
    "Bits",
    "DataSpec",
    "EdgeSpec",
    "EvaluationSpec",
    "ExchangeSpec",
    "FedAdapterSpec",
    "FederationConfig",
    "GenerationMetric",
    "GenerationSpec",
    "Metric",
    "ModelSpec",
    "Name",
    "PartitionSpec",
    "PlanPin",
    "PlanningSpec",
    "PublicKey",
    "Rank",
    "ReleaseSpec",
    "RemoteSpec",
    "ResourcesSpec",
    "SigningSpec",
    "Spec",
    "TrackingSpec",
    "TrainingSpec",
]


class ResourcesSpec(Spec):
    """What an edge is declared to have; a declared value stands in for a measurement."""

    memory_gib: float = Field(gt=0, le=1e5, description="Memory the edge may use for training, in GiB")
    tokens_per_second: float = Field(
        gt=0, le=1e9, description="Training speed on the dense base without adapters, in tokens per second"
    )
    step_seconds: float = Field(
        0.05,
        ge=0,
        le=60,
        description="What an optimizer step costs beside its tokens (launches, optimizer), in seconds",
    )
    bandwidth_mbit: float = Field(gt=0, le=1e6, description="Link to the store, in Mbit per second each way")


class EdgeSpec(Spec):
    """One edge server."""

    edge_id: Name = Field(description="Name of the edge: lower-case letters, digits, dot, dash, underscore")
    values: tuple[str | int, ...] | None = Field(
        None, description="Values of the partition column whose rows this edge holds (for `partition.by: column`)"
    )
    resources: ResourcesSpec | None = Field(
        None, description="Declared resources; leave out to measure them at the edge"
    )
    pin: PlanPin = Field(PlanPin(), description="Parts of this edge's plan that are fixed by hand")
    work_pool: str | None = Field(
        None,
        min_length=1,
        description="Prefect work pool of the edge's own machine, whose `edge.yaml` names the rows; "
        "the edge is served in the coordinator's process when left out",
    )
    work_queue: str | None = Field(
        None, min_length=1, description="Queue of the pool at which the edge's worker looks; the edge_id when left out"
    )
    public_key: PublicKey | None = Field(
        None, description="Key with which this edge signs its records, as `fedpipe edge keygen` prints it"
    )


class FederationConfig(Spec):
    """One federation: a model, its data, its edges, and how they are trained, aggregated and released."""

    name: Name = Field(description="Name of the federation; runs, experiment and model are named after it")
    method: Method = Field(
        "fedpipe",
        description="`fedpipe` plans every edge by its resources and importance. The others are baselines, one plan "
        "for all edges, the largest that the weakest can hold: `fedlora` is one rank on all attention projections, "
        "`full` trains and averages every parameter, `fedadapter` puts bottlenecks into the last blocks, which side "
        "trials grow",
    )
    fedadapter: FedAdapterSpec = FedAdapterSpec()
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of everything random")
    rounds: int = Field(3, ge=1, le=10000, description="Rounds of training and aggregation")
    min_edges: int = Field(1, ge=1, description="Fewest updates that make a round count")
    store: str = Field(".fedpipe/store", description="Object store: a local folder or s3://bucket/prefix")
    concurrency: int | None = Field(
        None,
        ge=1,
        le=256,
        description="Edges trained at once in local mode, one thread each; the number of cores when left out",
    )
    model: ModelSpec
    data: DataSpec
    evaluation: EvaluationSpec = EvaluationSpec()
    edges: tuple[EdgeSpec, ...] = Field(min_length=1, max_length=10000, description="The edge servers")
    training: TrainingSpec = TrainingSpec()
    planning: PlanningSpec = PlanningSpec()
    aggregation: AggregationSpec = AggregationSpec()
    exchange: ExchangeSpec = ExchangeSpec()
    release: ReleaseSpec = ReleaseSpec()
    tracking: TrackingSpec = TrackingSpec()
    remote: RemoteSpec = RemoteSpec()
    signing: SigningSpec = SigningSpec()

    @property
    def local_edges(self) -> tuple[EdgeSpec, ...]:
        """Edges served in the coordinator's process."""
        return tuple(edge for edge in self.edges if edge.work_pool is None)

    @property
    def remote_edges(self) -> tuple[EdgeSpec, ...]:
        """Edges on machines of their own."""
        return tuple(edge for edge in self.edges if edge.work_pool is not None)

    @property
    def coordinator_judges(self) -> bool:
        """Whether the coordinator has rows to judge on."""
        return bool(self.data.test)

    @property
    def edges_judge(self) -> bool:
        """Whether every global adapter is judged at the edges, on their own rows."""
        return self.evaluation.at in ("edges", "both") or not self.data.test

    def judges_whole(self, round_index: int) -> bool:
        """Whether what a round starts from is judged on all rows: what training starts from, and what it ends with."""
        return round_index in (1, self.rounds + 1)

    @property
    def coordinator_signs(self) -> str | None:
        """The key that signs the coordinator's records; None when nobody signs."""
        return self.signing.coordinator_key if self.signing.mode == "required" else None

    def edge_signs(self, edge_id: str) -> str | None:
        """The key that signs an edge's records: its own, or the coordinator's where it is served in that process."""
        own = next((edge.public_key for edge in self.remote_edges if edge.edge_id == edge_id), self.coordinator_signs)
        return own if self.signing.mode == "required" else None

    @model_validator(mode="before")
    @classmethod
    def _filled_in_by_the_method(cls, document: Any) -> Any:
        return with_method_defaults(document)

    @model_validator(mode="after")
    def _edges_fit_together(self) -> "FederationConfig":
        faults = config_faults(self)
        if faults:
            raise ValueError("; ".join(faults))
        return self
