import json
from collections import Counter

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from fedpipe_core.config import DataSpec
from fedpipe_core.data import (
    Examples,
    fingerprint,
    label_names,
    load_examples,
    load_examples_and_column,
    split_validation,
)
from fedpipe_core.errors import DataError

SPEC = DataSpec(train="unused", test="unused", labels=3)
NAMED = SPEC.model_copy(update={"label_name_column": "name"})


def jsonl(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def named_rows(*pairs):
    return [{"text": f"t{i}", "label": label, "name": name} for i, (label, name) in enumerate(pairs)]


def rows_of(examples):
    return Counter(zip(examples.texts, examples.labels, strict=True))


EXAMPLES = st.lists(st.tuples(st.text(max_size=6), st.integers(0, 3)), max_size=50).map(
    lambda rows: Examples([text for text, _ in rows], [label for _, label in rows])
)


def test_select_takes_rows_in_the_order_asked_for():
    assert Examples(["a", "b", "c"], [0, 1, 2]).select([2, 0]) == Examples(["c", "a"], [2, 0])


def test_load_examples_reads_the_named_columns_and_ignores_others(tmp_path):
    path = jsonl(tmp_path, {"query": "a", "intent": 2, "x": None}, {"query": " b ", "intent": 0})
    spec = SPEC.model_copy(update={"text_column": "query", "label_column": "intent"})
    assert load_examples(path, spec) == Examples(["a", " b "], [2, 0])


def test_rows_keep_the_line_they_came_from(tmp_path):
    path = jsonl(tmp_path, {"text": "a", "label": 2}, {"text": "", "label": 0}, {"text": "b", "label": 0})
    found = load_examples(path, SPEC.model_copy(update={"on_bad_row": "skip"}))
    assert found.places == [f"{path} line 1", f"{path} line 3"]
    assert found.select([1]).places == [f"{path} line 3"]


def test_load_examples_takes_the_digits_of_a_csv_file_as_labels(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('text,label\n"hello, you",2\nbye, 0 \n')
    assert load_examples(path, SPEC) == Examples(["hello, you", "bye"], [2, 0])


def test_load_examples_takes_small_integers_and_dictionaries_of_parquet(tmp_path):
    texts = pa.array(["a", "b", "a"]).dictionary_encode()
    parquet.write_table(pa.table({"text": texts, "label": pa.array([0, 1, 2], pa.int8())}), tmp_path / "rows.parquet")
    assert load_examples(tmp_path / "rows.parquet", SPEC) == Examples(["a", "b", "a"], [0, 1, 2])


def test_load_examples_and_column_keeps_the_columns_values_beside_the_rows(tmp_path):
    path = jsonl(tmp_path, {"text": "a", "label": 1, "domain": "home"}, {"text": "b", "label": 0, "domain": 7})
    assert load_examples_and_column(path, SPEC, "domain") == (Examples(["a", "b"], [1, 0]), ["home", 7])


def test_a_missing_column_is_reported_with_what_was_found_and_the_nearest_name(tmp_path):
    path = jsonl(tmp_path, {"text": "a", "lable": 1})
    with pytest.raises(DataError) as caught:
        load_examples(path, SPEC)
    assert str(caught.value) == (
        f"{path} line 1 has no column 'label': found 'text', 'lable', needed 'text', 'label'; did you mean 'lable'? "
        "correct the file or the column's name in the config's `data` section"
    )


def test_a_column_missing_from_a_later_row_is_an_unusable_row(tmp_path):
    path = jsonl(tmp_path, {"text": "a", "label": 1}, {"text": "b"})
    with pytest.raises(DataError, match=r"1 unusable row: line 2: no column 'label'; correct or remove"):
        load_examples(path, SPEC)


@pytest.mark.parametrize(
    ("label", "shown"),
    [
        (3, "3"),
        (-1, "-1"),
        (1.0, "1.0"),
        (True, "True"),
        (None, "None"),
        ("one", "'one'"),
        ("", "''"),
        ("-1", "'-1'"),
        ("٣", "'٣'"),
        ("1_0", "'1_0'"),
        (10**30, "10{30}"),
        ([1], r"\[1\]"),
    ],
)
def test_a_label_out_of_range_is_reported_with_file_line_value_and_range(tmp_path, label, shown):
    path = jsonl(tmp_path, {"text": "a", "label": 0}, {"text": "b", "label": label})
    with pytest.raises(DataError, match=rf"rows\.jsonl .* line 2: 'label' is {shown}, needed an integer from 0 to 2"):
        load_examples(path, SPEC)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "is empty"),
        (" \n\u3000", "is empty"),
        (None, "is NoneType, needed a string"),
        (5, "is int, needed a string"),
        ("a\ud800", "holds half of a surrogate pair"),
    ],
)
def test_a_text_that_cannot_be_used_is_reported(tmp_path, text, fault):
    with pytest.raises(DataError, match=rf"line 1: 'text' {fault}"):
        load_examples(jsonl(tmp_path, {"text": text, "label": 0}), SPEC)


