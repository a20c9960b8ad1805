"""Turns examples into token ids, and says which tokens are learned.

Decides what stands before, between and behind the texts, and what happens to a row that is too long; leaves the order
and padding of rows to `fedpipe_core.batches`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING

from fedpipe_core.chat import templated_pieces
from fedpipe_core.data import Examples
from fedpipe_core.dialogues import Dialogues
from fedpipe_core.errors import DataError, ModelError
from fedpipe_core.rows import Places, place_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # label of a token that is not learned, as torch and transformers have it
_tokenizing = Lock()

Parts = list[tuple[list[int], bool]]  # token ids, and whether they are learned


@dataclass(frozen=True)
class TokenizedExamples:
    """The token ids of every example, unpadded, with its label and the id that pads a batch.

    The label is one integer, or for a language model one per token: its id where it is learned, else `IGNORED`.
    `cut` counts rows that lost the start of their prompt, and texts that lost their end; `dropped` rows that are left
    out because their answer did not fit.
    """

    token_ids: list[list[int]]
    labels: list[int] | list[list[int]]
    pad_token_id: int
    cut: int = 0
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def per_token(self) -> bool:
        """Whether labels stand at tokens, as for a language model."""
        return bool(self.labels) and not isinstance(self.labels[0], int)

    def select(self, indices: Iterable[int]) -> "TokenizedExamples":
        """The rows at `indices`, in that order."""
        chosen = list(indices)
        labels = [self.labels[i] for i in chosen]
        return TokenizedExamples([self.token_ids[i] for i in chosen], labels, self.pad_token_id)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Prompts:
    """What a model continues, as token ids, and every right answer to each."""

    token_ids: list[list[int]]
    references: list[tuple[str, ...]]

    def __len__(self) -> int:
        return len(self.token_ids)


def tokenize(
    examples: Examples | Dialogues,
    tokenizer: "PreTrainedTokenizerBase",
    max_tokens: int,
    vocabulary: int | None = None,
    learn_prompts: bool = False,
) -> TokenizedExamples:
    """Token ids of every row, at most `max_tokens`.

    A text is cut there. Of a dialogue the start of the prompt is left out, never a part of the answer. A row whose
    answer does not fit is left out, and so is any longer conversation. `vocabulary` is how many tokens the model knows;
    with `learn_prompts` all tokens of a dialogue are learned, not the answers' alone.

    Raises ModelError if the tokenizer has no padding token, DataError if a text gives no token at all, if no row is
    left, or if an id lies outside the vocabulary.
    """
    if tokenizer.pad_token_id is None:
        raise ModelError(
            f"tokenizer {tokenizer.name_or_path!r} has no padding token, needed to batch texts of different lengths; "
            "set `pad_token` in the base model's tokenizer_config.json"
        )
    if not isinstance(examples, Dialogues):
        token_ids = _text_ids(examples, tokenizer, max_tokens)
        _require_known(token_ids, examples.places, tokenizer, vocabulary)
        return TokenizedExamples(token_ids, examples.labels, tokenizer.pad_token_id)
    rendered = _rendered(examples, tokenizer)
    _require_known((_ids(parts) for parts in rendered), examples.places, tokenizer, vocabulary)
    return _tokenize_dialogues(examples, rendered, tokenizer, max_tokens, learn_prompts)


def tokenize_prompts(dialogues: Dialogues, tokenizer: "PreTrainedTokenizerBase", max_tokens: int) -> Prompts:
    """All before each dialogue's last answer, as token ids; of more than `max_tokens` the start is left out."""
    starts = [_ids(parts[:-1]) for parts in _rendered(dialogues, tokenizer)]
    leading = _leading(tokenizer)
    kept = [
        ids if len(ids) <= max_tokens else [*leading, *ids[len(leading) + len(ids) - max_tokens :]] for ids in starts
    ]
    return Prompts(kept, dialogues.references)


