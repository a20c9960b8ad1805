"""Work on batches by threads of one core each.

They never wait for each other, so they stay fast on a machine that has other work, where one operation spread over all
cores waits for the slowest.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def side_by_side(work: Callable[[Item], Result], items: Iterable[Item], at_once: int) -> list[Result]:
    """The result of every item in order, `at_once` of them worked on at a time; in this thread where that is 1."""
    if at_once == 1:
        return list(map(work, items))
    with ThreadPoolExecutor(at_once, initializer=torch.set_num_threads, initargs=(1,)) as threads:
        return list(threads.map(work, items))
