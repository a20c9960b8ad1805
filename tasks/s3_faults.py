"""Faults of S3 requests: which may pass when the request is repeated, after what pauses, and how the rest are told."""

import random
import time
from collections.abc import Iterator
from typing import Any

from fedpipe_core.errors import ObjectMissingError, StoreError

LONGEST_PAUSE_SECONDS = 5.0
# 409: two conditional writes at once; 412: a file overwritten while its parts come down.
_TRANSIENT_STATUSES = frozenset({409, 412, 429, 500, 502, 503, 504})
_TRANSIENT_CODES = frozenset({"RequestTimeout", "IncompleteBody", "NoSuchUpload", "Throttling", "ThrottlingException"})


def pauses(patience_seconds: float) -> Iterator[float]:
    """Pauses drawn from [0, longest], longest doubling (full jitter), that end before patience does."""
    deadline, longest = time.monotonic() + patience_seconds, 0.2  # a generator's clock starts with the first pause
    while (pause_seconds := random.uniform(0, longest)) < deadline - time.monotonic():
        yield pause_seconds
        longest = min(2 * longest, LONGEST_PAUSE_SECONDS)


def explained(error: Exception, key: str, root: str, endpoint: str, patience_seconds: float) -> Exception:
    """The error a user reads: what was found, what was needed, what to do. `root` is the store's address."""
    code, status, bucket = _code(error), status_of(error), root.removeprefix("s3://").partition("/")[0]
    if code == "NoSuchBucket":
        cause = f"{endpoint} has no bucket {bucket!r}; create it, or correct the address of the store"
    elif key and status == 404:
        return ObjectMissingError(f"store {root}: there is no object {key}")
    elif status in (401, 403):
        cause = (
            f"{endpoint} refused the credentials ({code}); check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or "
            f"AWS_PROFILE), and that they may use bucket {bucket!r}"
        )
    elif "Credentials" in code:
        cause = "no complete credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    elif is_transient(error):
        cause = (
            f"{endpoint} could not be reached, or kept failing, for {patience_seconds:g} s ({error}); check "
            "AWS_ENDPOINT_URL and the network, or try again later"
        )
    else:
        cause = f"{endpoint} failed on {key or 'a listing'} ({error}); check the address of the store"
    return StoreError(f"store {root}: {cause}")


def is_transient(error: Exception) -> bool:
    """Whether the same request may succeed later: cut connections, short bodies, 5xx, throttling, conflicts."""
    from botocore.exceptions import ClientError, ConnectionError, HTTPClientError, IncompleteReadError
    from s3transfer.exceptions import RetriesExceededError

    if isinstance(error, ClientError):
        return status_of(error) in _TRANSIENT_STATUSES or _code(error) in _TRANSIENT_CODES
    return isinstance(error, (ConnectionError, HTTPClientError, IncompleteReadError, RetriesExceededError))


def status_of(error: Exception) -> int:
    """HTTP status of an answer that was an error; 0 where there was no answer."""
    return int(_answer(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _code(error: Exception) -> str:
    """S3's code of an answer that was an error; the kind of error where there was no answer."""
    return str(_answer(error).get("Error", {}).get("Code", type(error).__name__))


def _answer(error: Exception) -> dict[str, Any]:
    return getattr(error, "response", None) or {}  # None where the connection was cut
