"""What a process is spared at its start and end, seen from a process of its own."""

import subprocess
import sys

COMPILER = "torch._inductor.compile_fx"


def said(program: str) -> str:
    """What a program prints in a fresh interpreter in which compiling is turned off."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"TORCHDYNAMO_DISABLE": "1", "PATH": "", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_libraries_are_imported_and_kept_from_the_collector_without_the_compiler() -> None:
    program = f"""
import gc, sys
from fedpipe_core.startup import import_libraries
import_libraries()
print(gc.isenabled(), gc.get_freeze_count() > 100_000, "bitsandbytes" in sys.modules, {COMPILER!r} in sys.modules)
"""
    assert said(program) == "True True True False"


def test_edges_flow_is_looked_up_without_torch() -> None:
    assert said("import sys, flows.edge; print('torch' in sys.modules)") == "False"


def test_edge_of_declared_resources_needs_no_solver() -> None:
    assert said("import sys, tasks.served_edge; print('scipy' in sys.modules)") == "False"
