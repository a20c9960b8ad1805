"""The released model's card: README.md in Hugging Face form, made from the federation's own records.

It says what a reader needs to trust or repeat the model, and only what the records hold. Of the edges' data it shows
counts and salted fingerprints, never a row.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from fedpipe_core.combined_metrics import combined_metrics
from fedpipe_core.evaluation_schemas import EdgeEvaluation
from fedpipe_core.plan_schemas import EdgePlan, FederationPlan
from fedpipe_core.predictions import Interval
from fedpipe_core.profile_schemas import EdgeProfile
from fedpipe_core.result_schemas import ExportRecord
from fedpipe_core.schemas import FederationRecord, RoundRecord

_HASH_CHARACTERS = 16
_MIB = 2**20


@dataclass(frozen=True)
class CardFacts:
    """Everything a card is made from; `metrics` and `baseline` are on the held-out set, after and before training.

    Where only the edges have rows, `metrics` is empty and `evaluations` holds what each edge found.
    """

    model_name: str
    base: str
    base_license: str | None
    federation: FederationRecord
    profiles: Mapping[str, EdgeProfile]
    plan: FederationPlan
    rounds: Sequence[RoundRecord]
    adapter_sha256: str
    evaluation_sha256: str | None
    baseline: Mapping[str, float]
    metrics: Mapping[str, Interval]
    exports: Sequence[ExportRecord] = field(default=())
    task: str = "sequence-classification"
    evaluations: Mapping[str, EdgeEvaluation] = field(default_factory=dict)

    @property
    def metric_names(self) -> list[str]:
        """What the version is judged by."""
        return list(self.metrics or self.rounds[-1].metrics)


@dataclass(frozen=True)
class _Kind:
    """What a card says of a task: the hub's name for it, what such a model is, what it takes, what loads it."""

    pipeline_tag: str
    noun: str
    example: str
    auto_class: str


_KINDS = {
    "sequence-classification": _Kind(
        "text-classification", "text classifier", "a text to classify", "AutoModelForSequenceClassification"
    ),
    "causal-lm": _Kind("text-generation", "language model", "a prompt to continue", "AutoModelForCausalLM"),
}


def render_card(facts: CardFacts) -> str:
    """Return the card as Markdown with a YAML header that the Hugging Face hub reads."""
    sections = (
        _header(facts),
        _introduction(facts),
        _use(facts),
        "## Metrics\n\n" + _metrics(facts),
        "## Training data\n\nRows stay at their edge; these are counts and salted hashes.\n\n" + _data(facts),
        "## Plan\n\n" + _plan(facts),
        "## Rounds\n\n" + _rounds(facts),
        *(["## Exports\n\n" + _exports(facts)] if facts.exports else []),
        "## Lineage\n\n" + _lineage(facts),
    )
    return "\n\n".join(sections) + "\n"


def license_of(base_folder: Path) -> str | None:
    """Return the licence that the base's own card declares in its YAML header, or None when it declares none."""
    card = base_folder / "README.md"
    if not card.is_file():
        return None
    _, *parts = card.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    try:
        header = yaml.safe_load(parts[0]) if len(parts) == 2 else None
    except yaml.YAMLError:
        return None
    declared = header.get("license") if isinstance(header, dict) else None
    return declared if isinstance(declared, str) else None


def _header(facts: CardFacts) -> str:
    header: dict[str, object] = {
        **({"license": facts.base_license} if facts.base_license else {}),
        "base_model": facts.base,
        "library_name": "transformers",
        "pipeline_tag": _KINDS[facts.task].pipeline_tag,
        "tags": ["federated-learning", "lora", "fedpipe"],
    }
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---"


def _introduction(facts: CardFacts) -> str:
    licence = facts.base_license or "not declared in the base's card; ask its publisher before you pass this model on"
    return (
        f"# {facts.model_name}\n\n"
        f"A {_KINDS[facts.task].noun}: `{facts.base}` fine-tuned by {len(facts.plan.edges)} edge servers in "
        f"{len(facts.rounds)} rounds of federated low-rank adaptation with FedPipe. No edge's rows left it.\n\n"
        f"Licence of the base: {licence}."
    )


def _use(facts: CardFacts) -> str:
    kind = _KINDS[facts.task]
    prompt = "; its tokenizer's chat template renders prompts as in training" if facts.task == "causal-lm" else ""
    return (
        "```python\n"
        "import mlflow\n\n"
        f'model = mlflow.pyfunc.load_model("models:/{facts.model_name}@champion")\n'
        f'model.predict(["{kind.example}"])\n'
        f"```\n\nThe merged folder also loads with `transformers` alone, by `{kind.auto_class}`{prompt}."
    )


def _metrics(facts: CardFacts) -> str:
    parts = [_held_out(facts)] if facts.metrics else []
    return "\n\n".join([*parts, _at_edges(facts)] if facts.evaluations else parts)


