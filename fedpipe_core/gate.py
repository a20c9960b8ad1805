"""The promotion gate: whether a challenger replaces the champion, and why, in sentences with numbers.

Pure arithmetic on the answers of both models on one frozen evaluation set. Who the champion is, and what happens to the
registry's aliases, is decided by `tasks.registry`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fedpipe_core.config import ReleaseSpec
from fedpipe_core.errors import ReleaseError
from fedpipe_core.predictions import LOWER_IS_BETTER, Answers, Interval, improvement_interval, metric_of

LEAST_AGREEMENT = 0.9  # of a whole export in 16 bits, whose near ties may fall otherwise
_ROUNDING = 1e-12  # a gain of exactly the minimum must pass although 0.57 - 0.56 < 0.01


@dataclass(frozen=True)
class Check:
    """One measured number against one threshold. Without a threshold the number is only recorded."""

    name: str
    value: float
    threshold: float | None
    passed: bool
    reason: str


@dataclass(frozen=True)
class Decision:
    """The gate's verdict with every check behind it."""

    promoted: bool
    checks: tuple[Check, ...]
    reasons: tuple[str, ...]

    def as_document(self) -> dict[str, Any]:
        """Return the JSON form that is kept with the version."""
        return asdict(self)


def decide(
    challenger: Answers,
    champion: Answers | None,
    spec: ReleaseSpec,
    slices: Sequence[str] | None = None,
    seed: int = 0,
) -> Decision:
    """Promote when the challenger beats the champion by enough, beyond chance, and on no slice falls too far.

    `slices` names the slice of each example (a domain, a label, an edge); None leaves that check out. Without a
    champion a challenger with finite losses is promoted.
    Raises ReleaseError when the two were evaluated on different sets or `slices` does not fit them.
    """
    checks = [_finite_check(challenger)]
    if champion is None:
        checks.append(_first_version_check(challenger, spec))
    elif checks[0].passed:
        _require_same_set(challenger, champion)
        checks += _improvement_checks(challenger, champion, spec, seed)
        if slices is not None:
            checks.append(_slice_check(challenger, champion, spec, slices))
    return conclude(checks)


def conclude(checks: Sequence[Check]) -> Decision:
    """Promote when every check passed; the reasons are those of the failed checks, or of all when none failed."""
    failed = tuple(check.reason for check in checks if not check.passed)
    return Decision(not failed, tuple(checks), failed or tuple(check.reason for check in checks))


def loss_check(export: str, loss: float, merged_loss: float, spec: ReleaseSpec) -> Check:
    """Check an export's held-out loss against that of the unquantized merged model, as a relative increase."""
    increase = (loss - merged_loss) / max(merged_loss, 1e-12)
    passed = bool(np.isfinite(loss)) and increase <= spec.max_loss_increase
    return Check(
        name=f"loss of {export}",
        value=increase,
        threshold=spec.max_loss_increase,
        passed=passed,
        reason=f"export {export} has loss {loss:.4f} against {merged_loss:.4f} unquantized, {increase:+z.1%}; "
        f"{'within' if passed else 'beyond'} the allowed {spec.max_loss_increase:+.1%}",
    )


def agreement_check(export: str, agreement: float, registered: bool) -> Check:
    """Tell an export apart from a broken one where no rows can tell its loss: by its answers to made-up rows.

    Whole exports answer as the unquantized model does, so the one that is registered must; of others it is told only.
    """
    passed = not registered or agreement >= LEAST_AGREEMENT
    needed = "" if passed else f", needed {LEAST_AGREEMENT:.0%}"
    return Check(
        name=f"agreement of {export}",
        value=agreement,
        threshold=LEAST_AGREEMENT if registered else None,
        passed=passed,
        reason=f"export {export} answers {agreement:.2%} of made-up rows as the unquantized model does{needed}; its "
        "loss was not measured: the coordinator has no rows",
    )


