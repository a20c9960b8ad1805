"""Turns what a random choice belongs to into its seed.

Decides that every choice has a stream of its own, named by values such as (seed, round, edge_id). No choice depends on
how many others came before it, so edges may run in any order and a resumed run draws what the killed one would have.
"""

import hashlib
import json

import numpy as np


def derive_seed(*parts: int | str) -> int:
    """The first 63 bits of the parts' SHA-256: the same on every machine and in every process, unlike `hash()`."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def random_generator(*parts: int | str) -> np.random.Generator:
    """A NumPy generator seeded by `derive_seed(*parts)`."""
    return np.random.default_rng(derive_seed(*parts))


def drawn(purpose: str, rows: int, wanted: int | None, seed: int) -> list[int]:
    """Indices of `wanted` rows drawn by seed, or of all, in rising order."""
    if wanted is None or wanted >= rows:
        return list(range(rows))
    return sorted(random_generator(purpose, seed).permutation(rows)[:wanted].tolist())
