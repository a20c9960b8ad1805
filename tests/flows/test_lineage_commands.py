"""`fedpipe lineage` and `fedpipe verify` on a released run, as a user sees them."""

import json
import shutil
from pathlib import Path

from commands import Command, FinishedRun


def test_lineage_of_the_champion_names_every_hash(finished: FinishedRun, fedpipe: Command) -> None:
    outcome = fedpipe("lineage", "tiny@champion", "--json")
    assert outcome.exit_code == 0, outcome.stderr
    lineage = outcome.document
    assert lineage["adapter_sha256"] == finished.result["adapter_sha256"] == lineage["rounds"][-1]["adapter_sha256"]
    assert [entry["adapter_sha256"] for entry in lineage["rounds"]] == [
        entry["adapter_sha256"] for entry in finished.result["rounds"]
    ]
    text = fedpipe("lineage", "tiny@1").stdout
    for digest in (lineage["base_sha256"], lineage["config_sha256"], lineage["manifest_sha256"]):
        assert digest in text
    assert all(update["sha256"] in text for entry in lineage["rounds"] for update in entry["accepted"].values())


def test_champion_is_verified(finished: FinishedRun, fedpipe: Command) -> None:
    outcome = fedpipe("verify", "tiny@champion", "--json")
    assert outcome.exit_code == 0, outcome.stderr
    assert outcome.document["verified"]
    assert outcome.document["adapter_sha256"] == finished.result["adapter_sha256"]
    assert "round 2: 3 updates lead to" in fedpipe("verify", "tiny@champion", "--rounds", "1").stdout


def test_altered_run_fails_verification_and_the_object_is_named(
    finished: FinishedRun, fedpipe: Command, tmp_path: Path
) -> None:
    store = shutil.copytree(finished.store.parent, tmp_path / "store")
    record = store / "first" / "rounds" / "0001" / "updates" / "east.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"num_examples": 1}))
    outcome = fedpipe("verify", "tiny@champion", "--store", store)
    assert outcome.exit_code == 1
    assert "FAULT first/rounds/0001/updates/east.json was altered" in outcome.stdout
    assert "NOT verified, 1 fault" in outcome.stdout


def test_unknown_version_is_one_sentence(finished: FinishedRun, fedpipe: Command) -> None:
    outcome = fedpipe("lineage", "tiny@99")
    assert outcome.exit_code == 1
    assert "has no tiny@99; registered under 'tiny': versions" in outcome.stderr
