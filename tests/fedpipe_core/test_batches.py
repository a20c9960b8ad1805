import itertools
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fedpipe_core.batches import (
    evaluation_batches,
    longest_example_tokens,
    pad_batch,
    tokens_per_example,
    training_batches,
)
from fedpipe_core.data import Examples
from fedpipe_core.errors import DataError, ModelError
from fedpipe_core.tokenizing import TokenizedExamples, tokenize

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "turn", "on", "the", "light", "off"]


def word_tokenizer(pad_token: str | None = "[PAD]", special_tokens: bool = True) -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if special_tokens:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad_token, unk_token="[UNK]")


def rows_of_lengths(*lengths: int) -> TokenizedExamples:
    """Row i holds only the id i + 1 and has the label i, so a batch tells which rows it holds."""
    return TokenizedExamples([[i + 1] * n for i, n in enumerate(lengths)], list(range(len(lengths))), pad_token_id=0)


ROWS = st.lists(st.integers(1, 40), min_size=1, max_size=30).map(lambda lengths: rows_of_lengths(*lengths))


def test_tokenize_adds_the_models_special_tokens_and_leaves_out_padding():
    tokenized = tokenize(Examples(["turn on the light", "off"], [7, 2]), word_tokenizer(), max_tokens=16)
    assert tokenized == TokenizedExamples([[2, 4, 5, 6, 7, 3], [2, 8, 3]], [7, 2], pad_token_id=0)


def test_tokenize_cuts_the_text_and_keeps_the_special_tokens():
    tokenized = tokenize(Examples(["turn on the light"], [0]), word_tokenizer(), max_tokens=4)
    assert tokenized.token_ids == [[2, 4, 5, 3]]


def test_tokenize_takes_no_rows_as_an_empty_validation_split():
    assert len(tokenize(Examples([], []), word_tokenizer(), max_tokens=4)) == 0


def test_tokenize_keeps_to_its_own_length_while_other_edges_use_the_same_tokenizer():
    examples, tokenizer = Examples(["turn on the light off " * 20] * 300, [0] * 300), word_tokenizer()
    lengths = [8, 16, 32, 64] * 5
    with ThreadPoolExecutor(4) as pool:
        shards = list(pool.map(lambda length: tokenize(examples, tokenizer, length), lengths))
    assert [{len(ids) for ids in shard.token_ids} for shard in shards] == [{length} for length in lengths]


def test_tokenize_refuses_a_tokenizer_without_a_padding_token():
    with pytest.raises(ModelError, match=r"has no padding token.*set `pad_token`"):
        tokenize(Examples(["on"], [0]), word_tokenizer(pad_token=None), max_tokens=4)


def test_tokenize_refuses_a_text_that_gives_no_token():
    with pytest.raises(DataError, match=r"1 of 2 texts give no token, the first of them row 2"):
        tokenize(Examples(["on", "\u3000"], [0, 0]), word_tokenizer(special_tokens=False), max_tokens=4)


def test_pad_batch_pads_on_the_right_to_the_longest_row_of_the_batch():
    batch = pad_batch(rows_of_lengths(2, 3, 9), [1, 0])
    assert batch["input_ids"].tolist() == [[2, 2, 2], [1, 1, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [1, 0]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_pad_batch_masks_only_what_it_padded_even_if_a_text_holds_the_padding_id():
    batch = pad_batch(TokenizedExamples([[5, 0, 5], [5]], [0, 0], pad_token_id=0), [0, 1])
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_pad_batch_rounds_the_width_up_to_the_multiple():
    assert pad_batch(rows_of_lengths(9, 3), [0, 1], pad_to_multiple_of=8)["input_ids"].shape == (2, 16)
    assert pad_batch(rows_of_lengths(8, 3), [0, 1], pad_to_multiple_of=8)["input_ids"].shape == (2, 8)


@settings(deadline=None, max_examples=50)
@given(ROWS, st.integers(1, 12), st.integers(0, 20), st.integers())
def test_training_batches_serve_any_number_of_steps_in_whole_epochs(rows, batch_size, steps, seed):
    served = [
        label for batch in training_batches(rows, batch_size, steps, [seed]) for label in batch["labels"].tolist()
    ]
    assert len(served) == batch_size * steps
    for start in range(0, len(served) - len(rows) + 1, len(rows)):
        assert sorted(served[start : start + len(rows)]) == rows.labels
    counts = Counter(served)
    assert max(counts.values(), default=0) - min((counts[label] for label in rows.labels), default=0) <= 1


def test_training_batches_follow_from_seed_round_and_edge():
    rows = rows_of_lengths(*range(1, 21))

    def order(*seed_parts):
        return [batch["labels"].tolist() for batch in training_batches(rows, 4, 8, seed_parts)]

    assert order(0, 1, "edge-a") == order(0, 1, "edge-a")
    assert (
        len({str(order(*parts)) for parts in [(0, 1, "edge-a"), (0, 2, "edge-a"), (1, 1, "edge-a"), (0, 1, "edge-b")]})
        == 4
    )


def test_training_batches_reshuffle_every_epoch():
    first, second = training_batches(rows_of_lengths(*[1] * 20), 20, 2, [0])
    assert first["labels"].tolist() != second["labels"].tolist()


@settings(deadline=None, max_examples=50)
@given(ROWS, st.integers(1, 12), st.integers())
def test_training_batches_of_one_window_overlap_in_length_by_no_more_than_their_ends(rows, batch_size, seed):
    batches = len(rows) // batch_size  # at most 30 rows, so the windows of batch size 1 are the only ones cut short
    served = [batch["attention_mask"].sum(dim=1) for batch in training_batches(rows, batch_size, batches, [seed])][:16]
    spans = sorted((int(lengths.min()), int(lengths.max())) for lengths in served)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))


