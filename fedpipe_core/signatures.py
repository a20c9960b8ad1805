"""Signatures of records on a store that others can write to: Ed25519 (RFC 8032) over a record and its place.

A record is signed for the key under which it lies, which names run, round and edge; what it says holds the hashes of
the base and of its data. So a record that was altered, copied to another place, or made by anyone else is told apart,
each with its own words. Who has to sign what is the config's to say.
"""

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from fedpipe_core.errors import ConfigError, SignatureError

FIELD = "signature"
_DOMAIN = b"fedpipe record\n"  # no signature made for anything else can pass for a record's
_PREFIX = "ed25519:"


@dataclass(frozen=True)
class SigningKey:
    """A private key; `public` is what others know it by."""

    _private: Ed25519PrivateKey = field(repr=False)

    @property
    def public(self) -> str:
        """The public key as configs list it: `ed25519:` and 32 bytes in base64."""
        raw = self._private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        return _PREFIX + base64.b64encode(raw).decode()

    def sign(self, content: bytes) -> str:
        """The signature of these bytes in base64; the same bytes give the same signature."""
        return base64.b64encode(self._private.sign(_DOMAIN + content)).decode()


def new_key() -> SigningKey:
    """Make a key from the system's randomness."""
    return SigningKey(Ed25519PrivateKey.generate())


def save_key(key: SigningKey, path: Path) -> None:
    """Write a private key as PEM that its owner alone can read. Raises ConfigError when the file is there already."""
    pem = key._private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600, exist_ok=False)
        path.write_bytes(pem)
    except FileExistsError:
        raise ConfigError(f"key {path} is there already, and a key is never replaced; name another file") from None
    except OSError as error:
        raise ConfigError(f"key {path} cannot be written ({error.strerror}); name a file that can be") from None


def load_key(path: Path) -> SigningKey:
    """Read a private key. Raises ConfigError when the file holds none."""
    try:
        found = load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise ConfigError(
            f"key {path} cannot be read ({error.strerror}); make one with `fedpipe edge keygen {path}`"
        ) from None
    except (ValueError, TypeError):
        found = None
    if not isinstance(found, Ed25519PrivateKey):
        raise ConfigError(f"key {path} holds no Ed25519 private key; make one with `fedpipe edge keygen FILE`")
    return SigningKey(found)


def sign_record(document: Mapping[str, Any], place: str, key: SigningKey) -> dict[str, Any]:
    """The record with its signature for a place, the key under which it will lie."""
    signature = {"by": key.public, "place": place, "value": key.sign(_content(document, place))}
    return {**document, FIELD: signature}


def unsigned(document: Mapping[str, Any]) -> dict[str, Any]:
    """The record without its signature, if it has one."""
    return {name: value for name, value in document.items() if name != FIELD}


def verify_record(document: Mapping[str, Any], place: str, public: str) -> None:
    """Raise SignatureError unless the record was signed for its place with that key, and not altered since."""
    signature = document.get(FIELD)
    if not isinstance(signature, Mapping):
        raise SignatureError(f"{place} is not signed, needed the signature of {public}; it must not be used")
    by, signed_place = str(signature.get("by")), str(signature.get("place"))
    if by != public:
        raise SignatureError(f"{place} is signed by {by[:80]}, needed {public}; it must not be used")
    if signed_place != place:
        raise SignatureError(f"{place} was signed for {signed_place[:200]} and copied here; it must not be used")
    if not _is_valid(signature.get("value"), _content(document, place), public):
        raise SignatureError(f"{place} does not match its signature by {public}: it was altered; it must not be used")


def _content(document: Mapping[str, Any], place: str) -> bytes:
    """What is signed: the place, and the record as JSON with sorted keys and no white space."""
    record = json.dumps(unsigned(document), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return f"{place}\n{record}".encode()


def _is_valid(value: object, content: bytes, public: str) -> bool:
    try:
        raw = base64.b64decode(public.removeprefix(_PREFIX), validate=True)
        signature = base64.b64decode(str(value), validate=True)
        if base64.b64encode(signature).decode() != value:
            return False  # another spelling of the same bytes
        Ed25519PublicKey.from_public_bytes(raw).verify(signature, _DOMAIN + content)
    except (InvalidSignature, ValueError):
        return False
    return True
