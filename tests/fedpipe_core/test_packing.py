from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import WRITERS, tiny_dialogues

from fedpipe_core.batches import pad_batch, training_batches
from fedpipe_core.losses import count_learned, training_loss
from fedpipe_core.model import Base
from fedpipe_core.packing import count_examples, pack_batch
from fedpipe_core.tokenizing import TokenizedExamples

ROWS = tiny_dialogues(10)


@pytest.mark.parametrize("architecture", WRITERS)
@torch.inference_mode()
def test_packed_examples_do_not_see_each_other(tiny_writer: Callable[..., Base], architecture: str) -> None:
    model = tiny_writer(architecture).model
    packed, padded = pack_batch(ROWS, range(10), width=30), pad_batch(ROWS, range(10))
    assert len(packed["input_ids"]) < 10
    torch.testing.assert_close(training_loss(model, packed), training_loss(model, padded), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_a_neighbour_changes_nothing(tiny_writer: Callable[..., Base]) -> None:
    model = tiny_writer("llama").model
    first = [pack_batch(ROWS, [0, other], width=64) for other in (1, 2)]
    length = len(ROWS.token_ids[0])
    found = []
    for batch in first:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        positions = range(batch["input_ids"].shape[1] - length + 1)
        start = next(p for p in positions if batch["input_ids"][0, p : p + length].tolist() == ROWS.token_ids[0])
        found.append(model(**inputs, use_cache=False).logits[0, start : start + length])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=12), st.integers(4, 40))
def test_every_example_is_in_one_row_and_no_row_is_wider_than_asked(lengths: list[int], width: int) -> None:
    rows = TokenizedExamples([[n + 1] * n for n in lengths], [[n + 1] * n for n in lengths], pad_token_id=0)
    batch = pack_batch(rows, range(len(lengths)), width)
    assert count_examples(batch) == len(lengths)
    assert batch["input_ids"].shape[1] <= max(width, *lengths)
    assert int((batch["input_ids"] != 0).sum()) == sum(lengths)
    assert count_learned(batch) == sum(n - 1 for n in lengths)


def test_training_batches_are_packed_where_a_width_is_given() -> None:
    packed = next(training_batches(ROWS, 6, 1, [0], packed_width=40))
    padded = next(training_batches(ROWS, 6, 1, [0]))
    assert count_examples(packed) == count_examples(padded) == 6
    assert count_learned(packed) == count_learned(padded)
