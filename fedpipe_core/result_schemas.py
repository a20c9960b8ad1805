"""What a run came to, as told to people and programs. Importing this module imports no torch."""

from typing import Literal

from pydantic import Field, FiniteFloat, NonNegativeInt, PositiveInt

from fedpipe_core.config import Bits
from fedpipe_core.plan_schemas import PredictedCost
from fedpipe_core.record import Record
from fedpipe_core.schemas import RoundRecord


class Latency(Record):
    """Seconds an example takes beside the base model's, timed in turns in one process so that noise is shared."""

    seconds: FiniteFloat = Field(gt=0, description="Median per example")
    base_seconds: FiniteFloat = Field(gt=0, description="Median of the dense base model per example")
    ratio: FiniteFloat = Field(gt=0, description="Median of the pairs' ratios; 1 adds no latency")
    ratio_low: FiniteFloat = Field(gt=0, description="Lower end of the median's 95 % interval")
    ratio_high: FiniteFloat = Field(gt=0, description="Upper end of the median's 95 % interval")
    pairs: PositiveInt


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
