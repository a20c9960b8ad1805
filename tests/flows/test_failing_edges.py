"""An edge whose training leaves the finite numbers is dropped; the run goes on while enough edges are left."""

import json
from pathlib import Path

import pytest
from commands import Command
from safetensors.torch import load_file, save_file
from tiny_federation import rows, write_config, write_federation, write_rows

UNKNOWN_WORD = 1  # the token id of whatever the vocabulary lacks
REASON = "loss became nan at step 1; check this edge's data, or lower training.learning_rate"


@pytest.fixture
def poisoned(tmp_path: Path) -> Path:
    """A federation whose edge west holds a word at which the base overflows."""
    write_federation(tmp_path, **{"planning.importance": "uniform"})
    weights = tmp_path / "model" / "model.safetensors"
    tensors = load_file(weights)
    tensors["bert.embeddings.word_embeddings.weight"][UNKNOWN_WORD] = 3e38
    save_file(tensors, weights, metadata={"format": "pt"})
    write_rows(tmp_path / "west.jsonl", [{**row, "text": row["text"] + " strange"} for row in rows(60, seed=3)])
    return tmp_path


def test_edge_with_a_nan_loss_is_dropped_with_the_reason(poisoned: Path, fedpipe: Command) -> None:
    outcome = fedpipe("run", poisoned / "federation.yaml", "--run", "nan", "--set", "name=nan", "--json")
    assert outcome.exit_code == 0, outcome.stderr
    for entry in outcome.document["rounds"]:
        assert entry["participants"] == ["east", "north"]
        assert entry["dropped"] == {"west": REASON}
    record = json.loads((poisoned / "out/store/nan/rounds/0002/round.json").read_bytes())
    assert record["dropped"] == {"west": REASON}
    assert outcome.document["plan"]["west"]["measured"] is None
    assert f"west returns no update from round 1: {REASON}" in outcome.stderr


def test_too_few_edges_end_the_run_resumably(poisoned: Path, fedpipe: Command) -> None:
    config = write_config(poisoned, **{"planning.importance": "uniform", "min_edges": 3})
    run = ("run", config, "--run", "short", "--no-release")
    outcome = fedpipe(*run)
    said = [line for line in outcome.stderr.splitlines() if not line.startswith("[")]
    assert (outcome.exit_code, outcome.stdout) == (1, "")
    assert said == [
        f"fedpipe: round 1 has 2 updates that count, min_edges is 3; west: {REASON}; "
        "mend these edges and continue with --resume"
    ]
    kept = {path: path.read_bytes() for path in (poisoned / "out/store/short/rounds/0001/updates").iterdir()}
    assert {path.name for path in kept} == {
        f"{e}.{suffix}" for e in ("east", "north") for suffix in ("json", "safetensors")
    }
    write_rows(poisoned / "west.jsonl", rows(60, seed=3))
    resumed = fedpipe(*run, "--resume", "--json")
    assert resumed.exit_code == 0, resumed.stderr
    assert [entry["participants"] for entry in resumed.document["rounds"]] == [["east", "north", "west"]] * 2
    assert {path: path.read_bytes() for path in kept} == kept
