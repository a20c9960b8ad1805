import inspect
import re

import pytest

from fedpipe_core import errors
from fedpipe_core.errors import FedPipeError, InputError, ObjectMissingError, RunError

ALL = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]


def test_every_error_is_in_the_tree_the_module_draws() -> None:
    drawn = set(re.findall(r"\b[A-Z]\w+Error\b", errors.__doc__ or ""))
    assert drawn == {kind.__name__ for kind in ALL}


@pytest.mark.parametrize("kind", ALL)
def test_every_error_says_when_it_is_raised(kind: type[Exception]) -> None:
    assert (kind.__doc__ or "").startswith(("Raised when", "Base of"))


@pytest.mark.parametrize("kind", [kind for kind in ALL if kind is not FedPipeError])
def test_every_error_is_either_the_inputs_or_the_runs_fault(kind: type[FedPipeError]) -> None:
    assert issubclass(kind, InputError) != issubclass(kind, RunError)
    assert kind.exit_code == (2 if issubclass(kind, InputError) else 1)


def test_missing_object_prints_its_sentence_although_it_is_a_key_error() -> None:
    assert str(ObjectMissingError("there is no object a")) == "there is no object a"
    with pytest.raises(KeyError):
        raise ObjectMissingError("there is no object a")
