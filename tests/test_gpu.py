"""`benchmarks/gpu.py` at a small shape anywhere, and at 8 B parameters where there is a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent


def benchmark(*options: str) -> dict[str, Any]:
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--json", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_four_bit_llama_trains_within_the_memory_that_was_foretold() -> None:
    sizes = ("--batch-size", "4", "--tokens", "256", "--steps", "1", "--turns", "1", "--round-steps", "1")
    found = benchmark("--quick", *sizes)
    speed, memory, rest = found["checks"]
    assert memory["ok"], memory
    assert speed["value"] > 0
    assert 0 < rest["value"] < 1


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_eight_billion_parameters_train_as_fast_as_a_plain_loop_within_foretold_memory() -> None:
    assert [check for check in benchmark()["checks"] if not check["ok"]] == []
