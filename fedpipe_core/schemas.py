"""What crosses a process: frozen records, written as JSON beside the safetensors they describe.

Importing this module imports no torch. Every record refuses unknown keys, so a reader of another version fails loudly.
"""

from typing import Literal

from pydantic import Field, FiniteFloat, NonNegativeInt, PositiveInt

from fedpipe_core.config import Bits
from fedpipe_core.evaluation_schemas import EdgeEvaluation
from fedpipe_core.record import Record

BESIDE = "edges_"  # begins the names of the edges' metrics where the coordinator's stand beside them


class DataReference(Record):
    """The object a record vouches for."""

    key: str = Field(description="Key of the object, relative to the store")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size_bytes: NonNegativeInt


class ModuleShape(Record):
    """One weight matrix that can carry an adapter: y = x·Wᵀ, W is (out_features, in_features)."""

    out_features: PositiveInt
    in_features: PositiveInt
    layer: NonNegativeInt = Field(0, description="Index of the block it lies in, counted from the input")
    inner_values: PositiveInt = Field(1, description="Values per rank and token that its adapter keeps for backward")

    @property
    def features(self) -> int:
        """Parameters of an adapter per rank: B is (out, r) and A is (r, in)."""
        return self.out_features + self.in_features


class ModelShape(Record):
    """What the cost model needs to know of a base model; the same on every edge."""

    modules: dict[str, ModuleShape] = Field(description="Modules that can carry an adapter, in the model's order")
    matrices: dict[str, ModuleShape] = Field(
        default_factory=dict,
        description="The base's matrices, where something else carries adapters; `modules` if empty",
    )
    linear_parameters: NonNegativeInt = Field(description="Parameters inside quantizable matrices")
    other_parameters: NonNegativeInt = Field(description="Frozen parameters kept dense: embeddings, norms, biases")
    head_parameters: NonNegativeInt = Field(description="Parameters trained in full: the task's head")
    output_features: NonNegativeInt = Field(description="Logits per position that is scored: labels or vocabulary")
    scored_positions: Literal["example", "token"] = Field(description="Whether logits exist per example or per token")
    hidden_features: NonNegativeInt = Field(
        0, description="Width of a block's input, which gradient checkpointing keeps; 0 when blocks cannot checkpoint"
    )

    @property
    def num_blocks(self) -> int:
        """Blocks that hold adaptable modules, counted from the input."""
        return 1 + max((module.layer for module in self.modules.values()), default=0)


class StepCost(Record):
    """Seconds of one optimizer step: fixed + tokens·(per_token + Σ (per_token_feature + per_token_rank·rank)·(out+in)).

    The sum is over the adapters. Coefficients hold for gradients that flow to the first block, without checkpointing,
    on a dense base.
    """

    fixed_seconds: FiniteFloat = Field(ge=0)
    per_token_seconds: FiniteFloat = Field(gt=0)
    per_token_feature_seconds: FiniteFloat = Field(0.0, ge=0, description="What an adapter takes whatever its rank")
    per_token_rank_seconds: FiniteFloat = Field(ge=0)
    forward_share: FiniteFloat = Field(
        0.5, gt=0, lt=1, description="Of `per_token_seconds` in the forward pass; the rest goes back through the blocks"
    )
    per_parameter_seconds: FiniteFloat = Field(
        0.0, ge=0, description="Optimizer and clipping per parameter, where all are trained; adapters' are in `fixed`"
    )
    dequantization_seconds: dict[int, FiniteFloat] = Field(
        default_factory=dict,
        description="What a base of that many bits adds to every step, whatever its tokens; nothing when left out",
    )


class ActivationCost(Record):
    """Bytes autograd keeps for the backward pass: fixed + tokens·(per_token + Σ over adapted modules)."""

    fixed_bytes: NonNegativeInt
    per_token_bytes: FiniteFloat = Field(
        ge=0, description="Without any adapter, with gradients flowing to the first block"
    )
    per_token_module_bytes: dict[str, float] = Field(
        description="Extra when this module carries an adapter, before its rank"
    )


class EdgeProfile(Record):
    """What one edge measured (or was declared to have). Only numbers: no row, token or label name leaves it."""

    edge_id: str
    num_examples: PositiveInt = Field(description="Training rows")
    num_validation_examples: NonNegativeInt
    tokens_per_example: FiniteFloat = Field(gt=0, description="Mean padded length of an example in a batch")
    longest_example_tokens: PositiveInt | None = Field(
        None, description="Padded length of the longest batch, which sets the peak memory; the mean when left out"
    )
    data_fingerprint: str = Field(description="Salted hash of the rows; tells whether data changed, not what it is")
    memory_bytes: PositiveInt
    bandwidth_bytes_per_second: FiniteFloat = Field(gt=0)
    step_cost: StepCost
    activation_cost: ActivationCost
    value_bytes: Literal[2, 4] = Field(
        4, description="Bytes of an activation, and of a weight that stays dense beside a quantized base"
    )
    fixed_bytes: NonNegativeInt = Field(0, description="Memory in use before the base is loaded, charged to the budget")
    scores: dict[str, list[float]] = Field(
        description="Per module the importance of each further rank, falling; all scores of an edge sum to 1"
    )
    declared: bool = Field(description="Whether the resources were declared in the config rather than measured")
    profile_seconds: FiniteFloat = Field(0.0, ge=0)


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


