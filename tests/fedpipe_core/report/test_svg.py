import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpipe_core.report.svg import Scale, element, padded, tick_step


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
@settings(deadline=None, max_examples=50)
def test_ticks_lie_inside_the_range_and_are_few(low: float, span: float) -> None:
    scale = Scale(low, low + span, 0, 100)
    ticks = scale.ticks(5)
    assert 1 <= len(ticks) <= 11
    assert all(-1e-3 <= scale(tick) <= 100 + 1e-3 for tick in ticks)


@pytest.mark.parametrize(("span", "step"), [(1.0, 0.25), (9, 2.5), (40, 10), (0.07, 0.02)])
def test_steps_are_round(span: float, step: float) -> None:
    assert tick_step(span, 4) == pytest.approx(step)


def test_equal_values_have_a_range() -> None:
    low, high = padded([3.0, 3.0])
    assert low < 3 < high
    assert padded([0.0]) == (-1.0, 1.0)


def test_what_a_name_holds_cannot_leave_its_element() -> None:
    assert element("g", {"class_": '"><b>'}, title="<script>") == (
        '<g class="&quot;&gt;&lt;b&gt;"><title>&lt;script&gt;</title></g>'
    )