def test_training_batches_serve_long_and_short_rows_at_any_time():
    rows = rows_of_lengths(*range(1, 161))
    widths = [[batch["input_ids"].shape[1] for batch in training_batches(rows, 10, 16, [seed])] for seed in range(200)]
    assert {max(order) for order in widths} == {160}
    assert np.abs(np.mean(widths, axis=0) - 85).max() < 15


def test_training_batches_mix_rows_of_equal_length_anew_in_every_epoch():
    rows = rows_of_lengths(*[3] * 20, *[9] * 20)
    batches = [frozenset(batch["labels"].tolist()) for batch in training_batches(rows, 10, 8, [0])]
    assert len(set(batches)) == 8


def test_training_batches_begin_alike_whatever_the_number_of_steps():
    rows = rows_of_lengths(*range(1, 8))
    short = [batch["labels"].tolist() for batch in training_batches(rows, 3, 2, [5])]
    long = [batch["labels"].tolist() for batch in training_batches(rows, 3, 9, [5])]
    assert long[:2] == short


def test_training_batches_refuse_to_wait_forever_for_an_edge_without_rows():
    with pytest.raises(DataError, match="0 rows to train on"):
        next(training_batches(rows_of_lengths(), 4, 1, [0]))


@settings(deadline=None, max_examples=50)
@given(ROWS, st.integers(1, 12))
def test_evaluation_batches_hold_every_row_once_under_its_index(rows, batch_size):
    seen = {}
    for indices, batch in evaluation_batches(rows, batch_size):
        assert batch["labels"].tolist() == indices
        for index, ids, mask in zip(indices, batch["input_ids"], batch["attention_mask"], strict=True):
            seen[index] = ids[mask.bool()].tolist()
    assert seen == dict(enumerate(rows.token_ids))


def test_evaluation_batches_come_longest_first_and_pad_rows_of_like_length_together():
    widths = [batch["input_ids"].shape[1] for _, batch in evaluation_batches(rows_of_lengths(1, 9, 2, 8, 1, 9), 2)]
    assert widths == [9, 8, 1]


def test_tokens_per_example_is_the_mean_length_in_batches_of_one():
    rows = rows_of_lengths(*[1, 2, 6] * 30)
    assert tokens_per_example(rows, batch_size=1) == pytest.approx(3.0)
    assert tokens_per_example(rows, batch_size=1, pad_to_multiple_of=4) == pytest.approx(16 / 3)


def test_tokens_per_example_is_the_longest_row_when_every_batch_holds_all_rows():
    assert tokens_per_example(rows_of_lengths(1, 2, 6), batch_size=6) == 6


def test_longest_example_tokens_is_the_width_of_the_widest_batch():
    assert longest_example_tokens(rows_of_lengths(3, 9, 5)) == 9
    assert longest_example_tokens(rows_of_lengths(3, 9, 5), pad_to_multiple_of=8) == 16


def test_tokens_per_example_foresees_the_width_of_training_batches():
    lengths = np.random.default_rng(0).geometric(0.1, size=500)
    rows = rows_of_lengths(*lengths.tolist())
    for batch_size, steps in ((2, 400), (8, 200), (32, 100), (600, 20)):
        widths = [batch["input_ids"].shape[1] for batch in training_batches(rows, batch_size, steps, [0])]
        assert tokens_per_example(rows, batch_size) == pytest.approx(np.mean(widths), rel=0.05)
