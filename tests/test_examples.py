"""What `examples/` holds is what the code accepts today."""

import os
from pathlib import Path

import pytest
from commands import run_to_end

from fedpipe_core.config_file import load_config
from fedpipe_core.reference import render_reference

EXAMPLES = Path(__file__).parent.parent / "examples"
CONFIGS = sorted(path for path in EXAMPLES.rglob("*.yaml"))


def test_committed_reference_is_what_the_code_renders() -> None:
    written = (EXAMPLES / "reference.yaml").read_text(encoding="utf-8")
    assert written == render_reference(), "run `fedpipe schema --yaml > examples/reference.yaml`"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_example_loads_and_names_data_that_is_there(path: Path) -> None:
    config = load_config(path)
    for edge in config.edges:
        assert Path(config.data.train.replace("{edge_id}", edge.edge_id)).is_file()
    assert Path(config.data.test).is_file()


@pytest.mark.slow
def test_language_model_example_trains_writes_and_is_judged(tmp_path: Path) -> None:
    little = {
        "rounds": 1,
        "training.examples_per_round": 64,
        "planning.profile_steps": 5,
        "evaluation.examples_per_round": 16,
        "evaluation.generate.examples": 4,
    }
    changes = [word for key, value in little.items() for word in ("--set", f"{key}={value}")]
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path / "prefect")}
    arguments = ("run", EXAMPLES / "e2e" / "federation.yaml", *changes, "--no-release", "--json")
    outcome = run_to_end(environment, tmp_path, *arguments)
    assert outcome.exit_code == 0, outcome.stderr
    before, after = (outcome.document[name] for name in ("baseline_metrics", "metrics"))
    assert {"loss", "perplexity", "token_accuracy", "bleu", "chrf"} <= set(after)
    assert after["loss"] < before["loss"]
