"""What the projection of a large fleet adds up."""

from pathlib import Path

import pytest

from fedpipe_core.config_remote import RemoteSpec
from fedpipe_core.plan_schemas import EdgePlan, FederationPlan, PredictedCost

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
MIB = 2**20


def edge_plan(seconds: float, upload_bytes: int) -> EdgePlan:
    costs = PredictedCost(
        peak_memory_bytes=1, round_seconds=seconds, upload_bytes=upload_bytes, download_bytes=2 * upload_bytes
    )
    return EdgePlan(
        edge_id="edge", ranks={"m": 1}, batch_size=1, local_steps=1, base_bits=4, predicted=costs, binding="data"
    )


@pytest.fixture
def projection(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import projection

    return projection


def test_shape_is_that_of_eight_billion_parameters(projection):
    shape = projection.llama_8b()
    assert (len(shape.modules), shape.num_blocks) == (224, 32)
    assert shape.linear_parameters + shape.other_parameters == 8_030_261_248  # Llama 3.1 8B


def test_traffic_grows_with_the_fleet_and_falls_with_patience(projection):
    edges = {f"edge-{i}": edge_plan(100.0, 20 * MIB) for i in range(projection.PLANNED)}
    plan = FederationPlan(round_seconds=100.0, edges=edges, solver="greedy")
    few, many = (projection.traffic(plan, count, RemoteSpec()) for count in (100, 1000))
    patient = projection.traffic(plan, 100, RemoteSpec(poll_seconds=10, lease_seconds=200))
    assert few.puts == pytest.approx(100 * (100 / 5 + 1 + 2))  # leases, a record, and an update in two parts
    assert (many.puts, many.up_gib) == pytest.approx((10 * few.puts, 10 * few.up_gib))
    assert few.down_gib == pytest.approx(2 * few.up_gib)
    assert patient.gets < few.gets / 4
    assert patient.dollars < few.dollars
