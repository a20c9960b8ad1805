"""Rows for a causal language model: who says what, and which turns are to be learned.

Decides what a row of each data format means; leaves reading files to `fedpipe_core.data` and tokens to
`fedpipe_core.tokenizing`.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from fedpipe_core.config_inputs import DataSpec
from fedpipe_core.row_faults import string_fault, text_fault
from fedpipe_core.rows import Places, places_at

Role = Literal["system", "user", "assistant"]
Values = Mapping[str, Any]
ROLES = ("system", "user", "assistant")

# The forms of Stanford Alpaca, on which most instruction data sets are trained (github.com/tatsu-lab/stanford_alpaca).
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


class Turn(NamedTuple):
    """What one side says; an assistant's turn is what the model learns to write."""

    role: Role
    content: str


@dataclass(frozen=True)
class Dialogues:
    """Dialogues that end with an assistant's turn, every right text for that turn, and where each row lies.

    `templated` ones are rendered by the tokenizer's chat template, others are their turns one behind the other. Shared
    between readers: not to be changed in place.
    """

    turns: list[tuple[Turn, ...]]
    references: list[tuple[str, ...]]
    templated: bool = False
    places: Places = field(default=(), compare=False)

    def __len__(self) -> int:
        return len(self.turns)

    def select(self, indices: Iterable[int]) -> "Dialogues":
        """The rows at `indices`, in that order."""
        chosen = list(indices)
        turns, references = [self.turns[i] for i in chosen], [self.references[i] for i in chosen]
        return Dialogues(turns, references, self.templated, places_at(self.places, chosen))

    @property
    def strata(self) -> Sequence[int]:
        """One group for all: dialogues carry no label."""
        return [0] * len(self)

    def row_keys(self) -> list[str]:
        """Each row as one text that no other row shares."""
        return [json.dumps([turns, references]) for turns, references in zip(self.turns, self.references, strict=True)]


class DialogueFormat(NamedTuple):
    """One data format: the columns a row needs, what may be wrong with them, and the dialogue they hold."""

    columns: Callable[[DataSpec], list[str]]
    fault: Callable[[Values, DataSpec], str | None]
    turns: Callable[[Values, DataSpec], tuple[Turn, ...]]


def dialogue_fault(values: Values, spec: DataSpec) -> str | None:
    """Why a row cannot be used, or None when it can."""
    return DIALOGUE_FORMATS[spec.format].fault(values, spec) or _references_fault(values, spec)


def collect_dialogues(rows: Sequence[Values], spec: DataSpec, places: Places = ()) -> Dialogues:
    """The dialogues of rows without fault."""
    turns = [DIALOGUE_FORMATS[spec.format].turns(values, spec) for values in rows]
    references = [_references(values, said, spec) for values, said in zip(rows, turns, strict=True)]
    return Dialogues(turns, references, spec.format == "messages", places)


def _completion_columns(spec: DataSpec) -> list[str]:
    return [spec.prompt_column, spec.completion_column]


def _completion_fault(values: Values, spec: DataSpec) -> str | None:
    return text_fault(values, spec.prompt_column) or text_fault(values, spec.completion_column)


def _completion_turns(values: Values, spec: DataSpec) -> tuple[Turn, ...]:
    prompt = Turn("user", values[spec.prompt_column] + spec.separator)
    return prompt, Turn("assistant", values[spec.completion_column])


def _references_fault(values: Values, spec: DataSpec) -> str | None:
    column = spec.references_column
    if column is None or column not in values:  # training files need none
        return None
    references = values[column]
    if not isinstance(references, list) or not references:
        return f"{column!r} is {type(references).__name__}, needed a list of at least one string"
    return next((fault for text in references if (fault := string_fault(text, f"an entry of {column!r}"))), None)


def _references(values: Values, turns: tuple[Turn, ...], spec: DataSpec) -> tuple[str, ...]:
    return tuple(values.get(spec.references_column or "") or (turns[-1].content,))


def _messages_columns(spec: DataSpec) -> list[str]:
    return [spec.messages_column]


def _messages_fault(values: Values, spec: DataSpec) -> str | None:
    name, messages = spec.messages_column, values[spec.messages_column]
    if not isinstance(messages, list):
        return f"{name!r} is {type(messages).__name__}, needed a list of messages"
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            return f"message {number} of {name!r} has no role of {', '.join(ROLES)}"
        if fault := string_fault(message.get("content"), f"the content of message {number} of {name!r}"):
            return fault
    if not any(message["role"] == "assistant" for message in messages):
        return f"{name!r} has no message of the assistant, so there is nothing to learn"
    return None


def _messages_turns(values: Values, spec: DataSpec) -> tuple[Turn, ...]:
    """All up to the assistant's last message; what a user said after it is never answered."""
    turns = [Turn(message["role"], message["content"]) for message in values[spec.messages_column]]
    last = max(index for index, turn in enumerate(turns) if turn.role == "assistant")
    return tuple(turns[: last + 1])


def _instruction_columns(spec: DataSpec) -> list[str]:
    return [spec.instruction_column, spec.output_column]


def _instruction_fault(values: Values, spec: DataSpec) -> str | None:
    given = values.get(spec.input_column) or ""
    wrong = None if isinstance(given, str) and not given.strip() else string_fault(given, repr(spec.input_column))
    return text_fault(values, spec.instruction_column) or text_fault(values, spec.output_column) or wrong


def _instruction_turns(values: Values, spec: DataSpec) -> tuple[Turn, ...]:
    given = (values.get(spec.input_column) or "").strip()
    form = ALPACA_WITH_INPUT if given else ALPACA
    prompt = form.format(instruction=values[spec.instruction_column], input=given)
    return Turn("user", prompt), Turn("assistant", values[spec.output_column])


def _text_columns(spec: DataSpec) -> list[str]:
    return [spec.text_column]


def _text_fault(values: Values, spec: DataSpec) -> str | None:
    return text_fault(values, spec.text_column)


def _text_turns(values: Values, spec: DataSpec) -> tuple[Turn, ...]:
    return (Turn("assistant", values[spec.text_column]),)


def chat_template(spec: DataSpec) -> str | None:
    """The Jinja template that renders a dialogue as training did, for the released tokenizer; None to keep its own."""
    if spec.format == "completion":
        before, behind = "", spec.separator
    elif spec.format == "instruction":
        before, behind = ALPACA.split("{instruction}")
    else:
        return None
    user = "{{ " + json.dumps(before) + " }}{{ message['content'] }}{{ " + json.dumps(behind) + " }}"
    said = "{% if message['role'] == 'user' %}" + user + "{% else %}{{ message['content'] }}{{ eos_token }}{% endif %}"
    return "{{ bos_token }}{% for message in messages %}" + said + "{% endfor %}"


DIALOGUE_FORMATS: dict[str, DialogueFormat] = {
    "completion": DialogueFormat(_completion_columns, _completion_fault, _completion_turns),
    "messages": DialogueFormat(_messages_columns, _messages_fault, _messages_turns),
    "instruction": DialogueFormat(_instruction_columns, _instruction_fault, _instruction_turns),
    "text": DialogueFormat(_text_columns, _text_fault, _text_turns),
}
