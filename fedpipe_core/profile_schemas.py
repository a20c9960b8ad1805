"""A model's shape, and what an edge measured of it and of itself. Importing this module imports no torch."""

from typing import Literal

from pydantic import Field, FiniteFloat, NonNegativeInt, PositiveInt

from fedpipe_core.record import Record


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
