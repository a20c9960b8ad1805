"""What may be a key: a name that a folder and an S3 bucket take alike, and that cannot leave either."""

import re

from fedpipe_core.errors import InvalidKeyError

MARKER = ".fedpipe"  # what a store's write check creates; no valid key, so never listed

_KEY_PART = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")  # no leading dot: neither "..", nor a temporary file
_LONGEST_KEY = 512


def check_key(key: str) -> str:
    """Return `key`, or raise InvalidKeyError where it could leave the store or would not fit every store.

    Parts are separated by "/" and made of ASCII letters, digits, "_", "-" and (not first) ".".
    """
    if len(key) > _LONGEST_KEY or not all(_KEY_PART.fullmatch(part) for part in key.split("/")):
        raise InvalidKeyError(
            f"key {key[:80]!r} cannot name an object: it must be relative, of letters, digits, '_', '-' and '.', "
            f"in parts that do not start with '.', and at most {_LONGEST_KEY} characters long; rename what it names"
        )
    return key


def is_key(name: str) -> bool:
    """Whether `check_key` accepts a name."""
    try:
        return bool(check_key(name))
    except InvalidKeyError:
        return False


def check_folder(folder: str) -> str:
    """Return a folder of keys without its closing slash; empty is the whole store. Raises InvalidKeyError."""
    return check_key(folder.rstrip("/")) if folder else ""