class Latency(Record):
    """Seconds an example takes beside the base model's, timed in turns in one process so that noise is shared."""

    seconds: FiniteFloat = Field(gt=0, description="Median per example")
    base_seconds: FiniteFloat = Field(gt=0, description="Median of the dense base model per example")
    ratio: FiniteFloat = Field(gt=0, description="Median of the pairs' ratios; 1 adds no latency")
    ratio_low: FiniteFloat = Field(gt=0, description="Lower end of the median's 95 % interval")
    ratio_high: FiniteFloat = Field(gt=0, description="Upper end of the median's 95 % interval")
    pairs: PositiveInt


class LeaseRecord(Record):
    """A sign of life of a coordinator or an edge; the one kind of record that is written over, again and again."""

    owner: str = Field(description="Id of the process that holds the lease: an edge's is its flow run's")
    beat: NonNegativeInt = Field(description="Counts up, so that every sign of life differs from the last")
    ended: Literal["done", "left", "failed", "orphaned"] | None = Field(
        None, description="How the holder ended; nothing while it lives"
    )
    reason: str = Field("", description="Why it ended, in words")


class ExportRecord(Record):
    """One written form of the released model, and what was found after reloading it in a fresh process."""

    scheme: str
    path: str = Field(description="Folder in the store")
    bytes: NonNegativeInt
    sha256: str = Field(description="Hash over the names and hashes of the folder's files")
    metrics: dict[str, FiniteFloat] = Field(description="On the held-out set, after reloading what was written")
    seconds: FiniteFloat = Field(ge=0, description="To write, reload, judge and store it")
    loss_increase: FiniteFloat | None = Field(
        None, description="Relative rise of its loss over the unquantized model's"
    )
    agreement: FiniteFloat | None = Field(
        None, ge=0, le=1, description="Share of held-out answers (a language model's next tokens) that are the same"
    )
    load_seconds: FiniteFloat = Field(0.0, ge=0)
    latency: Latency | None = None
    edges: list[str] = Field(default_factory=list, description="Edges whose memory `auto` chose it for")
    kept: bool = Field(True, description="False when it was neither registered nor logged")
    reason: str = Field("", description="The verdict on its loss, in words")


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


class MeasuredCost(Record):
    """What a plan really cost, in the worst of its rounds."""

    peak_memory_bytes: NonNegativeInt
    round_seconds: FiniteFloat = Field(ge=0)
    upload_bytes: NonNegativeInt
    download_bytes: NonNegativeInt


class PlanReport(Record):
    """An edge's plan beside what it cost; `measured` is None when no update of that edge came in."""

    ranks: dict[str, PositiveInt]
    batch_size: PositiveInt
    local_steps: PositiveInt
    base_bits: Bits
    binding: str
    predicted: PredictedCost
    measured: MeasuredCost | None


class CheckReport(Record):
    """One measured number against one threshold; without a threshold the number is only recorded."""

    name: str
    value: float
    threshold: float | None
    passed: bool
    reason: str


class DecisionReport(Record):
    """Whether the gate promoted the version, and why."""

    promoted: bool
    reasons: list[str]
    checks: list[CheckReport] = Field(default_factory=list)


class ModelReport(Record):
    """The registered version; `alias` is the one it was given."""

    name: str
    version: PositiveInt
    alias: str
    decision: DecisionReport


class TrackingReport(Record):
    """Where MLflow keeps the run."""

    uri: str
    experiment: str
    run_id: str


class ReleaseReport(Record):
    """What a release wrote and registered."""

    exports: list[ExportRecord]
    model: ModelReport
    baseline_metrics: dict[str, FiniteFloat] = Field(default_factory=dict)


class RunResult(Record):
    """What `fedpipe run --json` prints and `result.json` holds."""

    run: str
    store: str
    status: Literal["completed"]
    seconds: FiniteFloat = Field(ge=0, description="Of the command that finished the run")
    adapter_sha256: str
    rounds: list[RoundRecord]
    plan: dict[str, PlanReport]
    metrics: dict[str, FiniteFloat]
    baseline_metrics: dict[str, FiniteFloat]
    exports: list[ExportRecord]
    model: ModelReport | None = Field(description="None when nothing was released")
    tracking: TrackingReport


class SavedPlan(Record):
    """A plan with the profiles it rests on, kept in a file for a later run."""

    plan: FederationPlan
    profiles: dict[str, EdgeProfile]
