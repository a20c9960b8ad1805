"""The environment in which the peers run: their own packages with the torch, transformers and peft that FedPipe has.

Made once, under `.fedpipe/` of the checkout, and made anew when a version below changes.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
APPS = Path(__file__).parent / "apps"
CACHE = ROOT / ".fedpipe" / "benchmarks"
PEERS = ("flwr[simulation]==1.41.0", "nvflare==2.9.0")
# What `fedpipe_core` imports, in the versions of constraints.txt; torch first, alone, so that nothing else picks it.
SHARED = (
    *("transformers", "peft", "bitsandbytes", "accelerate", "numpy", "safetensors", "scipy", "pyarrow", "pyyaml"),
    *("sacrebleu", "rouge-score", "cryptography"),
)
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCHDYNAMO_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
LEFT_OUT = ("MLFLOW_TRACKING_URI", "FEDPIPE_STORE", "PREFECT_API_URL", "PYTHONPATH")


def peers_bin() -> Path:
    """Folder of the peers' programs; the environment is built first where it is missing or of other versions."""
    folder = CACHE / "peers-venv"
    wanted = "\n".join((*PEERS, *SHARED, sys.version, (ROOT / "constraints.txt").read_text()))
    stamp = folder / "built-for"
    if not stamp.is_file() or stamp.read_text() != wanted:
        _build(folder)
        stamp.write_text(wanted)
    return folder / "bin"


def _build(folder: Path) -> None:
    print(f"building the peers' environment in {folder}", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    install = [folder / "bin" / "pip", "install", "-qqq", "--disable-pip-version-check"]
    constraints = ["-c", ROOT / "constraints.txt"]
    (torch,) = (line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    subprocess.run([*install, torch], check=True)
    subprocess.run([*install, *constraints, *SHARED], check=True)
    subprocess.run([*install, *PEERS], check=True)


def environment(folder: Path, job: Path, **more: str) -> dict[str, str]:
    """Environment variables of every process of one run in `folder`, of whichever system."""
    kept = {name: value for name, value in os.environ.items() if name not in LEFT_OUT}
    return {
        **kept,
        **QUIET,
        "EQUAL_JOB": str(job),
        "EQUAL_JOB_MARKS": str(folder / "marks.jsonl"),
        "EQUAL_JOB_RESULT": str(folder / "adapter.safetensors"),
        **more,
    }


def peers_environment(folder: Path, job: Path, **more: str) -> dict[str, str]:
    """The same for a peer: its programs come first, and it can import `equal_job` and `fedpipe_core` and no more."""
    library = folder / "lib"
    library.mkdir()
    for path in (ROOT / "fedpipe_core", APPS / "equal_job.py"):
        (library / path.name).symlink_to(path)
    path = f"{peers_bin()}{os.pathsep}{os.environ['PATH']}"
    return environment(folder, job, PATH=path, PYTHONPATH=str(library), **more)
