"""What `fedpipe edge check` shows an edge of its own rows."""

from tiny_models import tiny_examples, tiny_tokenizer

from fedpipe_core.config import DataSpec
from fedpipe_core.dialogues import collect_dialogues
from fedpipe_core.profiling import EdgeData
from fedpipe_core.token_summary import render_row, summarize_tokens
from fedpipe_core.tokenizing import TokenizedExamples, tokenize

ROWS = TokenizedExamples([[5] * n for n in range(1, 99)], [[5] * n for n in range(1, 99)], 4, cut=2, dropped=1)
NONE = TokenizedExamples([[5]], [[5]], 4, dropped=0)


def test_lengths_and_what_did_not_fit_are_told_over_all_rows() -> None:
    found = summarize_tokens(EdgeData(ROWS, NONE, "f"), tiny_tokenizer(decoder=True))
    assert found["length_percentiles"] == {"50": 49, "90": 89, "99": 98, "100": 98}
    assert (found["cut_share"], found["dropped_share"]) == (0.02, 0.01)


def test_rendered_row_marks_what_is_learned() -> None:
    rows = TokenizedExamples([[5, 6, 7, 8]], [[-100, -100, 7, 8]], pad_token_id=4)
    assert render_row(rows, 0, tiny_tokenizer(decoder=True)) == "word0 word1⟦word2 word3⟧"


def test_rendered_row_of_a_classifier_ends_with_its_label() -> None:
    rows = tiny_examples(1)
    assert render_row(rows, 0, tiny_tokenizer()).endswith(f"→ ⟦{rows.labels[0]}⟧")


def test_only_the_assistants_turns_of_a_conversation_are_marked() -> None:
    tokenizer = tiny_tokenizer(decoder=True)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
    )
    spec = DataSpec(format="messages", train="t.jsonl", test="t.jsonl")
    said = [{"role": "user", "content": "word0"}, {"role": "assistant", "content": "word1"}]
    rows = tokenize(collect_dialogues([{"messages": said + said}], spec), tokenizer, 64)
    assert render_row(rows, 0, tokenizer).count("⟦word1⟧") == 2
    assert "⟦word0" not in render_row(rows, 0, tokenizer)
