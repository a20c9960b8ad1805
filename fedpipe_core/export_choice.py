"""Which exports are written: those named in the config, and for `auto` the best one that every edge's memory holds.

Importing this module imports no torch.
"""

from collections.abc import Mapping

from fedpipe_core.config import ReleaseSpec
from fedpipe_core.costs import BASE_BYTES
from fedpipe_core.profile_schemas import EdgeProfile, ModelShape

AUTO = "auto"
DTYPE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
WORKING_SHARE = 0.25  # of the weights, on top of them: activations of a small batch and copies while loading
_BY_QUALITY = ("merged", "int8", "nf4")


def choose_exports(spec: ReleaseSpec, shape: ModelShape, profiles: Mapping[str, EdgeProfile]) -> dict[str, list[str]]:
    """The schemes to write, in order, with the edges that `auto` chose each for."""
    chosen: dict[str, list[str]] = {scheme: [] for scheme in spec.exports if scheme != AUTO}
    if AUTO in spec.exports:
        for edge_id, profile in profiles.items():
            chosen.setdefault(scheme_for(spec, shape, profile), []).append(edge_id)
    return chosen


def scheme_for(spec: ReleaseSpec, shape: ModelShape, profile: EdgeProfile) -> str:
    """The export of the best quality that fits an edge's memory; NF4, the smallest, where none does."""
    free = profile.memory_bytes - profile.fixed_bytes
    fitting = (scheme for scheme in _BY_QUALITY if serving_bytes(spec, shape, scheme) <= free)
    return next(fitting, _BY_QUALITY[-1])


def serving_bytes(spec: ReleaseSpec, shape: ModelShape, scheme: str) -> float:
    """Memory that serving takes: Σ parameters · bytes, and a quarter more to work in. Only the blocks are quantized."""
    dense = DTYPE_BYTES[spec.dtype]
    blocks = {"merged": dense, "int8": BASE_BYTES[8], "nf4": BASE_BYTES[4]}[scheme]
    kept = shape.other_parameters + shape.head_parameters
    outside = dense if scheme == "merged" else 4
    return (1 + WORKING_SHARE) * (shape.linear_parameters * blocks + kept * outside)