def _text_ids(examples: Examples, tokenizer: "PreTrainedTokenizerBase", max_tokens: int) -> list[list[int]]:
    token_ids: list[list[int]] = []
    if examples.texts:
        with _tokenizing:  # the length is state of the shared tokenizer: another thread's call would change it midway
            token_ids = tokenizer(
                examples.texts,
                truncation=True,
                max_length=max_tokens,
                return_attention_mask=False,
                return_token_type_ids=False,
            )["input_ids"]
    empty = [index for index, ids in enumerate(token_ids) if not ids]
    if empty:
        raise DataError(
            f"{len(empty)} of {len(token_ids)} texts give no token, the first of them "
            f"{place_of(empty[0], examples.places)}; remove texts without any character the tokenizer knows"
        )
    return token_ids


def _tokenize_dialogues(
    dialogues: Dialogues,
    rendered: Sequence[Parts],
    tokenizer: "PreTrainedTokenizerBase",
    max_tokens: int,
    learn_prompts: bool,
) -> TokenizedExamples:
    leading = None if dialogues.templated else len(_leading(tokenizer))
    rows = [_shortened(parts, max_tokens, leading) for parts in rendered]
    kept = [(parts, was_cut) for parts, was_cut in rows if parts]
    if rows and not kept:
        raise DataError(
            f"none of {len(rows)} rows fits into model.max_tokens (now {max_tokens}) with its whole answer; raise it"
        )
    return TokenizedExamples(
        token_ids=[_ids(parts) for parts, _ in kept],
        labels=[
            [token if learned or learn_prompts else IGNORED for ids, learned in parts for token in ids]
            for parts, _ in kept
        ],
        pad_token_id=tokenizer.pad_token_id,
        cut=sum(was_cut for _, was_cut in kept),
        dropped=len(rows) - len(kept),
    )


def _rendered(dialogues: Dialogues, tokenizer: "PreTrainedTokenizerBase") -> list[Parts]:
    """Each dialogue as its turns' ids, what is learned apart from what is not."""
    if dialogues.templated:
        pieces = [templated_pieces(turns, tokenizer) for turns in dialogues.turns]
        leading, ending = [], []
    else:  # the model's first token before the turns, its last behind every answer
        pieces = [[(turn.content, turn.role == "assistant") for turn in turns] for turns in dialogues.turns]
        leading = _leading(tokenizer)
        ending = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    found = iter(_plain_ids([text for row in pieces for text, _ in row], tokenizer))
    return [
        [(leading, False), *(([*next(found), *(ending if learned else [])], learned) for _, learned in row)]
        for row in pieces
    ]


def _plain_ids(texts: list[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    if not texts:
        return []
    with _tokenizing:
        encoded = tokenizer(
            texts,
            add_special_tokens=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
    found: list[list[int]] = encoded["input_ids"]
    return found


def _leading(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """What every sequence starts with: the begin token where there is one, whether or not the tokenizer adds it."""
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def _shortened(parts: Parts, max_tokens: int, leading: int | None) -> tuple[Parts, bool]:
    """The row within `max_tokens`, and whether something was left out of it; nothing if its answer is too long.

    Of a prompt the first `leading` tokens stay and one more at least, from which the answer's first token is predicted;
    None stands for a conversation, whose frame has to stay whole. A text without a prompt is cut at its end.
    """
    excess = sum(len(ids) for ids, _ in parts) - max_tokens
    if excess <= 0:
        return parts, False
    prompt = _ids(parts[:-1])
    if len(parts) == 2 and leading is not None:
        return [parts[0], (parts[1][0][:-excess], True)], True
    if leading is None or len(prompt) - leading <= excess:
        return [], False
    return [(prompt[:leading] + prompt[leading + excess :], False), parts[-1]], True


def _ids(parts: Parts) -> list[int]:
    return [token for ids, _ in parts for token in ids]


def _require_known(
    rows: Iterable[Sequence[int]], places: Places, tokenizer: "PreTrainedTokenizerBase", vocabulary: int | None
) -> None:
    for index, ids in enumerate(rows):
        largest = max(ids, default=0)
        if vocabulary is not None and largest >= vocabulary:
            token = tokenizer.convert_ids_to_tokens(largest)
            raise DataError(
                f"{place_of(index, places)} has token {token!r} with id {largest}, but the model knows {vocabulary} "
                "tokens; take tokenizer and model of one training, or resize the model's embeddings"
            )
