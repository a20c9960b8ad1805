"""Wrong input ends with exit code 2 and one sentence, before anything is written."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Command, FinishedRun, Outcome
from tiny_federation import rows, write_config, write_federation, write_rows, write_writers_federation

SECONDS_TO_REFUSE = 60
NOWHERE = "127.0.0.1:9"  # the discard port, on which nothing listens


@pytest.fixture
def federation(tmp_path: Path, tracking_uri: str) -> Path:
    """Folder of a federation that could run."""
    write_federation(tmp_path)
    return tmp_path


def assert_refused(outcome: Outcome, words: str, lines: int = 1) -> None:
    """Exit code 2, nothing on stdout, and on stderr the sentence as the last of the lines that are no progress."""
    said = [line for line in outcome.stderr.splitlines() if not line.startswith("[")]
    assert outcome.exit_code == 2, outcome.stderr
    assert outcome.stdout == ""
    assert len(said) == lines, outcome.stderr
    assert said[0].startswith("fedpipe: ")
    assert words in "\n".join(said)


def assert_nothing_written(federation: Path) -> None:
    store = federation / "out" / "store"
    assert [path for path in store.rglob("*") if path.is_file() and path.name != ".fedpipe"] == []


def test_every_fault_of_a_config_is_told_at_once_with_its_place(federation: Path, fedpipe: Command) -> None:
    config = write_config(federation, **{"training.learning_speed": 1, "rounds": 0, "model.bits": [3]})
    outcome = fedpipe("run", config)
    assert_refused(outcome, "3 faults", lines=4)
    assert "training.learning_speed: unknown key" in outcome.stderr
    assert "rounds: " in outcome.stderr
    assert "model.bits.0: " in outcome.stderr
    assert_nothing_written(federation)


def missing_train_file(folder: Path) -> None:
    (folder / "north.jsonl").unlink()


def missing_test_file(folder: Path) -> None:
    (folder / "test.jsonl").unlink()


def missing_column(folder: Path) -> None:
    write_rows(folder / "north.jsonl", [{"text": "word1", "class": 1}])


def label_out_of_range(folder: Path) -> None:
    write_rows(folder / "west.jsonl", [*rows(5, seed=1), {"text": "word1", "label": 4}])


def empty_shard(folder: Path) -> None:
    (folder / "west.jsonl").write_text("", encoding="utf-8")


def model_without_weights(folder: Path) -> None:
    (folder / "model" / "model.safetensors").unlink()


def model_with_damaged_config(folder: Path) -> None:
    (folder / "model" / "config.json").write_text("{", encoding="utf-8")


def damaged_weights(folder: Path) -> None:
    weights = folder / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])


def label_without_a_name(folder: Path) -> None:
    write_rows(folder / "test.jsonl", [row for row in rows(60, seed=0) if row["label"] != 2])


FAULTS: list[tuple[Callable[[Path], None], str]] = [
    (missing_train_file, "north.jsonl does not exist, needed a local file of rows"),
    (missing_test_file, "test.jsonl does not exist, needed a local file of rows"),
    (missing_column, "has no column 'label': found 'text', 'class'"),
    (label_out_of_range, "line 6: 'label' is 4, needed an integer from 0 to 3"),
    (empty_shard, "west.jsonl holds no rows, needed at least one"),
    (model_without_weights, "has no weights; needed *.safetensors beside config.json"),
    (model_with_damaged_config, "cannot be loaded"),
    (damaged_weights, "cannot be loaded"),
    (label_without_a_name, "label 2 has no row"),
]


@pytest.mark.parametrize(("spoil", "words"), FAULTS, ids=[spoil.__name__ for spoil, _ in FAULTS])
def test_unusable_data_or_model_is_refused(
    federation: Path, fedpipe: Command, spoil: Callable[[Path], None], words: str
) -> None:
    spoil(federation)
    assert_refused(fedpipe("run", federation / "federation.yaml"), words)
    assert_nothing_written(federation)


def test_empty_shard_of_a_dealt_file_is_refused(federation: Path, fedpipe: Command) -> None:
    write_rows(federation / "all.jsonl", rows(2, seed=1))
    config = write_config(federation, **{"data.train": "all.jsonl", "data.partition": {"by": "iid"}})
    assert_refused(fedpipe("run", config), "edge 'west' gets none of the 2 rows of data.train")


def test_missing_slice_column_is_refused_before_training(federation: Path, fedpipe: Command) -> None:
    config = write_config(federation, **{"release.slice_column": "domain"})
    assert_refused(fedpipe("run", config), "has no column 'domain'")
    assert_nothing_written(federation)


@pytest.mark.parametrize("command", ["run", "plan"])
def test_gguf_of_a_classifier_is_refused_when_the_config_is_read(
    federation: Path, fedpipe: Command, command: str
) -> None:
    config = write_config(federation, **{"release.exports": ["merged", "gguf-q8_0"]})
    words = "release.exports has gguf-q8_0, which holds language models alone; name int8 or nf4 instead"
    assert_refused(fedpipe(command, config), words, lines=2)
    assert_nothing_written(federation)


@pytest.mark.parametrize("command", ["run", "plan"])
def test_gguf_of_a_base_that_it_cannot_hold_is_refused_before_training(
    tmp_path: Path, fedpipe: Command, command: str
) -> None:
    config = write_writers_federation(tmp_path / "writers", **{"release.exports": ["merged", "gguf-f16"]})
    assert_refused(fedpipe(command, config), "the tokenizer (WordLevel + WhitespaceSplit) is none that GGUF can hold")
    assert_nothing_written(tmp_path / "writers")


def test_missing_model_folder_is_refused(federation: Path, fedpipe: Command) -> None:
    config = write_config(federation, **{"model.base": "./no-model"})
    assert_refused(fedpipe("run", config), "no-model is not a folder; give a folder in Hugging Face format or a hub id")


def test_missing_config_is_refused(federation: Path, fedpipe: Command) -> None:
    assert_refused(fedpipe("run", federation / "no.yaml"), "no.yaml does not exist; give the path of a YAML file")


@pytest.mark.parametrize(
    ("override", "words", "lines"),
    [
        ("rounds", "is not KEY=VALUE, for example --set", 1),
        ("round=3", "round: unknown key", 2),
        ("name.first=x", "'first' lies inside a plain value", 1),
        ("edges.9.edge_id=x", "'9' is not an index below 3", 1),
        ("rounds=[1", "is not YAML", 1),
    ],
)
def test_bad_override_is_refused(federation: Path, fedpipe: Command, override: str, words: str, lines: int) -> None:
    assert_refused(fedpipe("run", federation / "federation.yaml", "--set", override), words, lines)


@pytest.mark.parametrize("name", ["../escape", "a/b", ".hidden", "with space"])
def test_run_name_that_cannot_name_a_folder_is_refused(federation: Path, fedpipe: Command, name: str) -> None:
    assert_refused(fedpipe("run", federation / "federation.yaml", "--run", name), "cannot name a folder of the store")
    assert_nothing_written(federation)


def test_run_name_that_exists_is_refused(finished: FinishedRun, fedpipe: Command) -> None:
    outcome = fedpipe("run", finished.folder / "federation.yaml", "--run", "first")
    assert_refused(outcome, "run first exists in")
    assert "continue it with --resume, or choose another name with --run" in outcome.stderr


def test_resuming_with_a_changed_config_names_what_changed(finished: FinishedRun, fedpipe: Command) -> None:
    changes = ("--set", "training.learning_rate=0.5", "--set", "edges.1.resources.memory_gib=9")
    outcome = fedpipe("run", finished.folder / "federation.yaml", "--run", "first", "--resume", *changes)
    assert_refused(outcome, "changed since: edges.1.resources.memory_gib, training.learning_rate")


def test_resuming_what_was_never_started_is_refused(finished: FinishedRun, fedpipe: Command) -> None:
    outcome = fedpipe("run", finished.folder / "federation.yaml", "--run", "never", "--resume")
    assert_refused(outcome, "run never is not in")


def test_resuming_needs_the_runs_name(finished: FinishedRun, fedpipe: Command) -> None:
    assert_refused(fedpipe("run", finished.folder / "federation.yaml", "--resume"), "--resume needs --run NAME")


@pytest.mark.parametrize("content", ["", "{", '{"plan": 1}'])
def test_file_that_holds_no_plan_is_refused(federation: Path, fedpipe: Command, content: str) -> None:
    plan = federation / "plan.json"
    plan.write_text(content, encoding="utf-8")
    assert_refused(fedpipe("run", federation / "federation.yaml", "--plan", plan), "plan.json holds no plan")
    assert_nothing_written(federation)


def test_plan_for_other_edges_is_refused(federation: Path, fedpipe: Command) -> None:
    plan = federation / "plan.json"
    fedpipe("plan", federation / "federation.yaml", "--save", plan)
    document = json.loads(plan.read_bytes())
    document["plan"]["edges"]["south"] = document["plan"]["edges"].pop("west")
    plan.write_text(json.dumps(document), encoding="utf-8")
    outcome = fedpipe("run", federation / "federation.yaml", "--plan", plan)
    assert_refused(outcome, "the saved plan and the config differ in edges ['south', 'west']")
    assert_nothing_written(federation)


def test_plan_that_fits_no_edge_names_the_limit_and_frees_the_runs_name(federation: Path, fedpipe: Command) -> None:
    config = write_config(federation, **{"planning.batch_sizes": [8]})
    tiny = ("--set", "edges.1.resources.memory_gib=0.0001")
    outcome = fedpipe("run", config, "--run", "tight", *tiny)
    assert_refused(outcome, "north: memory: its smallest plan needs")
    assert_nothing_written(federation)


def test_plan_command_tells_infeasible_edges_as_json(federation: Path, fedpipe: Command) -> None:
    tiny = ("--set", "edges.1.resources.memory_gib=0.0001")
    outcome = fedpipe("plan", federation / "federation.yaml", "--json", *tiny)
    assert outcome.exit_code == 2
    assert set(outcome.document) == {"run", "plan", "infeasible", "totals"}
    assert set(outcome.document["infeasible"]) == {"north"}
    assert "memory" in outcome.document["infeasible"]["north"]
    assert_nothing_written(federation)


def test_failure_as_json_is_one_object_on_stdout(federation: Path, fedpipe: Command) -> None:
    missing_test_file(federation)
    outcome = fedpipe("run", federation / "federation.yaml", "--json")
    assert (outcome.exit_code, outcome.document["status"]) == (2, "failed")
    assert "does not exist" in outcome.document["error"]


def test_store_that_cannot_be_made_is_refused(federation: Path, fedpipe: Command) -> None:
    (federation / "file").write_text("", encoding="utf-8")
    outcome = fedpipe("run", federation / "federation.yaml", "--set", f"store={federation / 'file' / 'store'}")
    assert_refused(outcome, "choose a folder that can be, on a disk with room left")


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only to root")
def test_store_that_cannot_be_written_is_refused(federation: Path, fedpipe: Command) -> None:
    (federation / "out").mkdir(mode=0o500)
    assert_refused(fedpipe("run", federation / "federation.yaml"), "cannot be read or written (Permission denied)")


def test_missing_bucket_is_refused(federation: Path, fedpipe: Command, s3_root: str) -> None:
    outcome = fedpipe("run", federation / "federation.yaml", "--set", "store=s3://no-such-bucket/runs")
    assert_refused(outcome, "has no bucket 'no-such-bucket'; create it, or correct the address of the store")


def test_unreachable_endpoint_is_refused(
    federation: Path, fedpipe: Command, s3_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{NOWHERE}")
    outcome = fedpipe("run", federation / "federation.yaml", "--set", f"store={s3_root}")
    assert_refused(outcome, "check AWS_ENDPOINT_URL and the network")


def test_refused_credentials_are_told(federation: Path, fedpipe: Command, s3_root: str, s3_proxy: object) -> None:
    s3_proxy.faults = iter(["deny"] * 50)  # type: ignore[attr-defined]
    outcome = fedpipe("run", federation / "federation.yaml", "--set", f"store={s3_root}")
    assert_refused(outcome, "refused the credentials (InvalidAccessKeyId)")


def test_missing_credentials_are_told(
    federation: Path, fedpipe: Command, s3_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    outcome = fedpipe("run", federation / "federation.yaml", "--set", f"store={s3_root}")
    assert_refused(outcome, "no complete credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")


def said_by(outcome: Outcome) -> list[str]:
    return [line for line in outcome.stderr.splitlines() if not line.startswith("[")]


def test_unreachable_mlflow_is_one_sentence_and_the_run_goes_on_later(
    federation: Path, fedpipe_process: Command
) -> None:
    config = federation / "federation.yaml"
    outcome = fedpipe_process("run", config, "--run", "untracked", MLFLOW_TRACKING_URI=f"http://{NOWHERE}")
    assert outcome.exit_code == 1
    assert len(said_by(outcome)) == 1, outcome.stderr
    assert f"fedpipe: MLflow at http://{NOWHERE} did not answer or refused" in outcome.stderr
    resumed = fedpipe_process("run", config, "--run", "untracked", "--resume", "--no-release", "--json")
    assert resumed.exit_code == 0, resumed.stderr
    assert resumed.document["status"] == "completed"


def test_unreachable_prefect_is_one_sentence(federation: Path, fedpipe_process: Command) -> None:
    outcome = fedpipe_process("run", federation / "federation.yaml", PREFECT_API_URL=f"http://{NOWHERE}/api")
    assert outcome.exit_code == 1
    assert len(said_by(outcome)) == 1, outcome.stderr
    assert f"fedpipe: Prefect at http://{NOWHERE}/api does not answer" in outcome.stderr
    assert_nothing_written(federation)
