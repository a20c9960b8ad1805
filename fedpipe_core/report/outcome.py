"""What the run came to: refused updates, exports, the gate, and the hashes behind them."""

from html import escape

import yaml

from fedpipe_core.report.facts import ReportFacts
from fedpipe_core.report.html import Cell, section, short, size, table, words
from fedpipe_core.result_schemas import ExportRecord


def refusals_section(facts: ReportFacts) -> str:
    """Answers that did not count."""
    refused = {entry.round - 1: entry.refused for entry in facts.made}
    rows = [
        (entry.round, edge_id, reason, short(refused.get(entry.round, {}).get(edge_id, "no update")))
        for entry in facts.rounds
        for edge_id, reason in entry.dropped.items()
    ]
    body = (
        f'<div class="card">{table(("round", "edge", "reason", "update"), rows)}</div>'
        if rows
        else '<p class="none">None: every answer of every edge counted.</p>'
    )
    return section("Refused updates", "Answers that did not count, and why.", body)


def exports_section(facts: ReportFacts) -> str:
    """What was exported and what each export is worth."""
    if facts.release is None or not facts.release.exports:
        return ""
    names = list(facts.release.exports[0].metrics)
    head = (
        "export",
        "size",
        *map(words, names),
        "loss change",
        "same answers",
        "loads in",
        "latency",
        "for",
        "verdict",
    )
    rows = [_export_row(export, names) for export in facts.release.exports]
    how = "judged on the held-out set" if names else "asked for answers to made-up rows, for want of others,"
    return section(
        "Exports",
        f"Each was reloaded in a fresh process and {how} beside the unquantized merged model; latency is per example, "
        "relative to the base model's, timed in turns.",
        f'<div class="card">{table(head, rows, numbers=range(1, len(head) - 2))}</div>',
    )


def _export_row(export: ExportRecord, names: list[str]) -> list[object]:
    latency = export.latency
    return [
        export.scheme,
        size(export.bytes),
        *(f"{export.metrics[name]:.4f}" if name in export.metrics else "–" for name in names),
        "–" if export.loss_increase is None else f"{export.loss_increase:+z.2%}",
        "–" if export.agreement is None else f"{export.agreement:.2%}",
        f"{export.load_seconds:.1f} s" if export.load_seconds else "–",
        "–" if latency is None else f"×{latency.ratio:.2f} ({latency.ratio_low:.2f}–{latency.ratio_high:.2f})",
        ", ".join(export.edges) or "–",
        Cell("kept", "good") if export.kept else Cell(escape(export.reason), "bad"),
    ]


def gate_section(facts: ReportFacts) -> str:
    """Why the version is champion, or is not."""
    if facts.release is None:
        return ""
    decision = facts.release.model.decision
    rows = [
        (
            check.name,
            f"{check.value:z.4f}",
            "–" if check.threshold is None else f"{check.threshold:g}",
            Cell("passed", "good") if check.passed else Cell("failed", "bad"),
            check.reason,
        )
        for check in decision.checks
    ]
    head = ("check", "number", "threshold", "verdict", "in words")
    reasons = "".join(f"<p>{escape(reason)}</p>" for reason in decision.reasons)
    body = table(head, rows, numbers=(1, 2)) if rows else reasons
    return section(
        "Gate",
        "Challenger against champion on the same rows; a version becomes champion when no check fails. "
        "The limit on an export's loss decides on that export alone.",
        f'<div class="card">{body}</div>',
    )


def lineage_section(facts: ReportFacts) -> str:
    """Hashes of what went in and came out."""
    federation = facts.federation
    rows = [
        ("adapter after the last round", facts.rounds[-1].adapter_sha256 if facts.rounds else "none"),
        ("base model", federation.base_sha256),
        ("config", federation.config_sha256),
        ("code", f"fedpipe {federation.code_version}, commit {federation.code_commit or 'unknown'}"),
        *((f"data of {edge_id}", profile.data_fingerprint) for edge_id, profile in facts.profiles.items()),
    ]
    hashes = table(("what", "sha256"), ((name, Cell(escape(value), "hash")) for name, value in rows))
    config = yaml.safe_dump(federation.config, sort_keys=False)
    return section(
        "Lineage",
        "Hashes of what went in and came out; data are named by a salted hash, never shown.",
        f'<div class="card">{hashes}</div>',
        f"<details><summary>The run's config</summary><pre>{escape(config)}</pre></details>",
    )
