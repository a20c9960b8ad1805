import pytest
from tiny_models import VOCABULARY, WORDS, tiny_tokenizer

from fedpipe_core.chat import templated_pieces
from fedpipe_core.dialogues import Dialogues, Turn
from fedpipe_core.errors import DataError, ModelError
from fedpipe_core.tokenizing import IGNORED, tokenize, tokenize_prompts

# Roles and ends as words of the tiny vocabulary; spaces keep them apart.
TEMPLATE = (
    "{% for message in messages %}{{ {'system': 'word50 ', 'user': 'word51 ', 'assistant': 'word52 '}[message.role] }}"
    "{{ message.content }}{{ ' word53 ' }}{% endfor %}{% if add_generation_prompt %}{{ 'word52 ' }}{% endif %}"
)
TURNS = (
    Turn("system", "word0"),
    Turn("user", "word1 word2"),
    Turn("assistant", "word3"),
    Turn("user", "word4"),
    Turn("assistant", "word5 word6"),
)
ROWS = Dialogues([TURNS], [("word5 word6",)], templated=True)


def tokenizer(template=TEMPLATE):
    found = tiny_tokenizer(decoder=True)
    found.pad_token = found.eos_token
    found.chat_template = template
    return found


def ids(*numbers):
    return [VOCABULARY[WORDS[number]] for number in numbers]


def test_pieces_together_are_the_rendered_conversation():
    whole = tokenizer().apply_chat_template([turn._asdict() for turn in TURNS], tokenize=False)
    assert "".join(text for text, _ in templated_pieces(TURNS, tokenizer())) == whole


def test_what_the_assistant_says_and_what_ends_it_is_learned_in_every_turn():
    found = tokenize(ROWS, tokenizer(), max_tokens=40)
    assert found.token_ids == [ids(50, 0, 53, 51, 1, 2, 53, 52, 3, 53, 51, 4, 53, 52, 5, 6, 53)]
    learned = [label for label in found.labels[0] if label != IGNORED]
    assert learned == ids(3, 53, 5, 6, 53)


def test_prompt_is_the_conversation_up_to_the_last_answer():
    assert tokenize_prompts(ROWS, tokenizer(), 40).token_ids == [ids(50, 0, 53, 51, 1, 2, 53, 52, 3, 53, 51, 4, 53, 52)]


def test_conversation_that_does_not_fit_is_left_out_whole():
    short = Dialogues([TURNS[1:3], TURNS], [("word3",), ("word5 word6",)], templated=True)
    found = tokenize(short, tokenizer(), max_tokens=12)
    assert (len(found), found.cut, found.dropped) == (1, 0, 1)


def test_tokenizer_without_a_chat_template_is_refused():
    with pytest.raises(ModelError, match=r"has no chat template, needed for data\.format messages"):
        tokenize(ROWS, tokenizer(None), max_tokens=40)


def test_template_that_writes_earlier_turns_anew_is_refused():
    with pytest.raises(ModelError, match="writes earlier turns anew"):
        tokenize(ROWS, tokenizer("{{ messages | length }}" + TEMPLATE), max_tokens=40)


def test_order_of_turns_that_the_template_refuses_is_told():
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('start with user') }}{% endif %}" + TEMPLATE
    with pytest.raises(DataError, match=r"refuses turns of system, user \(start with user\)"):
        tokenize(ROWS, tokenizer(strict), max_tokens=40)
