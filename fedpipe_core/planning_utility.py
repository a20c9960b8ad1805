"""What a rank is worth: edges' importance scores made comparable, combined, and extended to ranks nobody probed.

Pure arithmetic on the profiles; what a rank costs is `costs`, which ranks are taken is `planning`.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedpipe_core.profile_schemas import EdgeProfile

FloatArray = NDArray[np.float64]
OWN_SHARE = 0.5  # of an edge's utility comes from its own scores, the rest from the federation's mean
# At 1 rounds of a small language model are half as long again as at ¼: importance lies evenly over its blocks, and what
# a round teaches does not.
WORTH_EXPONENT = 0.25
LARGEST_TAIL_RATIO = 0.9  # nothing measured supports a rank beyond the probe being worth as much as the one before


def edge_utilities(
    profiles: Mapping[str, EdgeProfile], modules: Sequence[str], ranks: Sequence[int]
) -> dict[str, FloatArray]:
    """Per edge the utility of each module at each rank, shape (modules, ranks); all modules at the last rank make 1.

    utility_k(m, r) = Σ_{i≤r} (½·s_k(m, i) + ½·Σ_j w_j·s_j(m, i)), with each edge's scores s_j divided by their sum
    (losses and bit widths differ between edges) and w_j its share of the examples. An edge's own scores tell what its
    data needs; the mean is the less noisy one, and what the aggregate, which everyone receives, will be made of.
    """
    own = {edge_id: _score_table(profile, modules, max(ranks)) for edge_id, profile in profiles.items()}
    total = sum(profile.num_examples for profile in profiles.values())
    mean = sum((own[e] * (profile.num_examples / total) for e, profile in profiles.items()), np.zeros(()))
    columns = np.asarray(ranks) - 1
    return {e: np.cumsum(OWN_SHARE * own[e] + (1 - OWN_SHARE) * mean, axis=1)[:, columns] for e in profiles}


def net_of_price(utility: FloatArray, features: FloatArray, ranks: Sequence[int], price: float) -> FloatArray:
    """Utility (modules, ranks) less `price` × the share of the menu's adapter parameters, r·(out + in) per module.

    Both shares are 1 for all modules at the last rank. What a price takes away is nothing like the first ranks of an
    important module, and more than a late rank of an unimportant one is worth.
    """
    parameters = features[:, None] * np.asarray(ranks, dtype=np.float64)
    net: FloatArray = utility - price * parameters / parameters[:, -1].sum()
    return net


def worth(utility: ArrayLike) -> FloatArray:
    """What a whole plan's utility counts for against examples: its fourth root, so that its first part counts most."""
    return np.maximum(np.asarray(utility, dtype=np.float64), 0.0) ** WORTH_EXPONENT


def extend_scores(scores: Sequence[float], length: int) -> FloatArray:
    """Scores of ranks 1 … length, never rising.

    Beyond the probed ranks they fall geometrically at the mean ratio of the probed ones, 0.9 at most.
    """
    probed = np.minimum.accumulate(np.asarray(scores[:length], dtype=np.float64))
    if not len(probed) or probed[0] <= 0:
        return np.zeros(length)
    ratio = (probed[-1] / probed[0]) ** (1 / max(1, len(probed) - 1))
    tail = probed[-1] * min(ratio, LARGEST_TAIL_RATIO) ** np.arange(1, length - len(probed) + 1)
    return np.concatenate([probed, tail])


def _score_table(profile: EdgeProfile, modules: Sequence[str], length: int) -> FloatArray:
    table = np.stack([extend_scores(profile.scores.get(module, []), length) for module in modules])
    if table.sum() <= 0:  # an edge without any signal prefers no module: only cost decides
        table = np.tile(LARGEST_TAIL_RATIO ** np.arange(length), (len(modules), 1))
    normalized: FloatArray = table / table.sum()
    return normalized
