"""A conversation as the tokenizer's own chat template writes it, what the assistant says apart from the rest.

Few templates mark what the assistant says, so it is found by rendering every prefix: what an assistant's turn adds to
the text that asks for it is what the model has to write.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedpipe_core.dialogues import Turn
from fedpipe_core.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def templated_pieces(turns: Sequence[Turn], tokenizer: "PreTrainedTokenizerBase") -> list[tuple[str, bool]]:
    """The rendered conversation in pieces, and whether each is learned: the assistant's words with what ends them.

    Raises ModelError without a chat template, or when it writes earlier turns anew as a conversation goes on; DataError
    when it refuses the order of the turns.
    """
    if tokenizer.chat_template is None:
        raise ModelError(
            f"tokenizer {tokenizer.name_or_path!r} has no chat template, needed for data.format messages; "
            "choose the base's chat variant, or give prompts and completions"
        )
    pieces: list[tuple[str, bool]] = []
    written = ""
    for index, turn in enumerate(turns):
        if turn.role == "assistant":
            asked, answered = _render(turns[:index], tokenizer, True), _render(turns[: index + 1], tokenizer, False)
            if not (asked.startswith(written) and answered.startswith(asked)):
                raise ModelError(
                    f"the chat template of tokenizer {tokenizer.name_or_path!r} writes earlier turns anew when an "
                    "answer follows, so what is learned cannot be told apart; give conversations of one answer, or "
                    "prompts and completions"
                )
            pieces += [(asked[len(written) :], False), (answered[len(asked) :], True)]
            written = answered
    return pieces


def _render(turns: Sequence[Turn], tokenizer: "PreTrainedTokenizerBase", asks: bool) -> str:
    from jinja2 import TemplateError

    messages = [turn._asdict() for turn in turns]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks))
    except TemplateError as error:
        roles = ", ".join(turn.role for turn in turns)
        raise DataError(
            f"the chat template of tokenizer {tokenizer.name_or_path!r} refuses turns of {roles} ({error}); "
            "correct the order of messages"
        ) from None
