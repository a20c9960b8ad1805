"""A version's lineage and its verification as text for a person."""

from collections.abc import Iterator

import yaml

from fedpipe_core.lineage_schemas import Lineage, RoundLineage, Verification
from flows.tables import text_table


def lineage_text(lineage: Lineage) -> str:
    """What `fedpipe lineage` prints: hashes in full, so that they can be compared and searched for."""
    aliases = f" ({', '.join(lineage.aliases)})" if lineage.aliases else ""
    commit = lineage.code_commit or "unknown"
    data = [
        (edge, str(of.num_examples), str(of.num_validation_examples), of.data_fingerprint)
        for edge, of in lineage.edges.items()
    ]
    lines = [
        f"model     {lineage.model} version {lineage.version}{aliases}",
        f"run       {lineage.run} in {lineage.store}",
        f"adapter   {lineage.adapter_sha256}",
        f"base      {lineage.base_sha256}  {lineage.base}",
        f"config    {lineage.config_sha256}",
        f"manifest  {lineage.manifest_sha256 or 'none'}",
        f"code      fedpipe {lineage.code_version}, commit {commit}",
        "",
        text_table(("edge", "rows", "validation", "fingerprint of its data"), data),
        *(line for entry in lineage.rounds for line in _round_lines(entry)),
        "",
        "config",
        *(f"  {line}" for line in yaml.safe_dump(lineage.config, sort_keys=False).splitlines()),
    ]
    return "\n".join(lines)


def verification_text(found: Verification) -> str:
    """What `fedpipe verify` prints: a line a round, then each fault by the object it concerns."""
    verdict = "verified" if found.verified else f"NOT verified, {_count(len(found.faults), 'fault')}"
    return "\n".join(
        [
            f"{found.model} version {found.version}, run {found.run} in {found.store}",
            f"{_count(found.objects, 'object')} compared with the manifest of the release",
            *(
                f"round {entry.round}: {_count(entry.updates, 'update')} lead to "
                f"{entry.recomputed_sha256 or 'nothing that could be computed'}"
                f"{', as recorded' if entry.recomputed_sha256 == entry.recorded_sha256 else ''}"
                for entry in found.rounds
            ),
            *(f"FAULT {fault.subject} {fault.found}" for fault in found.faults),
            f"adapter {found.adapter_sha256}: {verdict}",
        ]
    )


def _round_lines(entry: RoundLineage) -> Iterator[str]:
    yield ""
    yield f"round {entry.round}  from {entry.start_sha256}"
    for edge_id, update in entry.accepted.items():
        yield f"  accepted  {update.sha256}  {edge_id}, {update.num_examples} rows"
    for edge_id, refusal in entry.refused.items():
        yield f"  refused   {refusal.sha256 or 'no update'}  {edge_id}: {refusal.reason}"
    yield f"  adapter   {entry.adapter_sha256}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
