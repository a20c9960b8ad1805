"""The same federated job by FedPipe, Flower, NVFlare and a plain loop, side by side.

Run `python benchmarks/deployed.py [--json] [--only NAME ...] [--turns N]`. Every system trains the same adapter on the
same batches with the same function (`peers/apps/equal_job.py`), so all must end at the same loss, and what differs is
what the systems cost. With more than one turn the systems alternate, and medians are told. Peers are installed from the
package index into an environment of their own, once. Linux alone.

Simulators start with nothing running and are timed from process start to end. Deployed systems are timed from the start
of their services (servers, edges) to the result; `job s` is the part from services that wait to the result.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from common import Check, at_most, finish, markdown_table, parser
from peers.environment import ROOT
from peers.fedpipe_systems import fedpipe_deployed, fedpipe_local, set_up
from peers.make_job import job_folder
from peers.systems import Place, flower_deployed, flower_simulation, nvflare_poc, nvflare_simulator, plain_loop
from peers.usage import watching

RESULTS = Path(__file__).parent / "results" / "deployed.json"
SYSTEMS = {
    "plain-loop": plain_loop,
    "fedpipe-local": fedpipe_local,
    "flower-simulation": flower_simulation,
    "nvflare-simulator": nvflare_simulator,
    "fedpipe-deployed": fedpipe_deployed,
    "nvflare-poc": nvflare_poc,
    "flower-deployed": flower_deployed,
}
MOST_LOCAL, MOST_DEPLOYED, MOST_OVERHEAD_SECONDS, MOST_LOSS_SPREAD = 0.85, 0.7, 1.0, 5e-5
MIB = 2**20


@dataclass(frozen=True)
class Row:
    """One run of one system. Seconds of wall time unless they say otherwise; bytes over the loopback device."""

    system: str
    wall_seconds: float
    job_seconds: float
    steady_round_seconds: float
    overhead_seconds: float
    cpu_seconds: float
    peak_memory_mib: float
    wire_mib: float
    loss: float
    load_before: float


def measure(system: str, job: Path) -> Row:
    """One run."""
    folder, load = Path(tempfile.mkdtemp(prefix=f"{system}-")), os.getloadavg()[0]
    try:
        with watching() as usage:
            seen = SYSTEMS[system](Place(folder, job, usage))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Row(
        system=system,
        wall_seconds=round(seen.done - seen.started, 2),
        job_seconds=round(seen.done - seen.ready, 2),
        steady_round_seconds=round(seen.steady_round_seconds, 3),
        overhead_seconds=round(seen.overhead_seconds, 3),
        cpu_seconds=round(usage.cpu_seconds, 1),
        peak_memory_mib=round(usage.peak_memory_bytes / MIB),
        wire_mib=round(usage.wire_bytes / MIB, 2),
        loss=round(seen.loss, 6),
        load_before=round(load, 2),
    )


def medians(rows: Sequence[Row]) -> list[Row]:
    """One row per system, each number the median of its runs."""
    found = []
    for system in SYSTEMS:
        own = [asdict(row) for row in rows if row.system == system]
        if own:
            numbers = {key: median(row[key] for row in own) for key in own[0] if key != "system"}
            found.append(Row(system=system, **numbers))
    return found


def verdicts(rows: Sequence[Row]) -> list[Check]:
    """The claims, as far as the systems they compare ran."""
    by = {row.system: row for row in rows}
    losses = [row.loss for row in rows]
    checks = [at_most("losses: largest less smallest", max(losses) - min(losses), MOST_LOSS_SPREAD)]
    checks += _ratio(by, "fedpipe-local", ("flower-simulation", "nvflare-simulator"), "wall_seconds", MOST_LOCAL)
    checks += _ratio(by, "fedpipe-local", ("flower-simulation",), "steady_round_seconds", 1.0)
    for span in ("wall_seconds", "job_seconds"):
        checks += _ratio(by, "fedpipe-deployed", ("nvflare-poc",), span, MOST_DEPLOYED)
    if ours := by.get("fedpipe-deployed"):
        checks.append(at_most("fedpipe-deployed overhead_seconds", ours.overhead_seconds, MOST_OVERHEAD_SECONDS))
    return checks


def _ratio(by: Mapping[str, Row], ours: str, peers: Sequence[str], value: str, target: float) -> list[Check]:
    """Ours over the best of the peers."""
    if ours not in by or not all(peer in by for peer in peers):
        return []
    best = min(getattr(by[peer], value) for peer in peers)
    return [at_most(f"{ours} over {' and '.join(peers)}, {value}", getattr(by[ours], value) / best, target)]


def as_text(rows: Sequence[Row]) -> str:
    """The table."""
    head = ("system", "wall s", "job s", "round s", "overhead s", "CPU s", "peak MiB", "wire MiB", "loss")
    cells = [
        (
            row.system,
            f"{row.wall_seconds:.1f}",
            f"{row.job_seconds:.1f}",
            f"{row.steady_round_seconds:.2f}",
            f"{row.overhead_seconds:.2f}",
            f"{row.cpu_seconds:.1f}",
            f"{row.peak_memory_mib:.0f}",
            f"{row.wire_mib:.1f}",
            f"{row.loss:.4f}",
        )
        for row in rows
    ]
    return markdown_table(head, cells)


def machine() -> dict[str, str]:
    """What ran, and where."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "commit": commit,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }


def main() -> None:
    """Run everything, print, and keep the raw numbers when every system ran."""
    options_parser = parser(__doc__)
    options_parser.add_argument("--only", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS), metavar="NAME")
    options_parser.add_argument("--turns", type=int, default=1, help="runs of every system, which alternate")
    options = options_parser.parse_args()
    job = job_folder()
    set_up(job)
    runs = []
    for _ in range(options.turns):
        for system in options.only:
            runs.append(measure(system, job))
            print(runs[-1], file=sys.stderr, flush=True)
    rows = medians(runs)
    checks = verdicts(rows)
    document = {**machine(), "table": [asdict(row) for row in rows], "runs": [asdict(row) for row in runs]}
    if len(rows) == len(SYSTEMS):
        RESULTS.write_text(json.dumps({**document, "checks": checks}, indent=1) + "\n")
    finish(options.json, document, checks, as_text(rows))


if __name__ == "__main__":
    main()
