"""What `examples/` holds is what the code accepts today."""

from pathlib import Path

import pytest

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
