import base64
import json
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpipe_core.errors import ConfigError, SignatureError
from fedpipe_core.signatures import load_key, new_key, save_key, sign_record, unsigned, verify_record

KEY, OTHER = new_key(), new_key()
PLACE = "run/rounds/0003/updates/east.json"
RECORD: dict[str, Any] = {"run": "run", "round": 3, "edge_id": "east", "loss": 0.1, "adapter": {"sha256": "ab" * 32}}

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
records = st.dictionaries(st.text().filter(lambda name: name != "signature"), values, max_size=5)


@settings(deadline=None, max_examples=50)
@given(record=records)
def test_signed_record_is_accepted_after_it_was_written_and_read(record: dict[str, Any]) -> None:
    read = json.loads(json.dumps(sign_record(record, PLACE, KEY), indent=1))
    verify_record(read, PLACE, KEY.public)
    assert unsigned(read) == record


@settings(deadline=None, max_examples=50)
@given(position=st.integers(0, 10_000), flip=st.integers(1, 255))
def test_no_flipped_byte_passes(position: int, flip: int) -> None:
    content = bytearray(json.dumps(sign_record(RECORD, PLACE, KEY)).encode())
    content[position % len(content)] ^= flip
    try:
        read = json.loads(bytes(content))
    except ValueError:
        return  # not even JSON, which the reader refuses
    if not isinstance(read, dict) or read == sign_record(RECORD, PLACE, KEY):
        return
    with pytest.raises(SignatureError):
        verify_record(read, PLACE, KEY.public)


@pytest.mark.parametrize("field", list(RECORD))
def test_altered_field_is_told(field: str) -> None:
    signed = sign_record(RECORD, PLACE, KEY) | {field: "altered"}
    with pytest.raises(SignatureError, match=r"updates/east.json does not match its signature by ed25519:.*altered"):
        verify_record(signed, PLACE, KEY.public)


def test_field_that_was_added_or_taken_away_is_told() -> None:
    signed = sign_record(RECORD, PLACE, KEY)
    for altered in (signed | {"more": 1}, {name: value for name, value in signed.items() if name != "loss"}):
        with pytest.raises(SignatureError, match="it was altered"):
            verify_record(altered, PLACE, KEY.public)


@pytest.mark.parametrize(
    "origin",
    ["run/rounds/0002/updates/east.json", "run/rounds/0003/updates/west.json", "other/rounds/0003/updates/east.json"],
)
def test_record_of_another_round_edge_or_run_is_told_with_where_it_came_from(origin: str) -> None:
    signed = sign_record(RECORD, origin, KEY)
    with pytest.raises(SignatureError, match=f"{PLACE} was signed for {origin} and copied here"):
        verify_record(signed, PLACE, KEY.public)


def test_claim_of_another_place_does_not_make_it_so() -> None:
    signed = sign_record(RECORD, "run/rounds/0002/updates/east.json", KEY)
    signed["signature"]["place"] = PLACE
    with pytest.raises(SignatureError, match="it was altered"):
        verify_record(signed, PLACE, KEY.public)


def test_wrong_key_is_told_with_both_keys() -> None:
    signed = sign_record(RECORD, PLACE, OTHER)
    with pytest.raises(SignatureError) as refusal:
        verify_record(signed, PLACE, KEY.public)
    assert f"is signed by {OTHER.public}, needed {KEY.public}" in str(refusal.value)
    signed["signature"]["by"] = KEY.public
    with pytest.raises(SignatureError, match="it was altered"):
        verify_record(signed, PLACE, KEY.public)


@pytest.mark.parametrize("signature", [None, "yes", 3, []])
def test_missing_signature_is_told(signature: object) -> None:
    with pytest.raises(SignatureError, match=r"east.json is not signed, needed the signature of ed25519:"):
        verify_record(RECORD | {"signature": signature}, PLACE, KEY.public)


@pytest.mark.parametrize("value", ["", "%%%", None, base64.b64encode(b"short").decode()])
def test_signature_that_is_none_is_refused(value: object) -> None:
    signed = sign_record(RECORD, PLACE, KEY)
    signed["signature"]["value"] = value
    with pytest.raises(SignatureError, match="it was altered"):
        verify_record(signed, PLACE, KEY.public)


def test_key_is_kept_for_its_owner_alone_and_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "east.pem"
    save_key(KEY, path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_key(path).public == KEY.public
    with pytest.raises(ConfigError, match=r"east.pem is there already, and a key is never replaced"):
        save_key(OTHER, path)
    assert load_key(path).public == KEY.public


def test_file_without_a_key_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read .*make one with `fedpipe edge keygen"):
        load_key(tmp_path / "none.pem")
    (tmp_path / "other.pem").write_text("-----BEGIN NOTHING-----", encoding="utf-8")
    with pytest.raises(ConfigError, match="holds no Ed25519 private key"):
        load_key(tmp_path / "other.pem")


def test_private_key_is_not_shown() -> None:
    assert repr(KEY) == "SigningKey()"
