"""The report's page, section by section, in the order in which a reader asks: what came out, how, at what cost, why."""

from collections.abc import Mapping
from html import escape
from pathlib import Path

from fedpipe_core.report.charts import (
    EDGE_COLOURS,
    Series,
    curves,
    edge_colour,
    legend,
    module_map,
    timeline,
    transfers,
)
from fedpipe_core.report.facts import ReportFacts, importance
from fedpipe_core.report.html import Cell, card, cards, duration, measured_beside, section, size, table, tile, words
from fedpipe_core.report.outcome import exports_section, gate_section, lineage_section, refusals_section
from fedpipe_core.schemas import UpdateRecord

_STYLE = Path(__file__).with_name("report.css")
_LOSS = "loss"
_NOT_SHARES = (_LOSS, "perplexity")  # would flatten the curves of shares between 0 and 1
_MAPPED_EDGES = 12  # ranks are drawn for so many edges


def render_page(facts: ReportFacts) -> str:
    """The page: one file that needs no network, in light and dark."""
    run = escape(facts.federation.run)
    sections = (
        _header(facts),
        _learning(facts),
        _plan(facts),
        _timeline(facts),
        _transfers(facts),
        _importance(facts),
        _ranks(facts),
        refusals_section(facts),
        exports_section(facts),
        gate_section(facts),
        lineage_section(facts),
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" '
        f'content="light dark"><title>{run} – FedPipe</title><style>{_STYLE.read_text(encoding="utf-8")}</style></head>'
        f"<body><main>{''.join(sections)}"
        f"<footer>Written by FedPipe {escape(facts.federation.code_version)} from the records of run {run}. "
        "Hover over any mark for its numbers.</footer></main></body></html>"
    )


def _header(facts: ReportFacts) -> str:
    model = facts.federation.config.get("model")
    base = model.get("base") if isinstance(model, Mapping) else ""
    closed, wanted = len(facts.rounds), facts.federation.config.get("rounds")
    lead = f"{base}, tuned by {len(facts.edges)} edges in {closed} of {wanted} rounds"
    return (
        f'<header><h1>{escape(facts.federation.run)}</h1><p class="lead">{escape(lead)}</p>{_verdict(facts)}'
        f'<div class="tiles">{"".join(_tiles(facts))}</div></header>'
    )


def _verdict(facts: ReportFacts) -> str:
    if facts.release is None:
        return '<span class="chip warn">not released</span>'
    model = facts.release.model
    name = escape(f"{model.name} version {model.version}")
    if model.decision.promoted:
        return f'<span class="chip good">{name} promoted to champion</span>'
    return f'<span class="chip bad">{name} not promoted</span>'


def _tiles(facts: ReportFacts) -> list[str]:
    found = [
        tile(f"{facts.baseline[name]:.3f} → {value:.3f}" if name in facts.baseline else f"{value:.3f}", words(name))
        for name, value in facts.metrics.items()
    ]
    if not facts.rounds:
        return [*found, tile("0", "rounds closed")]
    down, up = sum(r.download_bytes for r in facts.rounds), sum(r.upload_bytes for r in facts.rounds)
    return [
        *found,
        tile(duration(sum(entry.seconds for entry in facts.rounds)), f"in {len(facts.rounds)} rounds"),
        tile(size(up), f"uploaded, {size(down)} downloaded"),
        tile(f"{sum(len(entry.dropped) for entry in facts.rounds)}", "answers that did not count"),
    ]


def _learning(facts: ReportFacts) -> str:
    names = [name for name in facts.metrics if name not in _NOT_SHARES]
    quality = _held_out(facts, names) + _validated(facts, names[:1])
    trained = [
        Series(f"{edge_id}, training", edge_colour(facts, edge_id), _points(facts, "train_loss", edge_id))
        for edge_id in facts.edges
    ]
    losses = _held_out(facts, [_LOSS]) + [line for line in trained if line.points]
    judges = facts.rounds[-1].judges if facts.rounds else "held-out set"
    held_out = [(words(name), ("main", "second")[min(i, 1)]) for i, name in enumerate(names)]
    of_edges = [(edge_id, edge_colour(facts, edge_id)) for edge_id in facts.edges] if _distinct(facts) else []
    return section(
        "Learning",
        f"Thick lines are the global model on the {judges}, from before training on; thin lines are the edges: at the "
        "left the global model on their own validation rows, at the right their loss while training.",
        cards(
            [
                card("Quality", curves(quality, "Metrics by round", ".4f"), legend(held_out + of_edges)),
                card("Loss (nats)", curves(losses, "Loss by round", ".4f"), legend([(judges, "main"), *of_edges])),
            ]
        ),
    )


def _held_out(facts: ReportFacts, names: list[str]) -> list[Series]:
    begin = {0: facts.baseline} | {entry.round: entry.metrics for entry in facts.rounds}
    return [
        Series(
            f"{words(name)}, {facts.rounds[-1].judges if facts.rounds else 'held-out set'}",
            ("main", "second")[min(index, 1)],
            [(number, values[name]) for number, values in begin.items() if name in values],
            strong=True,
        )
        for index, name in enumerate(names)
    ]


def _validated(facts: ReportFacts, names: list[str]) -> list[Series]:
    """An edge judges what a round starts from, which is what the round before led to; or else the end as well."""
    found = [
        Series(
            f"{edge_id}, {words(name)} on its validation rows",
            edge_colour(facts, edge_id),
            sorted(_found_at_edge(facts, edge_id, name).items()),
        )
        for name in names
        for edge_id in facts.edges
    ]
    return [line for line in found if line.points]


