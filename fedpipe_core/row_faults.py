"""What can be wrong with a row's values, in words; a row's own text never enters a message."""

from collections.abc import Mapping, Sequence
from typing import Any

FAULTS_SHOWN = 3


def text_fault(values: Mapping[str, Any], column: str) -> str | None:
    """Why a column holds no usable text, or None when it does."""
    return string_fault(values[column], repr(column))


def string_fault(text: object, name: str) -> str | None:
    """Why a value is no usable text, or None when it is one."""
    if not isinstance(text, str):
        return f"{name} is {type(text).__name__}, needed a string"
    if not text.strip():
        return f"{name} is empty"
    if not _is_unicode(text):
        return f"{name} holds half of a surrogate pair, which is no character"
    return None


def first_faults(faults: Sequence[str]) -> str:
    """The first few faults, and how many more there are."""
    rest = len(faults) - FAULTS_SHOWN
    return "; ".join(faults[:FAULTS_SHOWN]) + (f"; and {rest} more" if rest > 0 else "")


def quoted(names: Sequence[str]) -> str:
    """Names in quotes, with commas between."""
    return ", ".join(repr(name) for name in names)


def shorten(value: object, limit: int = 40) -> str:
    """A value as text of at most `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
