"""Rows for a causal language model: who says what, and which turns are to be learned.

Decides what a row of each data format means; leaves reading files to `fedpipe_core.data` and tokens to
`fedpipe_core.tokenizing`.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from fedpipe_core.config_inputs import DataSpec
from fedpipe_core.row_faults import string_fault, text_fault

Role = Literal["system", "user", "assistant"]
Values = Mapping[str, Any]


class Turn(NamedTuple):
    """What one side says; an assistant's turn is what the model learns to write."""

    role: Role
    content: str


@dataclass(frozen=True)
class Dialogues:
    """Dialogues that end with an assistant's turn, and every right text for that turn.

    Shared between readers: not to be changed in place.
    """

    turns: list[tuple[Turn, ...]]
    references: list[tuple[str, ...]]

    def __len__(self) -> int:
        return len(self.turns)

    def select(self, indices: Iterable[int]) -> "Dialogues":
        """The rows at `indices`, in that order."""
        chosen = list(indices)
        return Dialogues([self.turns[i] for i in chosen], [self.references[i] for i in chosen])

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


def collect_dialogues(rows: Sequence[Values], spec: DataSpec) -> Dialogues:
    """The dialogues of rows without fault."""
    turns = [DIALOGUE_FORMATS[spec.format].turns(values, spec) for values in rows]
    return Dialogues(turns, [_references(values, said, spec) for values, said in zip(rows, turns, strict=True)])


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


def chat_template(spec: DataSpec) -> str | None:
    """The Jinja template that renders a dialogue as training did, for the released tokenizer; None to keep its own."""
    if spec.format != "completion":
        return None
    behind = (
        "{% if message['role'] == 'user' %}{{ " + json.dumps(spec.separator) + " }}{% else %}{{ eos_token }}{% endif %}"
    )
    return "{{ bos_token }}{% for message in messages %}{{ message['content'] }}" + behind + "{% endfor %}"


DIALOGUE_FORMATS: dict[str, DialogueFormat] = {
    "completion": DialogueFormat(_completion_columns, _completion_fault, _completion_turns),
}