def _found_at_edge(facts: ReportFacts, edge_id: str, name: str) -> dict[float, float]:
    """A metric on an edge's rows by the round that led to it, 0 being before training."""
    received = {entry.round - 1.0: entry.edge_metrics.get(edge_id, {}) for entry in facts.rounds}
    judged = {float(e.round): e.evaluations[edge_id].metrics for e in facts.rounds if edge_id in e.evaluations}
    return {number: found[name] for number, found in (received | judged).items() if name in found}


def _points(facts: ReportFacts, field: str, edge_id: str) -> list[tuple[float, float]]:
    values = [(entry.round, getattr(entry, field)) for entry in facts.rounds]
    return [(number, found[edge_id]) for number, found in values if edge_id in found]


def _plan(facts: ReportFacts) -> str:
    head = ("edge", "rows", "base", "batch × steps", "modules", "memory", "a round", "upload", "limited by")
    rows = [_plan_row(facts, edge_id) for edge_id in facts.edges]
    return section(
        "Plan",
        "What each edge was given to do, and what it took in its worst round; the thin mark on a bar is the plan's "
        "prediction, for the declared machine where resources are declared. "
        f"Deadline of a round {duration(facts.plan.round_seconds)}; solver {facts.plan.solver}.",
        f'<div class="card">{table(head, rows)}</div>',
    )


def _plan_row(facts: ReportFacts, edge_id: str) -> list[object]:
    plan, colour = facts.plan.edges[edge_id], edge_colour(facts, edge_id)
    updates = [entry[edge_id] for entry in facts.updates if edge_id in entry]
    profile, cost, ranks = facts.profiles.get(edge_id), plan.predicted, sorted(plan.ranks.values())
    memory = max((update.peak_memory_bytes for update in updates), default=None)
    seconds = max((update.round_seconds for update in updates), default=None)
    upload = max((update.adapter.size_bytes for update in updates), default=None)
    span = "–".join(f"{rank}" for rank in sorted({*ranks[:1], *ranks[-1:]}))
    return [
        Cell(f'<i class="swatch {colour}"></i>{escape(edge_id)}'),
        f"{profile.num_examples:,}" if profile else "",
        f"{plan.base_bits} bit",
        f"{plan.batch_size} × {plan.local_steps}",
        f"{len(ranks)} of rank {span}" if ranks else "every parameter",
        measured_beside(cost.peak_memory_bytes, memory, (size(cost.peak_memory_bytes), size(memory or 0)), colour),
        measured_beside(cost.round_seconds, seconds, (duration(cost.round_seconds), duration(seconds or 0)), colour),
        measured_beside(cost.upload_bytes, upload, (size(cost.upload_bytes), size(upload or 0)), colour),
        plan.binding,
    ]


def _timeline(facts: ReportFacts) -> str:
    if not facts.rounds:
        return ""
    kinds = ("training", "preparing", "transfer", "waiting", "coordinator", "missing")
    names = ("training", "validating and preparing", "transfer", "waiting", "aggregating and judging", "no update")
    colours = [(name, f"act-{kind}") for name, kind in zip(names, kinds, strict=True)]
    return section(
        "Rounds, second by second",
        "One row an edge. Declared resources are not slept through, so edges simulated on one machine take turns on "
        "its cores.",
        f'<div class="card">{timeline(facts)}{legend(colours)}</div>',
    )


def _transfers(facts: ReportFacts) -> str:
    if not facts.rounds:
        return ""
    total: dict[str, tuple[int, int]] = {edge_id: _moved(facts, edge_id) for edge_id in facts.edges}
    rows = [
        (Cell(f'<i class="swatch {edge_colour(facts, edge_id)}"></i>{escape(edge_id)}'), size(down), size(up))
        for edge_id, (down, up) in total.items()
    ]
    return section(
        "Bytes",
        "What went over the wire: adapters, never rows or activations.",
        cards(
            [
                card("MiB in every round", transfers(facts)),
                card("All rounds", table(("edge", "downloaded", "uploaded"), rows, numbers=(1, 2))),
            ]
        ),
    )


def _moved(facts: ReportFacts, edge_id: str) -> tuple[int, int]:
    updates: list[UpdateRecord] = [entry[edge_id] for entry in facts.updates if edge_id in entry]
    return sum(u.download_bytes for u in updates), sum(u.adapter.size_bytes for u in updates)


def _importance(facts: ReportFacts) -> str:
    shares = importance(facts.profiles)
    if not shares:
        return ""
    drawn = module_map(shares, "accent", "Importance of every module", lambda value: f"{100 * value:.1f}")
    return section(
        "Where training pays",
        "Share of every module in the importance that the edges measured, in percent, averaged over edges; layers "
        "count from the input.",
        f'<div class="card">{drawn}</div>',
    )


def _ranks(facts: ReportFacts) -> str:
    if not facts.modules:  # every parameter is trained
        return ""
    shown = facts.edges[:_MAPPED_EDGES]
    modules = facts.modules
    drawn = [
        card(
            f"{edge_id}, {facts.plan.edges[edge_id].base_bits} bit",
            module_map(
                {name: float(facts.plan.edges[edge_id].ranks.get(name, 0)) for name in modules},
                edge_colour(facts, edge_id),
                f"Ranks of {edge_id}",
                lambda value: f"{value:g}",
            ),
        )
        for edge_id in shown
    ]
    left_out = f" Shown are {len(shown)} of {len(facts.edges)} edges." if len(shown) < len(facts.edges) else ""
    return section(
        "Ranks chosen",
        f"Rank of the adapter that each edge trains on each module; an empty field has none.{left_out}",
        cards(drawn),
    )


def _distinct(facts: ReportFacts) -> bool:
    return len(facts.edges) <= EDGE_COLOURS
