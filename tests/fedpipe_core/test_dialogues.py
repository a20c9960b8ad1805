import json

import pytest

from fedpipe_core.config import DataSpec
from fedpipe_core.data import fingerprint, load_examples, load_examples_and_column, split_validation
from fedpipe_core.dialogues import ALPACA, Dialogues, Turn
from fedpipe_core.errors import DataError

SPEC = DataSpec(train="unused", test="unused", format="completion", separator=" -> ")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_completion_rows_become_a_question_and_an_answer(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "two", "completion": "deux", "other": 3}])
    found = load_examples(path, SPEC)
    assert found == Dialogues([(Turn("user", "two -> "), Turn("assistant", "deux"))], [("deux",)])


def test_references_are_all_right_answers(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "two", "completion": "deux", "references": ["deux", "2"]}])
    spec = SPEC.model_copy(update={"references_column": "references"})
    assert load_examples(path, spec).references == [("deux", "2")]


def test_a_training_file_needs_no_references(tmp_path):
    spec = SPEC.model_copy(update={"references_column": "references"})
    assert load_examples(write(tmp_path / "a.jsonl", [{"prompt": "two", "completion": "deux"}]), spec).references == [
        ("deux",)
    ]


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"prompt": "two"}, "line 2: no column 'completion'"),
        ({"prompt": "two", "completion": " "}, "line 2: 'completion' is empty"),
        ({"prompt": 2, "completion": "deux"}, "line 2: 'prompt' is int, needed a string"),
        ({"prompt": "two", "completion": "\ud800"}, "line 2: 'completion' holds half of a surrogate pair"),
        ({"prompt": "two", "completion": "deux", "refs": []}, "line 2: 'refs' is list, needed a list of at least one"),
        ({"prompt": "two", "completion": "deux", "refs": "deux"}, "line 2: 'refs' is str, needed a list of at least"),
        ({"prompt": "two", "completion": "deux", "refs": [""]}, "line 2: an entry of 'refs' is empty"),
    ],
)
def test_unusable_row_is_named_with_file_and_line(tmp_path, row, fault):
    spec = SPEC.model_copy(update={"references_column": "refs"})
    path = write(tmp_path / "bad.jsonl", [{"prompt": "one", "completion": "un"}, row])
    with pytest.raises(DataError, match=rf"bad.jsonl has 1 unusable row: {fault}"):
        load_examples(path, spec)


def test_another_column_comes_row_by_row(tmp_path):
    rows = [{"prompt": "a", "completion": "b", "kind": kind} for kind in ("x", "y")]
    _, kinds = load_examples_and_column(write(tmp_path / "a.jsonl", rows), SPEC, "kind")
    assert kinds == ["x", "y"]


def test_dialogues_are_split_and_named_like_texts(tmp_path):
    rows = [{"prompt": f"{number}", "completion": "answer"} for number in range(40)]
    forward = load_examples(write(tmp_path / "a.jsonl", rows), SPEC)
    backward = load_examples(write(tmp_path / "b.jsonl", rows[::-1]), SPEC)
    assert fingerprint([forward], "salt") == fingerprint([backward], "salt")
    training, validation = split_validation(forward, 0.25, seed=1)
    assert (len(training), len(validation)) == (30, 10)
    assert set(validation.turns) == set(split_validation(backward, 0.25, seed=1)[1].turns)
    assert not set(training.turns) & set(validation.turns)


CHAT = DataSpec(train="unused", test="unused", format="messages")
ALPACA_ROWS = DataSpec(train="unused", test="unused", format="instruction")


