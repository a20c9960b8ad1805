"""How edges train in a round, how their updates become one adapter, and how adapters travel."""

from typing import Literal

from pydantic import Field

from fedpipe_core.config_base import Rank, Spec, WireDtype

AggregationRule = Literal["delta_svd", "fedavg", "rankwise", "hetlora", "flexlora", "raflora", "ffa", "flora_stack"]


class TrainingSpec(Spec):
    """How every edge trains in a round."""

    learning_rate: float = Field(1e-3, gt=0, lt=1, description="Peak AdamW rate of the adapters")
    head_rate_factor: float = Field(
        10.0,
        gt=0,
        le=1000,
        description="The head's learning rate as a multiple of the adapters'; the head starts untrained",
    )
    rate_steps: int | None = Field(
        None,
        ge=1,
        description="Steps of a round that the rates are for; an edge that makes s of them trains at √(rate_steps / s) "
        "times the rates, twice them at most, and so moves about as far. The same rates for all when left out",
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
        "trained",
        description="Weights by examples over the edges that `trained` a module, or over `all`, where one that did not "
        "train it votes for leaving it as it is: slower, and steadier where edges hold labels of their own",
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
