import json

import pytest

from fedpipe_core.config import DataSpec
from fedpipe_core.data import fingerprint, load_examples, load_examples_and_column, split_validation
from fedpipe_core.dialogues import Dialogues, Turn
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
    assert fingerprint(forward, "salt") == fingerprint(backward, "salt")
    training, validation = split_validation(forward, 0.25, seed=1)
    assert (len(training), len(validation)) == (30, 10)
    assert set(validation.turns) == set(split_validation(backward, 0.25, seed=1)[1].turns)
    assert not set(training.turns) & set(validation.turns)
