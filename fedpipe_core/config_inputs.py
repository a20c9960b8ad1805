"""The config's sections on what is tuned, on which data, and how the result is judged.

Importing this module imports no torch.
"""

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from fedpipe_core.config_base import Bits, Spec

Task = Literal["sequence-classification", "causal-lm"]
DataFormat = Literal["label", "completion", "messages", "instruction", "text"]
GenerationMetric = Literal["bleu", "chrf", "rouge1", "rouge2", "rougeL", "exact_match"]


class ModelSpec(Spec):
    """Which base model is tuned, and how it may be held in memory."""

    base: str = Field(
        description="Base model: a local folder in Hugging Face format, `package:NAME` for weights "
        "inside an installed Python package, or a hub id"
    )
    task: Task = Field(
        "sequence-classification",
        description="What the model is tuned to do: give a text one of `data.labels` labels, or go on writing",
    )
    max_tokens: int = Field(
        64,
        ge=4,
        le=131072,
        description="Longest example in tokens; a longer text is cut there, of a longer completion row the start of "
        "the prompt is left out, and a row whose completion does not fit is not used",
    )
    bits: tuple[Bits, ...] = Field(
        (32, 8, 4),
        min_length=1,
        description="Bit widths the planner may choose for an edge's base: 32 or 16 (dense), 8 (int8), 4 (NF4)",
    )
    trust_remote_code: bool = Field(False, description="Run Python code that ships inside the base model's folder")


class PartitionSpec(Spec):
    """How one data file is dealt to simulated edges; real edges each name their own file instead."""

    by: Literal["iid", "column", "dirichlet"] = Field(
        description="`iid` deals rows at random, `column` gives each edge its own values of a column, "
        "`dirichlet` draws the shares of each label, or of each value of `column`, from Dirichlet(alpha)"
    )
    column: str | None = Field(
        None,
        description="Column that decides the edge (for `by: column`), or takes the label's place (`by: dirichlet`)",
    )
    alpha: float = Field(0.5, gt=0, description="Dirichlet concentration; smaller is more skewed (for `by: dirichlet`)")

    @model_validator(mode="after")
    def _column_is_named(self) -> "PartitionSpec":
        if self.by == "column" and self.column is None:
            raise ValueError("`by: column` needs `column`, the name of the column that decides the edge")
        return self


class DataSpec(Spec):
    """Where examples are and what their columns mean. Paths are relative to the config file, full for a worker."""

    train: str = Field(
        "",
        description="Training rows (.jsonl, .csv or .parquet, .gz too); `{edge_id}` in the path is replaced, "
        "so each edge reads its own file. Left out when every edge names a `work_pool`",
    )
    test: str = Field(
        "",
        description="Held-out rows at the coordinator, on which every round is judged. Left out where there are none: "
        "then the edges judge",
    )
    format: DataFormat = Field(
        "label",
        description="What a row is: `label`, a text with its label (for sequence-classification); for causal-lm "
        "`completion`, a prompt and what shall follow it, `messages`, a conversation that the tokenizer's chat "
        "template renders, `instruction`, an instruction with an input or none and its output, rendered as Alpaca "
        "does, or `text`, learned as a whole",
    )
    text_column: str = Field("text", description="Column with the text (for `format: label` and `text`)")
    label_column: str = Field(
        "label", description="Column with the label: an integer from 0 to labels - 1 (for `format: label`)"
    )
    label_name_column: str | None = Field(
        None, description="Column of the test file with the label's name, kept in the released model"
    )
    labels: int | None = Field(None, ge=2, le=1_000_000, description="Number of labels; needed for `format: label`")
    prompt_column: str = Field("prompt", description="Column with the prompt (for `format: completion`)")
    completion_column: str = Field(
        "completion", description="Column with what shall follow the prompt (for `format: completion`)"
    )
    separator: str = Field(
        "\n", description="Text between prompt and completion; part of the prompt (for `format: completion`)"
    )
    messages_column: str = Field(
        "messages",
        description="Column with a list of {role, content}, role being system, user or assistant; what the assistant "
        "says is learned (for `format: messages`)",
    )
    instruction_column: str = Field("instruction", description="Column with the task (for `format: instruction`)")
    input_column: str = Field(
        "input", description="Column with what the task is about; may be missing or empty (for `format: instruction`)"
    )
    output_column: str = Field("output", description="Column with the answer (for `format: instruction`)")
    on_bad_row: Literal["fail", "skip"] = Field(
        "fail", description="Whether a row that cannot be used ends the run, or is left out and counted in the log"
    )
    references_column: str | None = Field(
        None,
        description="Column of the test file with a list of all right answers, by which generated text is judged; "
        "the row's own completion when left out",
    )
    validation: str = Field(
        "",
        description="Rows on which an edge judges rounds; `{edge_id}` in the path is replaced. A share of its training "
        "rows when left out",
    )
    validation_fraction: float = Field(
        0.1,
        ge=0,
        lt=0.9,
        description="Share of an edge's rows kept out of training, on which that edge judges rounds, unless it names a "
        "file of rows for it",
    )
    partition: PartitionSpec | None = Field(
        None, description="How `train` is dealt to simulated edges; leave out when each edge has its own file"
    )


class GenerationSpec(Spec):
    """How text that a causal language model writes is judged: greedy, so the same for the same model."""

    metrics: tuple[GenerationMetric, ...] = Field(
        ("bleu", "chrf"),
        min_length=1,
        description="bleu and chrf by sacrebleu (0 to 100); rouge and exact_match 0 to 1",
    )
    max_new_tokens: int = Field(64, ge=1, le=32768, description="Most tokens written for a prompt")
    examples: int | None = Field(
        None,
        ge=1,
        description="Held-out prompts that are continued, at the coordinator or at each edge, drawn once by seed; all "
        "when left out",
    )
    batch_size: int = Field(32, ge=1, le=65536, description="Prompts continued at once")
    answer_pattern: str | None = Field(
        None,
        description="Regular expression for exact_match: answers are compared by its first group, or its whole match, "
        "at its last place in the text; whole texts are compared when left out",
    )

    @field_validator("answer_pattern")
    @classmethod
    def _is_a_pattern(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        return pattern


class EvaluationSpec(Spec):
    """Where and how rounds are judged."""

    at: Literal["coordinator", "edges", "both"] | None = Field(
        None,
        description="Whose rows judge: `data.test` at the coordinator, each edge's own validation rows, whose values "
        "the coordinator combines, or both side by side; the coordinator's when left out, the edges' without data.test",
    )
    batch_size: int = Field(64, ge=1, le=65536, description="Examples per evaluation batch")
    examples_per_round: int | None = Field(
        None,
        ge=1,
        description="Held-out examples judged after every round but the last, at the coordinator or at each edge, "
        "drawn once by seed; all when left out. The model before training and the final one are always judged on all",
    )
    generate: GenerationSpec | None = Field(
        None,
        description="Text written before training and by the final model, and how it is judged (for causal-lm); "
        "nothing is written when left out",
    )
