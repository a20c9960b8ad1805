"""The federation's config: every field with its range, unit and effect.

How a config is read from a file, and how its faults are told, is `fedpipe_core.config_file`'s.
Importing this module imports no torch, so the command line answers at once.
"""

from typing import Any, Literal

from pydantic import Field, model_validator

from fedpipe_core.config_base import Bits, Name, Rank, Spec, WireDtype
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
from fedpipe_core.config_remote import PublicKey, RemoteSpec, SigningSpec

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

AggregationRule = Literal["delta_svd", "fedavg", "rankwise", "hetlora", "flexlora", "raflora", "ffa", "flora_stack"]
ExportName = Literal["adapter", "merged", "int8", "nf4", "nf4+adapter", "gguf-f16", "gguf-q8_0", "auto"]
Metric = Literal["accuracy", "macro_f1", "loss", "perplexity", "token_accuracy", GenerationMetric]


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


class TrainingSpec(Spec):
    """How every edge trains in a round."""

    learning_rate: float = Field(1e-3, gt=0, lt=1, description="Peak AdamW rate of the adapters")
    head_rate_factor: float = Field(
        10.0,
        gt=0,
        le=1000,
        description="The head's learning rate as a multiple of the adapters'; the head starts untrained",
    )
    rate_batch_size: int | None = Field(
        None,
        ge=1,
        description="Batch size, in examples, that the rates are for; an edge with batches of b examples trains at "
        "√(b / rate_batch_size) times them. The same rates at every batch size when left out",
    )
    weight_decay: float = Field(0.0, ge=0, lt=1, description="AdamW weight decay")
    warmup_steps: int = Field(4, ge=0, le=100000, description="Steps of linear warm-up at the start of every round")
    final_rate_fraction: float = Field(
        0.25, gt=0, le=1, description="Learning rate of the last round as a share of the first's; linear in between"
    )
    max_gradient_norm: float = Field(1.0, gt=0, description="Gradients are scaled down to this global norm")
    packing: bool = Field(
        False,
        description="Whether examples of a batch share rows of at most `model.max_tokens` tokens, where none sees "
        "another (for causal-lm); spares padding where the lengths in a batch differ",
    )
    learn_prompts: bool = Field(
        False,
        description="Whether training rows are learned whole, what is asked with what is answered (for causal-lm); "
        "metrics count the answers alone either way",
    )
    micro_batch_size: int | None = Field(
        None,
        ge=1,
        description="Most rows that go through the model at once; the gradients of a larger batch are summed over "
        "several passes. The whole batch at once when left out",
    )
    adapter_scaling: float = Field(1.0, gt=0, le=64, description="alpha / rank of every adapter")
    examples_per_round: int | None = Field(
        None, ge=1, description="Examples each edge should process in a round; its whole shard when left out"
    )


class AggregationSpec(Spec):
    """How the edges' updates become one adapter."""

    rule: AggregationRule = Field("delta_svd", description="Aggregation rule")
    weighting: Literal["trained", "all"] = Field(
        "trained", description="Weights by examples over the edges that trained a module, or over all participants"
    )
    center: Literal["mean", "trimmed_mean", "geometric_median"] = Field(
        "mean",
        description="`mean` weighs edges by examples; `trimmed_mean` leaves out the edges farthest from the geometric "
        "median of the changes; `geometric_median` weighs them down by their distance from it",
    )
    trim_share: float = Field(0.2, ge=0, lt=0.5, description="Share of the edges left out by `center: trimmed_mean`")
    server_step: float = Field(1.0, gt=0, le=10, description="Factor on the averaged change")
    server_momentum: float = Field(0.0, ge=0, lt=1, description="Share of the last round's change that is added again")
    rank_cap: Rank = Field(32, description="Largest rank of the global adapter")
    energy: float = Field(
        0.999, gt=0, le=1, description="Share of the squared singular values the global adapter keeps"
    )
    outliers: Literal["reject", "clip", "accept"] = Field(
        "reject",
        description="What happens to an update whose norm is far above the other edges'. Unless it is `accept`, one "
        "that opposes the others counts only where the loss on the coordinator's held-out rows is lower with it",
    )
    outlier_factor: float = Field(
        5.0, gt=1, description="An update is an outlier when its norm exceeds this many times the edges' median"
    )


class ExchangeSpec(Spec):
    """How adapters travel."""

    dtype: WireDtype = Field(
        "bf16",
        description="Number format of updates; int8 and nf4 are blockwise, and what they leave out is kept at the edge "
        "and added to its next update",
    )
    global_dtype: WireDtype | None = Field(
        None,
        description="Number format of the global adapter. When left out that of updates, but int8 where these are nf4: "
        "nobody keeps what nf4 leaves out of it, and every round builds on that",
    )
    energy: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of an update's squared singular values that is sent; below 1 only the leading directions of "
        "the change travel (for rules that combine products: delta_svd, flexlora, flora_stack)",
    )

    @property
    def dtype_of_global(self) -> WireDtype:
        """Number format of the global adapter.

        A product's error is about 1 % a round in int8, which training takes back, and 13 % in nf4.
        """
        return self.global_dtype or ("int8" if self.dtype == "nf4" else self.dtype)


class ReleaseSpec(Spec):
    """What becomes of the tuned model."""

    model_name: str | None = Field(None, description="Registered model's name; the federation's name when left out")
    exports: tuple[ExportName, ...] = Field(
        ("adapter", "merged"),
        description="Formats written, of which `registered` names one; int8 and nf4 are the merged model quantized, "
        "`nf4+adapter` is the quantized base with the adapter beside it, `gguf-f16` and `gguf-q8_0` are for llama.cpp "
        "(causal-lm), `auto` adds for every edge the best that its memory holds",
    )
    registered: Literal["merged", "adapter"] = Field(
        "merged",
        description="Export that becomes the registered version: `merged`, which is whole and is served anywhere, or "
        "`adapter`, which is small and names its base by id and hash; the base has to be where it is served",
    )
    dtype: Literal["fp32", "fp16", "bf16"] = Field("fp32", description="Number format of the merged model")
    metric: Metric | None = Field(
        None,
        description="Held-out metric that decides promotion; accuracy of a classifier and loss of a causal language "
        "model when left out",
    )
    min_improvement: float = Field(0.0, ge=0, description="Smallest gain over the champion that promotes")
    confidence: float = Field(
        0.95,
        ge=0,
        lt=1,
        description="Level of the gain's paired bootstrap interval, which must lie above 0; 0 leaves that check out",
    )
    slice_column: str | None = Field(
        None,
        description="Column of the test file whose values are slices (a domain, an edge) the gate checks one by one",
    )
    max_slice_regression: float = Field(
        0.05,
        ge=0,
        le=1,
        description="Largest fall of accuracy, or of token accuracy, on any slice; small slices need a larger one",
    )
    max_loss_increase: float = Field(
        0.05, ge=0, description="Largest relative rise of an export's loss over the unquantized merged model's"
    )

    @model_validator(mode="after")
    def _what_is_registered_is_written(self) -> "ReleaseSpec":
        if self.registered not in self.exports:
            raise ValueError(f"exports lacks `{self.registered}`, the form that is registered; add it")
        return self


class TrackingSpec(Spec):
    """Where MLflow records the run."""

    uri: str | None = Field(
        None, description="MLflow tracking URI; MLFLOW_TRACKING_URI or a SQLite file beside the store when left out"
    )
    experiment: str | None = Field(None, description="MLflow experiment; the federation's name when left out")


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
