"""The gate where the edges alone have rows: the challenger against the champion as the edges told of each.

Two versions are compared on edges that judged both on the same rows, which the rows' salted hashes tell; other numbers
would compare rows, not models. Rows stay at the edges, so there is no paired interval; how many edges gain is told
instead.
"""

from collections.abc import Mapping

from fedpipe_core.combined_metrics import combined_metrics
from fedpipe_core.config import ReleaseSpec
from fedpipe_core.evaluation_schemas import EdgeEvaluation
from fedpipe_core.gate import Check, Decision, conclude, improvement_check
from fedpipe_core.predictions import LOWER_IS_BETTER

Evaluations = Mapping[str, EdgeEvaluation]


def decide_by_edges(challenger: Evaluations, champion: Evaluations | None, spec: ReleaseSpec) -> Decision:
    """Promote when the challenger beats the champion by enough, over the edges that judged both on the same rows.

    Without a champion a challenger is promoted; with one that no edge can be compared on, it is not.
    """
    found = combined_metrics(challenger)
    metric: str = spec.metric or next(iter(found))
    if champion is None:
        reason = f"no champion yet; {metric} is {found[metric]:.4f} over {len(challenger)} edges"
        return conclude([Check(metric, found[metric], None, True, reason)])
    shared = [edge_id for edge_id in challenger if _comparable(metric, challenger[edge_id], champion.get(edge_id))]
    if not shared:
        return conclude([_nothing_shared(len(challenger))])
    after, before = ({edge_id: side[edge_id] for edge_id in shared} for side in (challenger, champion))
    gain = improvement_check(metric, combined_metrics(after)[metric], combined_metrics(before)[metric], spec)
    return conclude([gain, _by_edge(metric, after, before, len(challenger))])


def _comparable(metric: str, now: EdgeEvaluation, before: EdgeEvaluation | None) -> bool:
    if before is None or before.rows_sha256 != now.rows_sha256:
        return False
    return metric in now.metrics and metric in before.metrics


def _nothing_shared(edges: int) -> Check:
    reason = (
        f"none of the {edges} edges judged the champion on the rows it has now, so the two cannot be compared; keep an "
        "edge's rows for judging in a file that stays (data.validation), or release under another release.model_name"
    )
    return Check("edges that judged both", 0.0, 1.0, False, reason)


def _by_edge(metric: str, after: Evaluations, before: Evaluations, edges: int) -> Check:
    """How many edges gain, and which loses most: told, and no limit."""
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    gains = {edge_id: sign * (after[edge_id].metrics[metric] - before[edge_id].metrics[metric]) for edge_id in after}
    better = sum(gain > 0 for gain in gains.values())
    worst = min(gains, key=lambda edge_id: gains[edge_id])
    reason = (
        f"{metric} is better at {better} of the {len(gains)} edges that judged both on the same rows, of {edges} that "
        f"judged; the least gain is {worst}'s, {gains[worst]:+.4f}. Rows stay at the edges, so no interval is measured"
    )
    return Check("edges that gain", float(better), None, True, reason)