def _finite_check(challenger: Answers) -> Check:
    bad = int((~np.isfinite(challenger.losses)).sum())
    found = "every loss is finite" if bad == 0 else f"{bad} of {challenger.losses.size} losses are not finite"
    return Check("finite losses", float(bad), 0.0, bad == 0, found)


def _first_version_check(challenger: Answers, spec: ReleaseSpec) -> Check:
    metric = spec.metric or challenger.metrics[0]
    value = metric_of(challenger, metric)
    return Check(metric, value, None, True, f"no champion yet; {metric} is {value:.4f}")


def _require_same_set(challenger: Answers, champion: Answers) -> None:
    same = challenger.evaluation_sha256 == champion.evaluation_sha256
    if not same or not np.array_equal(challenger.truth(), champion.truth()):
        raise ReleaseError(
            f"challenger was evaluated on set {challenger.evaluation_sha256[:12]} ({challenger.losses.size} examples) "
            f"and champion on {champion.evaluation_sha256[:12]} ({champion.losses.size} examples); the gate compares "
            "example by example: evaluate the champion on the challenger's set"
        )


def _improvement_checks(challenger: Answers, champion: Answers, spec: ReleaseSpec, seed: int) -> list[Check]:
    metric = spec.metric or challenger.metrics[0]
    size = improvement_check(metric, metric_of(challenger, metric), metric_of(champion, metric), spec)
    if not spec.confidence:
        return [size]
    return [size, _certainty_check(improvement_interval(challenger, champion, metric, spec.confidence, seed))]


def improvement_check(metric: str, now: float, before: float, spec: ReleaseSpec) -> Check:
    """Check that a metric is better than the champion's, and by as much as is asked for."""
    gain = (before - now) if metric in LOWER_IS_BETTER else (now - before)
    needed = f"at least {spec.min_improvement:g}" if spec.min_improvement else "more than 0"
    return Check(
        name=f"{metric} improvement",
        value=gain,
        threshold=spec.min_improvement,
        passed=gain > 0 and gain >= spec.min_improvement - _ROUNDING,
        reason=f"{metric} is {now:.4f} against the champion's {before:.4f}, an improvement of {gain:+.4f}; "
        f"needed {needed}",
    )


def _certainty_check(gain: Interval) -> Check:
    certain = gain.low > 0
    return Check(
        name=f"lower end of the {gain.confidence:.0%} interval",
        value=gain.low,
        threshold=0.0,
        passed=certain,
        reason=f"the paired {gain.confidence:.0%} interval of the improvement is {gain.low:+.4f} to {gain.high:+.4f}, "
        f"which {'lies' if certain else 'does not lie'} above 0",
    )


def _slice_check(challenger: Answers, champion: Answers, spec: ReleaseSpec, slices: Sequence[str]) -> Check:
    """Compare accuracy slice by slice; the check's value is the largest fall."""
    if len(slices) != challenger.losses.size:
        raise ReleaseError(
            f"{len(slices)} slice names were given for {challenger.losses.size} evaluated examples; needed one each"
        )
    names, members = np.unique(np.asarray(slices, dtype=str), return_inverse=True)
    sizes = np.bincount(members)
    falls = np.bincount(members, weights=champion.correct - challenger.correct) / sizes
    worst = int(falls.argmax())
    beyond = [i for i in np.argsort(-falls, kind="stable") if falls[i] > spec.max_slice_regression]
    listed = ", ".join(f"{names[i]} {falls[i]:.4f} (of {sizes[i]} examples)" for i in beyond[:5])
    reason = (
        f"accuracy fell beyond the allowed {spec.max_slice_regression:g} on {len(beyond)} of {names.size} slices: "
        f"{listed}{', …' if len(beyond) > 5 else ''}"
        if beyond
        else f"accuracy fell on no slice by more than {spec.max_slice_regression:g}; the worst of {names.size} is "
        f"{names[worst]} at {-falls[worst]:+.4f} (of {sizes[worst]} examples)"
    )
    return Check("largest fall on a slice", float(falls[worst]), spec.max_slice_regression, not beyond, reason)
