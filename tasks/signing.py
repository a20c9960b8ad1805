"""The coordinator's private key: a file on its machine, named by an environment variable and never by a config."""

import os
from pathlib import Path

from fedpipe_core.config import FederationConfig
from fedpipe_core.errors import ConfigError
from fedpipe_core.signatures import SigningKey, load_key

SIGNING_KEY_VARIABLE = "FEDPIPE_SIGNING_KEY"


def signing_key(config: FederationConfig) -> SigningKey | None:
    """The private key that FEDPIPE_SIGNING_KEY names, None where nobody signs.

    Raises ConfigError when it is missing, or not the one the config lists.
    """
    if config.coordinator_signs is None:
        return None
    path = os.environ.get(SIGNING_KEY_VARIABLE)
    found = None if path is None else load_key(Path(path)).public
    if path is None or found != config.coordinator_signs:
        raise ConfigError(
            f"signing.coordinator_key is {config.coordinator_signs}, and {SIGNING_KEY_VARIABLE} names "
            f"{'no file' if path is None else f'{path} with {found}'}; set it to the file of the private key"
        )
    return load_key(Path(path))
