"""What a report is made from, and what follows from it: colours of edges, the layer and kind of a module."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedpipe_core.plan_schemas import FederationPlan
from fedpipe_core.profile_schemas import EdgeProfile
from fedpipe_core.result_schemas import ReleaseReport
from fedpipe_core.schemas import FederationRecord, GlobalRecord, RoundRecord, UpdateRecord

_BLOCK = re.compile(r"^(?P<stack>.*?)\.(?P<layer>\d+)\.(?P<kind>.+)$")


@dataclass(frozen=True)
class ReportFacts:
    """The records of a run, finished or not. `made` and `updates` have an entry for every closed round."""

    federation: FederationRecord
    plan: FederationPlan
    profiles: Mapping[str, EdgeProfile]
    rounds: Sequence[RoundRecord]
    made: Sequence[GlobalRecord] = ()
    updates: Sequence[Mapping[str, UpdateRecord]] = ()
    baseline: Mapping[str, float] = field(default_factory=dict)
    release: ReleaseReport | None = None

    @property
    def edges(self) -> list[str]:
        """Ids of the edges, in the plan's order, which is the order of their colours."""
        return list(self.plan.edges)

    @property
    def modules(self) -> list[str]:
        """Modules that any edge trains, in the model's order as far as the profiles tell it."""
        known = list(importance(self.profiles))
        planned = self.plan.planned_modules
        return sorted(planned, key=lambda name: known.index(name) if name in known else len(known))

    @property
    def metrics(self) -> Mapping[str, float]:
        """The metrics of the last closed round."""
        return self.rounds[-1].metrics if self.rounds else {}


def place_of(module: str) -> tuple[str, int, str]:
    """Stack, layer and kind of a module: `encoder.layer.3.output.dense` is (`encoder.layer`, 3, `output.dense`).

    A module outside any numbered block has layer 0 and its whole name for a kind.
    """
    found = _BLOCK.match(module)
    return (found["stack"], int(found["layer"]), found["kind"]) if found else ("", 0, module)


def importance(profiles: Mapping[str, EdgeProfile]) -> dict[str, float]:
    """Share of a module in the edges' importance: per edge its scores' sum, averaged over the edges; they sum to 1."""
    names = list(dict.fromkeys(name for profile in profiles.values() for name in profile.scores))
    return {
        name: sum(sum(profile.scores.get(name, ())) for profile in profiles.values()) / len(profiles) for name in names
    }
