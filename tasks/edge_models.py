"""Instances of the base in which edges of one process train, lent to one edge at a time.

Every round loads the whole adapter into an instance and reads back what was trained, so nothing of an edge stays in it,
and a thousand edges need as many instances as train at once. A few idle ones are kept, so that edges stay warm.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock

from fedpipe_core.edge_model import EdgeModel
from fedpipe_core.forms import FORMS, InstanceSpec
from fedpipe_core.methods import Form
from fedpipe_core.model import Base

MOST_IDLE = 16
_idle: list[tuple["ModelDesign", EdgeModel]] = []  # the one used last is last
_changing = Lock()


@dataclass(frozen=True)
class ModelDesign:
    """All that an instance depends on: edges of equal designs may train in the same one."""

    base: Base
    form: Form
    spec: InstanceSpec


@contextmanager
def lent_model(design: ModelDesign) -> Iterator[EdgeModel]:
    """An instance of that design, for the block alone; one in whose block something failed is not used again."""
    model = _take(design) or FORMS[design.form].build(design.base.model, design.spec)
    yield model
    with _changing:
        _idle.append((design, model))
        del _idle[:-MOST_IDLE]


def let_go_of_idle_models() -> None:
    """Free the instances nobody trains in, and with them their hold on a base."""
    with _changing:
        _idle.clear()


def _take(design: ModelDesign) -> EdgeModel | None:
    with _changing:
        found = next((index for index in reversed(range(len(_idle))) if _idle[index][0] == design), None)
        return None if found is None else _idle.pop(found)[1]
