"""What ranks are worth."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning_cases import make_profile, tiny_model

from fedpipe_core.planning_utility import edge_utilities, extend_scores

SHAPE = tiny_model()
MODULES = tuple(SHAPE.modules)


def scored(edge_id, num_examples, **scores):
    values = {name.replace("_", "."): value for name, value in scores.items()}
    return make_profile(SHAPE, edge_id, num_examples=num_examples, scores=values)


def test_all_modules_at_the_largest_rank_are_worth_one():
    profiles = {e: make_profile(SHAPE, e, seed=i) for i, e in enumerate(("a", "b"))}
    for table in edge_utilities(profiles, MODULES, (2, 4, 8)).values():
        assert table[:, -1].sum() == pytest.approx(1.0)


def test_scale_of_an_edge_does_not_matter():
    profile = make_profile(SHAPE, "a")
    louder = profile.model_copy(update={"scores": {m: [7.0 * s for s in v] for m, v in profile.scores.items()}})
    plain, loud = (edge_utilities({"a": p}, MODULES, (2, 8))["a"] for p in (profile, louder))
    np.testing.assert_allclose(plain, loud)


def test_an_edge_leans_to_its_own_scores_and_the_mean_weighs_edges_by_examples():
    large = scored("large", 300, layer_0_in=[1.0])
    small = scored("small", 100, layer_1_in=[1.0])
    tables = edge_utilities({"large": large, "small": small}, MODULES, (1,))
    first, second = MODULES.index("layer.0.in"), MODULES.index("layer.1.in")
    assert tables["large"][[first, second], 0] == pytest.approx([0.5 + 0.5 * 0.75, 0.5 * 0.25])
    assert tables["small"][[first, second], 0] == pytest.approx([0.5 * 0.75, 0.5 + 0.5 * 0.25])


def test_ranks_beyond_the_probe_keep_falling_at_its_mean_ratio():
    np.testing.assert_allclose(extend_scores([8.0, 4.0, 2.0], 5), [8, 4, 2, 1, 0.5])


def test_flat_scores_fall_beyond_the_probe():
    np.testing.assert_allclose(extend_scores([1.0, 1.0], 4), [1, 1, 0.9, 0.81])


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0, 1e6), max_size=10), st.integers(1, 20))
def test_extended_scores_never_rise_and_never_go_below_zero(scores, length):
    extended = extend_scores(scores, length)
    assert len(extended) == length
    assert (np.diff(extended) <= 0).all()
    assert (extended >= 0).all()