def test_many_unusable_rows_are_counted_and_the_first_few_named(tmp_path):
    rows = [{"text": "a", "label": 0}, *({"text": "secret", "label": 9} for _ in range(20))]
    with pytest.raises(
        DataError, match=r"20 unusable rows: line 2: .*; line 3: .*; line 4: .*; and 17 more;"
    ) as caught:
        load_examples(jsonl(tmp_path, *rows), SPEC)
    assert "secret" not in str(caught.value)


def test_a_long_wrong_label_is_shortened(tmp_path):
    with pytest.raises(DataError, match=r"'x{38}…, needed"):
        load_examples(jsonl(tmp_path, {"text": "a", "label": "x" * 500}), SPEC)


def test_label_names_are_none_when_no_column_is_configured(tmp_path):
    assert label_names(tmp_path / "not read.jsonl", SPEC) is None


def test_label_names_come_in_the_order_of_labels(tmp_path):
    path = jsonl(tmp_path, *named_rows((2, "c"), (0, "a"), (1, "b"), (0, "a ")))
    assert label_names(path, NAMED) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("pairs", "fault"),
    [
        ([(0, "a"), (2, "c")], "label 1 has no row"),
        ([(0, "a"), (0, "z"), (1, "b"), (2, "c")], "label 0 has the names 'a', 'z'"),
        ([(0, "a"), (1, "b"), (2, "a")], "labels 0 and 2 are both named 'a'"),
        ([(0, "a"), (1, " "), (2, "c")], "label 1 has an empty name"),
        ([(0, "a"), (1, None), (2, "c")], "label 1 has an empty name"),
    ],
)
def test_label_names_must_name_labels_one_to_one(tmp_path, pairs, fault):
    with pytest.raises(DataError, match=rf"column 'name' does not name the labels one to one: {fault}"):
        label_names(jsonl(tmp_path, *named_rows(*pairs)), NAMED)


@given(EXAMPLES, st.randoms(use_true_random=False))
def test_fingerprint_does_not_depend_on_the_order_of_rows(examples, random):
    order = list(range(len(examples)))
    random.shuffle(order)
    assert fingerprint([examples.select(order)], "salt") == fingerprint([examples], "salt")


@given(EXAMPLES, EXAMPLES)
def test_fingerprint_tells_different_rows_apart(first, second):
    assert (fingerprint([first], "salt") == fingerprint([second], "salt")) == (rows_of(first) == rows_of(second))


def test_fingerprint_depends_on_the_salt_and_is_the_same_on_every_machine():
    examples = Examples(["turn on the light", "off"], [0, 1])
    assert fingerprint([examples], "a") != fingerprint([examples], "b")
    assert fingerprint([examples], "a") == "73d375d2c2f453439c607e9ae5f65ecf74ff2a302b3bd1d4b66bf26df25a469b"


@settings(deadline=None)
@given(EXAMPLES, st.floats(0, 0.89), st.integers(0, 99))
def test_split_validation_parts_all_rows_and_holds_out_the_share_asked_for(examples, fraction, seed):
    training, validation = split_validation(examples, fraction, seed)
    assert rows_of(training) + rows_of(validation) == rows_of(examples)
    assert abs(len(validation) - fraction * len(examples)) <= 1
    assert len(training) >= 1 or len(examples) == 0
    assert (len(validation) > 0) == (fraction > 0 and len(examples) > 1)


@settings(deadline=None)
@given(EXAMPLES, st.randoms(use_true_random=False))
def test_split_validation_does_not_depend_on_the_order_of_rows(examples, random):
    order = list(range(len(examples)))
    random.shuffle(order)
    before, after = split_validation(examples, 0.3, 1), split_validation(examples.select(order), 0.3, 1)
    assert [rows_of(part) for part in before] == [rows_of(part) for part in after]


@given(st.integers(0, 99))
def test_split_validation_holds_out_of_every_label_its_share(seed):
    labels = [0] * 50 + [1] * 30 + [2] * 20
    _, validation = split_validation(Examples([f"t{i}" for i in range(100)], labels), 0.1, seed)
    assert Counter(validation.labels) == {0: 5, 1: 3, 2: 2}


def test_split_validation_leaves_a_labels_only_row_to_training():
    examples = Examples([f"t{i}" for i in range(12)], [0] * 10 + [1, 2])
    training, validation = split_validation(examples, 0.2, 0)
    assert {1, 2} <= set(training.labels)
    assert len(validation) == 2


def test_split_validation_follows_from_the_seed_and_keeps_the_order_of_rows():
    examples = Examples([f"{i:02}" for i in range(40)], [i % 2 for i in range(40)])
    assert split_validation(examples, 0.25, 1) == split_validation(examples, 0.25, 1)
    assert split_validation(examples, 0.25, 1) != split_validation(examples, 0.25, 2)
    for part in split_validation(examples, 0.25, 1):
        assert part.texts == sorted(part.texts)
