import pytest
from planning_cases import large_decoder, make_profile

from fedpipe_core.config import ReleaseSpec
from fedpipe_core.export_choice import choose_exports, scheme_for, serving_bytes

GIB = 2**30
SHAPE = large_decoder()
SPEC = ReleaseSpec(exports=("merged", "auto"), dtype="bf16")


def memory_for(scheme: str) -> int:
    return round(serving_bytes(SPEC, SHAPE, scheme)) + 1


@pytest.mark.parametrize("scheme", ["merged", "int8", "nf4"])
def test_edge_gets_the_best_export_that_its_memory_holds(scheme: str) -> None:
    profile = make_profile(SHAPE, memory_bytes=memory_for(scheme))
    assert scheme_for(SPEC, SHAPE, profile.model_copy(update={"fixed_bytes": 0})) == scheme


def test_edge_that_holds_none_gets_the_smallest() -> None:
    assert scheme_for(SPEC, SHAPE, make_profile(SHAPE, memory_bytes=2**20)) == "nf4"


def test_auto_adds_what_the_edges_need_to_what_is_named() -> None:
    profiles = {
        "large": make_profile(SHAPE, memory_bytes=2 * memory_for("merged")),
        "small": make_profile(SHAPE, memory_bytes=2**20),
    }
    assert choose_exports(SPEC, SHAPE, profiles) == {"merged": ["large"], "nf4": ["small"]}
    named = SPEC.model_copy(update={"exports": ("adapter", "merged")})
    assert choose_exports(named, SHAPE, profiles) == {"adapter": [], "merged": []}
