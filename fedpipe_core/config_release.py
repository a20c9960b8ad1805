"""What becomes of the tuned model, and where runs are recorded."""

from typing import Literal

from pydantic import Field, model_validator

from fedpipe_core.config_base import Spec
from fedpipe_core.config_inputs import GenerationMetric

ExportName = Literal["adapter", "merged", "int8", "nf4", "nf4+adapter", "gguf-f16", "gguf-q8_0", "auto"]
Metric = Literal["accuracy", "macro_f1", "loss", "perplexity", "token_accuracy", GenerationMetric]


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
