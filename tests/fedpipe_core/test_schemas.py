import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedpipe_core.plan_schemas import EdgePlan, FederationPlan, PredictedCost
from fedpipe_core.profile_schemas import ModelShape, ModuleShape
from fedpipe_core.schemas import DataReference, Record, RoundRecord, UpdateRecord

NAMES = st.from_regex(r"[a-z][a-z0-9._-]{0,20}", fullmatch=True)
HASHES = st.from_regex(r"[0-9a-f]{64}", fullmatch=True)
COUNTS = st.integers(0, 2**62)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
SECONDS = st.floats(0, 1e9)

REFERENCES = st.builds(DataReference, key=NAMES, sha256=HASHES, size_bytes=COUNTS)
UPDATES = st.builds(
    UpdateRecord,
    run=NAMES,
    round=st.integers(1, 10000),
    edge_id=NAMES,
    base_sha256=HASHES,
    global_sha256=HASHES,
    adapter=REFERENCES,
    num_examples=st.integers(1, 2**40),
    examples_processed=COUNTS,
    steps=COUNTS,
    train_loss=NUMBERS,
    train_seconds=SECONDS,
    round_seconds=SECONDS,
    download_bytes=COUNTS,
    metrics=st.dictionaries(NAMES, NUMBERS, max_size=3),
)
COSTS = st.builds(
    PredictedCost, peak_memory_bytes=COUNTS, round_seconds=SECONDS, upload_bytes=COUNTS, download_bytes=COUNTS
)
PLANS = st.builds(
    EdgePlan,
    edge_id=NAMES,
    ranks=st.dictionaries(NAMES, st.integers(1, 64), min_size=1, max_size=4),
    batch_size=st.integers(1, 512),
    local_steps=st.integers(1, 10**6),
    base_bits=st.sampled_from([4, 8, 16, 32]),
    predicted=COSTS,
    binding=NAMES,
)
FEDERATIONS = st.builds(
    FederationPlan,
    round_seconds=st.floats(1e-6, 1e9),
    solver=NAMES,
    edges=st.dictionaries(NAMES, PLANS, min_size=1, max_size=3),
)


def plan(edge_id: str, **ranks: int) -> EdgePlan:
    cost = PredictedCost(peak_memory_bytes=1, round_seconds=1.0, upload_bytes=1, download_bytes=1)
    return EdgePlan(
        edge_id=edge_id, ranks=ranks, batch_size=8, local_steps=1, base_bits=32, predicted=cost, binding="menu"
    )


@given(record=st.one_of(UPDATES, FEDERATIONS))
@settings(deadline=None, max_examples=50)
def test_record_survives_json_byte_for_byte(record: Record) -> None:
    text = record.model_dump_json(indent=1)
    again = type(record).model_validate_json(text)
    assert again == record
    assert again.model_dump_json(indent=1) == text


@given(record=UPDATES)
@settings(deadline=None, max_examples=20)
def test_record_of_another_version_is_refused(record: UpdateRecord) -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        UpdateRecord.model_validate({**record.model_dump(), "novelty": 1})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("field", ["train_loss", "train_seconds", "metrics"])
def test_update_holds_only_finite_numbers(field: str, value: float) -> None:
    found = {"accuracy": value} if field == "metrics" else value
    reference = {"key": "a", "sha256": "0" * 64, "size_bytes": 1}
    document = {
        **dict.fromkeys(("run", "edge_id", "base_sha256", "global_sha256"), "x"),
        **dict.fromkeys(("round", "num_examples", "examples_processed", "steps", "download_bytes"), 1),
        **dict.fromkeys(("train_loss", "train_seconds", "round_seconds"), 1.0),
        "adapter": reference,
    }
    assert UpdateRecord.model_validate(document).steps == 1
    with pytest.raises(ValidationError, match="finite number"):
        UpdateRecord.model_validate({**document, field: found})


@pytest.mark.parametrize("sha256", ["", "0" * 63, "G" * 64, "A" * 64])
def test_reference_needs_a_whole_hash(sha256: str) -> None:
    with pytest.raises(ValidationError, match="sha256"):
        DataReference(key="a", sha256=sha256, size_bytes=1)


def test_records_are_frozen() -> None:
    reference = DataReference(key="a", sha256="0" * 64, size_bytes=1)
    with pytest.raises(ValidationError, match="frozen"):
        reference.key = "b"  # type: ignore[misc]


def test_plan_knows_the_modules_any_edge_trains_and_the_largest_rank() -> None:
    edges = {"east": plan("east", query=2, value=8), "west": plan("west", key=4)}
    federation = FederationPlan(round_seconds=1.0, solver="greedy", edges=edges)
    assert federation.planned_modules == ["key", "query", "value"]
    assert federation.largest_rank == 8


def test_shape_counts_blocks_from_the_input() -> None:
    modules = {name: ModuleShape(out_features=2, in_features=2, layer=layer) for name, layer in (("a", 0), ("b", 5))}
    shape = {"linear_parameters": 8, "other_parameters": 0, "head_parameters": 1, "output_features": 2}
    assert ModelShape(modules=modules, scored_positions="example", **shape).num_blocks == 6
    assert ModelShape(modules={}, scored_positions="example", **shape).num_blocks == 1


def test_round_may_lack_what_no_edge_returned() -> None:
    record = RoundRecord(
        round=1,
        participants=[],
        dropped={"east": "no answer"},
        seconds=1.0,
        train_seconds={},
        upload_bytes=0,
        download_bytes=0,
        metrics={},
        adapter_sha256="0" * 64,
    )
    assert record.train_loss == record.edge_metrics == record.simulated_seconds == {}
