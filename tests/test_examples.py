"""What `examples/` holds is what the code accepts today."""

import gzip
import os
from itertools import islice
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
def test_language_model_example_trains_writes_and_is_released_for_llama_cpp_too(tmp_path: Path) -> None:
    with gzip.open(EXAMPLES / "e2e" / "data" / "test.jsonl.gz", "rt", encoding="utf-8") as whole:
        (tmp_path / "test.jsonl").write_text("".join(islice(whole, 24)), encoding="utf-8")
    little = {
        "rounds": 1,
        "training.examples_per_round": 32,
        "planning.profile_steps": 5,
        "evaluation.examples_per_round": 16,
        "evaluation.generate.examples": 2,
        "evaluation.generate.max_new_tokens": 16,
        "data.test": tmp_path / "test.jsonl",
        "release.exports": '["merged","gguf-f16","gguf-q8_0"]',
    }
    changes = [word for key, value in little.items() for word in ("--set", f"{key}={value}")]
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path / "prefect")}
    outcome = run_to_end(environment, tmp_path, "run", EXAMPLES / "e2e" / "federation.yaml", *changes, "--json")
    assert outcome.exit_code == 0, outcome.stderr
    before, after = (outcome.document[name] for name in ("baseline_metrics", "metrics"))
    assert {"loss", "perplexity", "token_accuracy", "bleu", "chrf"} <= set(after)
    assert after["loss"] < before["loss"]
    exports = {entry["scheme"]: entry for entry in outcome.document["exports"]}
    assert list(exports) == ["merged", "gguf-f16", "gguf-q8_0"]
    for entry in exports.values():
        assert entry["kept"], entry["reason"]
        assert abs(entry["loss_increase"]) < 0.01
        assert entry["agreement"] > 0.97
        assert entry["latency"]["pairs"] > 0
    q8_0, f16, merged = (exports[scheme]["bytes"] for scheme in ("gguf-q8_0", "gguf-f16", "merged"))
    assert q8_0 < 0.6 * f16 < 0.4 * merged
    assert (tmp_path / exports["gguf-q8_0"]["path"] / "model.gguf").stat().st_size == q8_0
