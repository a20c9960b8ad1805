"""A key that is accepted names one file inside the store, whatever it looks like."""

from pathlib import PurePosixPath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpipe_core.errors import InvalidKeyError
from tasks.keys import check_folder, check_key, is_key

_ODD_TEXT = st.text(st.one_of(st.characters(), st.sampled_from("./\\-_a~\0\n")), max_size=12)


@settings(deadline=None, max_examples=300)
@given(key=_ODD_TEXT)
def test_accepted_keys_stay_inside_the_store_and_have_one_spelling(key: str) -> None:
    if not is_key(key):
        with pytest.raises(InvalidKeyError):
            check_key(key)
        return
    path = PurePosixPath("/store", check_key(key))
    assert path.is_relative_to("/store")
    assert ".." not in path.parts
    assert str(path) == f"/store/{key}"


@settings(deadline=None, max_examples=100)
@given(parts=st.lists(st.from_regex(r"\A[a-z0-9][a-z0-9._-]{0,62}\Z"), min_size=1, max_size=7))
def test_whatever_is_made_of_config_names_is_a_key(parts: list[str]) -> None:
    assert check_key("/".join(parts)) == "/".join(parts)


def test_folder_may_end_in_a_slash_and_be_empty() -> None:
    assert check_folder("a/b/") == check_folder("a/b") == "a/b"
    assert check_folder("") == ""
    with pytest.raises(InvalidKeyError):
        check_folder("/")