def said(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_conversation_ends_with_the_assistants_last_word(tmp_path):
    rows = [said(("system", "be kind"), ("user", "hi"), ("assistant", "hello"), ("user", "bye"))]
    found = load_examples(write(tmp_path / "a.jsonl", rows), CHAT)
    assert found.turns == [(Turn("system", "be kind"), Turn("user", "hi"), Turn("assistant", "hello"))]
    assert found.references == [("hello",)]
    assert found.templated
    assert found.select([0]).templated


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"messages": "hi"}, "'messages' is str, needed a list of messages"),
        ({"messages": ["hi"]}, "message 1 of 'messages' has no role of system, user, assistant"),
        (said(("user", "hi"), ("robot", "hello")), "message 2 of 'messages' has no role of system, user, assistant"),
        (said(("user", "hi"), ("assistant", " ")), "the content of message 2 of 'messages' is empty"),
        (said(("user", "hi"), ("user", "hi?")), "'messages' has no message of the assistant"),
        ({"messages": []}, "'messages' has no message of the assistant"),
    ],
)
def test_unusable_conversation_is_named_with_its_line(tmp_path, row, fault):
    good = said(("user", "hi"), ("assistant", "hello"))
    with pytest.raises(DataError, match=f"1 unusable row: line 2: {fault}"):
        load_examples(write(tmp_path / "a.jsonl", [good, row]), CHAT)


def test_instruction_is_rendered_as_alpaca_does_with_an_input_or_without(tmp_path):
    rows = [
        {"instruction": "Add {these}.", "input": "2 and 3", "output": "5"},
        {"instruction": "Say hi.", "input": " ", "output": "hi"},
        {"instruction": "Say hi.", "output": "hi"},
    ]
    first, second, third = load_examples(write(tmp_path / "a.jsonl", rows), ALPACA_ROWS).turns
    assert "### Instruction:\nAdd {these}.\n\n### Input:\n2 and 3\n\n### Response:\n" in first[0].content
    assert second == third == (Turn("user", ALPACA.format(instruction="Say hi.")), Turn("assistant", "hi"))


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"instruction": "", "output": "x"}, "'instruction' is empty"),
        ({"instruction": "x", "output": ""}, "'output' is empty"),
        ({"instruction": "x", "input": 3, "output": "x"}, "'input' is int, needed a string"),
    ],
)
def test_unusable_instruction_is_named_with_its_line(tmp_path, row, fault):
    with pytest.raises(DataError, match=f"line 1: {fault}"):
        load_examples(write(tmp_path / "a.jsonl", [row]), ALPACA_ROWS)


def test_plain_text_is_learned_as_a_whole(tmp_path):
    spec = DataSpec(train="unused", test="unused", format="text")
    assert load_examples(write(tmp_path / "a.jsonl", [{"text": "once"}]), spec).turns == [(Turn("assistant", "once"),)]


def test_bad_rows_are_left_out_and_counted_where_the_config_says_so(tmp_path, caplog):
    good = json.dumps({"prompt": "one", "completion": "un"}).encode()
    lines = [b"{broken", good, b"\xff\xfe", b'{"prompt": "two", "completion": ""}', b"[1]", good, b'{"prompt": "x"}']
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    found = load_examples(path, SPEC.model_copy(update={"on_bad_row": "skip"}))
    assert len(found) == 2
    assert "a.jsonl has 5 unusable rows among 7, left out: line 1:" in caplog.text
    assert "line 3:" in caplog.text
    assert "'completion' is empty" in caplog.text


def test_a_file_of_bad_rows_alone_is_refused_though_they_may_be_skipped(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "x", "completion": " "}] * 4)
    with pytest.raises(DataError, match=r"a\.jsonl has 4 unusable rows: line 1: 'completion' is empty"):
        load_examples(path, SPEC.model_copy(update={"on_bad_row": "skip"}))


@pytest.mark.parametrize(("line", "fault"), [(b"{broken", "line 2 is not JSON"), (b"\xff", "line 2 is not UTF-8")])
def test_broken_line_is_named_with_its_file(tmp_path, line, fault):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps({"prompt": "one", "completion": "un"}).encode() + b"\n" + line)
    with pytest.raises(DataError, match=f"a.jsonl {fault}"):
        load_examples(path, SPEC)