def _at_edges(facts: CardFacts) -> str:
    """What each edge found, and all together."""
    together = combined_metrics(facts.evaluations)
    names, rows = list(together), sum(found.rows for found in facts.evaluations.values())
    lines = [
        (edge_id, found.rows, *(_number(found.metrics.get(name)) for name in names))
        for edge_id, found in sorted(facts.evaluations.items())
    ]
    begun = [] if facts.metrics else [("before training", "", *(_number(facts.baseline.get(name)) for name in names))]
    table = _table(("edge", "rows", *names), [*lines, ("together", rows, *map(_number, together.values())), *begun])
    return f"On rows that each edge kept out of training, beside its own base; together by weighted means.\n\n{table}"


def _held_out(facts: CardFacts) -> str:
    table = _table(
        ("metric", "before training", "after", "interval"),
        (
            (name, _number(facts.baseline.get(name)), f"{after.estimate:.4f}", f"{after.low:.4f} to {after.high:.4f}")
            for name, after in facts.metrics.items()
        ),
    )
    levels = sorted({f"{after.confidence:.0%}" for after in facts.metrics.values()})
    name = _short(facts.evaluation_sha256 or "")
    return f"On the held-out set `{name}`; bootstrap intervals at {' and '.join(levels)}.\n\n{table}"


def _data(facts: CardFacts) -> str:
    return _table(
        ("edge", "training rows", "validation rows", "fingerprint"),
        (
            (edge_id, profile.num_examples, profile.num_validation_examples, f"`{_short(profile.data_fingerprint)}`")
            for edge_id, profile in sorted(facts.profiles.items())
        ),
    )


def _plan(facts: CardFacts) -> str:
    table = _table(
        ("edge", "base bits", "batch", "steps", "modules", "ranks", "memory (MiB)", "round (s)", "limited by"),
        (_plan_row(plan) for _, plan in sorted(facts.plan.edges.items())),
    )
    return f"Solver: {facts.plan.solver}; deadline of a round: {facts.plan.round_seconds:.1f} s.\n\n{table}"


def _plan_row(plan: EdgePlan) -> tuple[object, ...]:
    ranks = sorted(plan.ranks.values())
    span = "every parameter" if not ranks else f"{ranks[0]}" if ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}"
    memory, seconds = plan.predicted.peak_memory_bytes / _MIB, plan.predicted.round_seconds
    return (
        *(plan.edge_id, plan.base_bits, plan.batch_size, plan.local_steps, len(ranks), span),
        *(f"{memory:.0f}", f"{seconds:.1f}", plan.binding),
    )


def _rounds(facts: CardFacts) -> str:
    names = facts.metric_names
    return _table(
        ("round", "edges counted", "dropped", *names, "seconds", "uploaded (MiB)"),
        (
            (
                closed.round,
                len(closed.participants),
                "; ".join(f"{edge_id}: {reason}" for edge_id, reason in sorted(closed.dropped.items())) or "none",
                *(_number(closed.metrics.get(name)) for name in names),
                f"{closed.seconds:.1f}",
                f"{closed.upload_bytes / _MIB:.2f}",
            )
            for closed in facts.rounds
        ),
    )


def _exports(facts: CardFacts) -> str:
    names = facts.metric_names
    found = ("loss change", "same answers", "loads in (s)", "latency", "kept", "sha256")
    table = _table(("export", "size (MiB)", *names, *found), (_export_row(export, names) for export in facts.exports))
    without = "" if facts.metrics else "Answers to made-up rows are compared, as the coordinator has no others. "
    return (
        f"{without}"
        "Each was reloaded in a fresh process and is told beside the unquantized merged model; latency is per example, "
        f"relative to the base's, with a 95 % interval.\n\n{table}"
    )


def _export_row(export: ExportRecord, names: Sequence[str]) -> tuple[object, ...]:
    latency = export.latency
    return (
        export.scheme,
        f"{export.bytes / _MIB:.2f}",
        *(_number(export.metrics.get(name)) for name in names),
        "–" if export.loss_increase is None else f"{export.loss_increase:+z.2%}",
        "–" if export.agreement is None else f"{export.agreement:.2%}",
        f"{export.load_seconds:.1f}",
        "–" if latency is None else f"×{latency.ratio:.2f} ({latency.ratio_low:.2f} to {latency.ratio_high:.2f})",
        "yes" if export.kept else f"no: {export.reason}",
        f"`{_short(export.sha256)}`",
    )


def _lineage(facts: CardFacts) -> str:
    federation = facts.federation
    return _table(
        ("what", "value"),
        (
            ("run", federation.run),
            ("config sha256", f"`{federation.config_sha256}`"),
            ("base sha256", f"`{federation.base_sha256}`"),
            ("adapter sha256", f"`{facts.adapter_sha256}`"),
            ("seed", federation.seed),
            ("code", f"fedpipe {federation.code_version}, commit {federation.code_commit or 'unknown'}"),
        ),
    )


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table; what would break a cell is escaped."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(_cell(value) for value in line)} |" for line in lines)


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _short(digest: str) -> str:
    return digest[:_HASH_CHARACTERS]
