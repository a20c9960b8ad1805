import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VOCABULARY, WORDS, tiny_tokenizer

from fedpipe_core.config import DataSpec
from fedpipe_core.dialogues import ALPACA, Dialogues, Turn, chat_template
from fedpipe_core.errors import DataError
from fedpipe_core.tokenizing import IGNORED, tokenize, tokenize_prompts

END, PAD = VOCABULARY["<eos>"], VOCABULARY["[PAD]"]
COMPLETIONS = DataSpec(train="unused", test="unused", format="completion", separator=" word0 ")


def words(first: int, count: int) -> str:
    return " ".join(WORDS[first : first + count])


def ids(first: int, count: int) -> list[int]:
    return [VOCABULARY[word] for word in WORDS[first : first + count]]


def said(prompt: str, answer: str) -> Dialogues:
    return Dialogues([(Turn("user", prompt), Turn("assistant", answer))], [(answer,)])


def tokenizer(**tokens):
    found = tiny_tokenizer(decoder=True)
    found.pad_token = found.eos_token
    for name, value in tokens.items():
        found.add_special_tokens({name: value}) if name.endswith("_token") else setattr(found, name, value)
    return found


def test_answer_and_its_end_are_learned_and_the_prompt_is_not():
    found = tokenize(said(words(0, 3), words(10, 2)), tokenizer(), max_tokens=16)
    assert found.token_ids == [[*ids(0, 3), *ids(10, 2), END]]
    assert found.labels == [[IGNORED] * 3 + [*ids(10, 2), END]]


def test_end_is_learned_though_it_is_also_what_pads():
    found = tokenize(said("word1", "word2"), tokenizer(), max_tokens=16)
    assert found.pad_token_id == END
    assert found.labels[0][-1] == END


def test_begin_token_stands_first_though_the_tokenizer_does_not_add_it():
    begins = tokenizer(bos_token="[CLS]")
    assert begins("word1")["input_ids"] == ids(1, 1)
    found = tokenize(said("word1", "word2"), begins, max_tokens=16)
    assert found.token_ids[0][0] == VOCABULARY["[CLS]"]
    assert found.labels[0][0] == IGNORED


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_of_the_tokenizer_changes_nothing(side):
    padded = tokenizer(padding_side=side, truncation_side=side)
    assert tokenize(said(words(0, 9), words(10, 3)), padded, 8) == tokenize(
        said(words(0, 9), words(10, 3)), tokenizer(), 8
    )


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(4, 24), st.booleans())
def test_answer_is_whole_or_the_row_is_left_out_and_counted(prompt, answer, max_tokens, begins):
    used = tokenizer(**({"bos_token": "[CLS]"} if begins else {}))
    rows = said(words(0, prompt), words(20, answer))
    both = Dialogues(rows.turns + said("word1", "word2").turns, [*rows.references, ("word2",)])
    found = tokenize(both, used, max_tokens)
    assert found.dropped == 2 - len(found)
    assert found.dropped == int(answer + 1 + begins + 1 > max_tokens)
    for token_ids, labels in zip(found.token_ids, found.labels, strict=True):
        assert len(token_ids) <= max_tokens
        assert labels[-1] == END
    if not found.dropped:
        assert [label for label in found.labels[0] if label != IGNORED] == [*ids(20, answer), END]
        assert found.cut == int(prompt + answer + 1 + begins > max_tokens)


def test_of_a_long_prompt_the_start_is_left_out():
    found = tokenize(said(words(0, 9), words(20, 2)), tokenizer(bos_token="[CLS]"), max_tokens=8)
    assert found.token_ids == [[VOCABULARY["[CLS]"], *ids(5, 4), *ids(20, 2), END]]
    assert (found.cut, found.dropped) == (1, 0)


def test_no_row_left_is_refused():
    with pytest.raises(DataError, match=r"none of 1 rows fits into model.max_tokens \(now 4\) with its whole answer"):
        tokenize(said("word1", words(0, 8)), tokenizer(), max_tokens=4)


@pytest.mark.parametrize("answer", ["word59", "word59 " * 9], ids=["short", "too long to be kept"])
def test_id_outside_the_vocabulary_is_refused_with_file_and_line(answer):
    turns = said("word1", "word2").turns + said("word1", answer).turns
    rows = Dialogues(turns, [("word2",), (answer,)], places=["rows.jsonl line 1", "rows.jsonl line 7"])
    refused = "has token 'word59' with id 64, but the model knows 64 tokens"
    with pytest.raises(DataError, match=rf"^rows.jsonl line 7 {refused}"):
        tokenize(rows, tokenizer(), max_tokens=8, vocabulary=64)
    with pytest.raises(DataError, match=rf"^row 1 {refused}"):
        tokenize(said("word1", answer), tokenizer(), max_tokens=8, vocabulary=64)


def test_prompts_are_what_stands_before_the_learned_answer():
    rows = said(words(0, 9), words(20, 2))
    trained = tokenize(rows, tokenizer(bos_token="[CLS]"), max_tokens=16)
    found = tokenize_prompts(rows, tokenizer(bos_token="[CLS]"), max_tokens=16)
    learned = trained.labels[0].index(ids(20, 1)[0])
    assert found.token_ids == [trained.token_ids[0][:learned]]
    assert found.references == [(words(20, 2),)]


def test_of_a_long_prompt_to_continue_the_start_is_left_out_too():
    found = tokenize_prompts(said(words(0, 9), "word1"), tokenizer(bos_token="[CLS]"), max_tokens=4)
    assert found.token_ids == [[VOCABULARY["[CLS]"], *ids(6, 3)]]


def test_released_chat_template_renders_a_prompt_as_training_did():
    used = tokenizer(bos_token="[CLS]")
    used.chat_template = chat_template(COMPLETIONS)
    rows = said("word1 word2" + COMPLETIONS.separator, "word3")
    asked = [{"role": "user", "content": "word1 word2"}]
    answered = [*asked, {"role": "assistant", "content": "word3"}]
    rendered = used.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert [rendered] == tokenize_prompts(rows, used, 16).token_ids
    assert [used.apply_chat_template(answered, return_dict=False)] == tokenize(rows, used, 16).token_ids


def test_plain_text_is_learned_from_its_first_word_and_cut_at_its_end():
    text = Dialogues([(Turn("assistant", words(0, 9)),)], [("unused",)])
    whole, short = (tokenize(text, tokenizer(), max_tokens) for max_tokens in (16, 5))
    assert whole.labels == whole.token_ids == [[*ids(0, 9), END]]
    assert (short.token_ids, short.cut, short.dropped) == ([ids(0, 5)], 1, 0)


def test_released_template_of_instructions_renders_alpacas_form():
    spec = COMPLETIONS.model_copy(update={"format": "instruction"})
    used = tokenizer(bos_token="[CLS]")
    used.chat_template = chat_template(spec)
    rendered = used.apply_chat_template([{"role": "user", "content": "Say hi."}], tokenize=False)
    assert rendered == "[CLS]" + ALPACA.format(instruction="Say hi.")


def test_prompts_are_learned_too_where_the_config_says_so():
    found = tokenize(said(words(0, 3), words(10, 2)), tokenizer(), max_tokens=16, learn_prompts=True)
    assert found.labels == found.token_ids == [[*ids(0, 3), *ids(10, 2), END]]
