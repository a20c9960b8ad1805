"""Batches shared by threads of one core each."""

import threading

import pytest
import torch

from fedpipe_core.side_by_side import side_by_side


@pytest.mark.parametrize("at_once", [1, 3])
def test_results_come_in_the_order_of_the_items(at_once: int) -> None:
    assert side_by_side(lambda item: item * item, iter(range(20)), at_once) == [item * item for item in range(20)]


@pytest.mark.parametrize("at_once", [1, 3])
def test_an_item_that_fails_fails_the_whole(at_once: int) -> None:
    with pytest.raises(ZeroDivisionError):
        side_by_side(lambda item: 1 // item, [2, 1, 0], at_once)


def test_one_at_a_time_is_this_thread_and_more_are_threads_of_one_core() -> None:
    def where(_: int) -> tuple[int, int]:
        return threading.get_ident(), torch.get_num_threads()

    assert side_by_side(where, [0], 1) == [(threading.get_ident(), torch.get_num_threads())]
    ((thread, cores),) = side_by_side(where, [0], 2)
    assert (thread != threading.get_ident(), cores) == (True, 1)
