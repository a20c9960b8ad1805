"""Every failure a user can meet, as one tree.

FedPipeError
├── InputError            the input is wrong; the command exits with 2 and nothing was written over
│   ├── ConfigError           a config that does not parse or contradicts itself
│   ├── DataError             a file, column, row or label that cannot be used
│   ├── ModelError            a base model that cannot be read or adapted
│   ├── PlanError             no plan fits an edge
│   │   └── UnfitEdgesError       the same, with the reason of each edge
│   └── StoreError            a store that cannot be reached or written
└── RunError              the input was right and the run failed; the command exits with 1, the store stays resumable
    ├── ObjectMissingError    an object that is not in the store
    ├── InvalidKeyError       a key that must not name an object
    ├── UpdateRefusedError    an update that must not count
    ├── IntegrityError        bytes that are not what their record says
    │   └── SignatureError        a record that is not signed as it must be
    ├── QuorumError           fewer updates than `min_edges`
    ├── ReleaseError          an export or a registration that failed
    ├── TrackingError         MLflow could not be reached, or refused a record
    └── OrchestratorError     Prefect's API could not be reached

A message is one sentence: who, what was found, what was needed, what to do next.
"""


class FedPipeError(Exception):
    """Base of every error whose message is written for the user."""

    exit_code = 1


class InputError(FedPipeError):
    """Raised when the user's input has to change before anything can run."""

    exit_code = 2


class ConfigError(InputError):
    """Raised when a config does not parse, holds unknown keys or contradicts itself."""


class DataError(InputError):
    """Raised when a data file, column, row or label cannot be used."""


class ModelError(InputError):
    """Raised when a base model cannot be read, or has nothing to adapt."""


class PlanError(InputError):
    """Raised when an edge has no plan that fits its memory and the round's deadline."""


class UnfitEdgesError(PlanError):
    """Raised when no plan fits some edges; `reasons` has a sentence for each."""

    def __init__(self, reasons: dict[str, str]) -> None:
        super().__init__("\n".join(reasons.values()))
        self.reasons = reasons


class StoreError(InputError):
    """Raised when the object store cannot be reached, read or written."""


class RunError(FedPipeError):
    """Raised when a run fails although its input was right; the store stays resumable."""


class ObjectMissingError(RunError, KeyError):
    """Raised when the store holds no object of that key."""

    __str__ = Exception.__str__  # KeyError would print the sentence in quotes


class InvalidKeyError(RunError, ValueError):
    """Raised when a key is absolute, leaves the store, or holds characters that not every store takes."""


class UpdateRefusedError(RunError):
    """Raised when an edge's update must not count in the aggregate."""


class IntegrityError(RunError):
    """Raised when stored bytes do not match their record's hash, size, shapes or dtype."""


class SignatureError(IntegrityError):
    """Raised when a record is not signed, signed by someone else, for another place, or altered since."""


class QuorumError(RunError):
    """Raised when fewer updates than `min_edges` count in a round."""


class ReleaseError(RunError):
    """Raised when an export, its check or its registration fails."""


class TrackingError(RunError):
    """Raised when MLflow cannot be reached or refuses a record; what the store holds is unharmed."""


class OrchestratorError(RunError):
    """Raised when Prefect's API cannot be reached; what the store holds is unharmed."""
