"""Which version of a released model is champion, who it replaced, and the way back.

MLflow promises that a version number is given once and that an alias names one version; it has no compare-and-swap. Two
releases at the same time are therefore settled by announcement: a version that passed the gate first writes whom it
replaces, then looks for other announcements, moves the alias to the best of them and repeats until none is new. Who
writes the alias last has seen every announcement made before, so one champion is left and it was weighed against all.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpipe_core.errors import ReleaseError
from fedpipe_core.gate import Check, Decision
from tasks.logged_model import MODEL_PARENT, fetch_files, log_model
from tasks.mlflow_client import connect, speaking_to
from tasks.tracking import TrackedRun

CHAMPION, CHALLENGER = "champion", "challenger"
ADAPTER_TAG, BASE_TAG = "fedpipe.adapter_sha256", "fedpipe.base_sha256"
CONFIG_TAG, MANIFEST_TAG = "fedpipe.config_sha256", "fedpipe.manifest_sha256"
VERDICT_TAG, REASONS_TAG, DECISION_TAG = "fedpipe.verdict", "fedpipe.reasons", "fedpipe.decision"
REPLACED_TAG, RESTORED_TAG = "fedpipe.replaced", "fedpipe.restored_over"
NO_VERSION = "none"
_DESCRIPTION_CHARACTERS = 5000  # the width of MLflow's column; the whole card lies in the version's README.md


@dataclass(frozen=True)
class ModelVersion:
    """One version of a registered model, as it was when it was read."""

    uri: str
    name: str
    version: int
    run_id: str
    tags: Mapping[str, str]

    @property
    def adapter_sha256(self) -> str | None:
        """Hash of the global adapter that was merged into this version."""
        return self.tags.get(ADAPTER_TAG)


Gate = Callable[[ModelVersion, ModelVersion | None], Decision]


def register_model(run: TrackedRun, name: str, model_folder: Path, tags: Mapping[str, str], card: str) -> ModelVersion:
    """Register a merged model as a new version of `name`, or return the version that holds the same adapter and base.

    `tags` needs ADAPTER_TAG and BASE_TAG. Files are uploaded before the version is created, so no version is ever
    without its model. Raises TrackingError when MLflow cannot be reached.
    """
    for known in versions(run.uri, name):
        if all(known.tags.get(tag) == tags[tag] for tag in (ADAPTER_TAG, BASE_TAG)):
            return known
    logged = log_model(run, name, model_folder, card)
    with speaking_to(run.uri):
        client = connect(run.uri)
        if not client.search_registered_models(filter_string=f"name = '{name}'"):
            _create_registered_model(client, name)
        created = client.create_model_version(
            name,
            source=logged.location,  # `models:/ID` would be looked up at the process-wide tracking URI
            run_id=run.run_id,
            tags=dict(tags),
            description=card[:_DESCRIPTION_CHARACTERS],
            model_id=logged.model_id,
        )
    return _model_version(run.uri, created)


def champion(uri: str, name: str) -> ModelVersion | None:
    """Return the version that alias `champion` names, or None when there is none."""
    with speaking_to(uri):
        client = connect(uri)
        found = client.search_registered_models(filter_string=f"name = '{name}'")
        number = found[0].aliases.get(CHAMPION) if found else None
        return None if number is None else _model_version(uri, client.get_model_version(name, str(number)))


def find_version(uri: str, address: str) -> ModelVersion:
    """Return the version that `MODEL@ALIAS` or `MODEL@NUMBER` names; the champion when only a model is named.

    Raises ReleaseError when there is no such model, alias or version.
    """
    name, _, wanted = address.partition("@")
    wanted = wanted or CHAMPION
    with speaking_to(uri):
        client = connect(uri)
        found = client.search_registered_models(filter_string=f"name = '{name}'")
        known: dict[str, str] = dict(found[0].aliases) if found else {}
    numbers = {str(version.version): version for version in versions(uri, name)}
    version = numbers.get(str(known.get(wanted, wanted)))
    if version is None:
        there = f"versions {', '.join(numbers)}; aliases {', '.join(sorted(known)) or 'none'}" if numbers else "nothing"
        raise ReleaseError(f"{uri} has no {name}@{wanted}; registered under {name!r}: {there}")
    return version


def aliases(version: ModelVersion) -> tuple[str, ...]:
    """Return the aliases that name a version now, sorted."""
    with speaking_to(version.uri):
        found = connect(version.uri).get_registered_model(version.name).aliases
    return tuple(sorted(alias for alias, number in found.items() if int(number) == version.version))


def versions(uri: str, name: str) -> list[ModelVersion]:
    """Return every version of a registered model, oldest first; none when the model is unknown."""
    with speaking_to(uri):
        client, token, found = connect(uri), None, []
        while True:
            page = client.search_model_versions(f"name = '{name}'", page_token=token)
            found += [_model_version(uri, version) for version in page]
            token = page.token
            if not token:
                return sorted(found, key=lambda version: version.version)


def fetch_model(version: ModelVersion, folder: Path) -> Path:
    """Download a version's model folder in Hugging Face format into `folder`, and return where it lies."""
    with speaking_to(version.uri):
        location = connect(version.uri).get_model_version(version.name, str(version.version)).source
    [model_folder] = (fetch_files(version.uri, location, folder) / MODEL_PARENT).iterdir()
    return model_folder


def promote(challenger: ModelVersion, gate: Gate) -> Decision:
    """Make `challenger` the champion when `gate(challenger, champion)` says so; record verdict and reasons with it.

    A version whose adapter is already champion changes nothing, and one that was rolled back is not promoted again.
    `gate` may be asked about other versions released at the same time.
    """
    uri, name = challenger.uri, challenger.name
    _set_alias(challenger, CHALLENGER)
    closed = {version.version for version in versions(uri, name) if _is_closed(version)}  # before the champion is read
    current = champion(uri, name)
    settled = _settled_before(challenger, current)
    if settled is not None:
        return settled
    decision = gate(challenger, current)
    if decision.promoted:
        _tag(challenger, {REPLACED_TAG: NO_VERSION if current is None else str(current.version)})
        winner = _settle(challenger, closed, gate)
        decision = decision if winner.version == challenger.version else _lost(decision, winner)
    _record(challenger, "promoted" if decision.promoted else "refused", decision)
    return decision


def rollback(uri: str, name: str) -> ModelVersion:
    """Give alias `champion` back to the version the present champion replaced, and record it with both.

    Raises ReleaseError when there is no champion, or none before it.
    """
    current = champion(uri, name)
    if current is None:
        raise ReleaseError(f"model {name} has no champion to roll back; `fedpipe release RUN` makes one")
    number = current.tags.get(REPLACED_TAG, NO_VERSION)
    known = {version.version: version for version in versions(uri, name)}
    if number == NO_VERSION or int(number) not in known:
        raise ReleaseError(
            f"champion version {current.version} of model {name} replaced "
            f"{'no version' if number == NO_VERSION else f'version {number}, which was deleted'}; "
            "there is nothing to roll back to"
        )
    # The verdict goes first: a rollback cut short here is completed by running it again.
    _tag(current, {VERDICT_TAG: "rolled back", REASONS_TAG: f"rolled back to version {number}"})
    _tag(known[int(number)], {RESTORED_TAG: str(current.version)})
    _set_alias(known[int(number)], CHAMPION)
    return known[int(number)]


def _settled_before(challenger: ModelVersion, current: ModelVersion | None) -> Decision | None:
    """Return the decision where no gate is needed: nothing new to judge, or judged for good."""
    if current is not None and current.version == challenger.version:
        return _recorded(current)
    if challenger.tags.get(VERDICT_TAG) == "rolled back":
        return _refusal(f"version {challenger.version} was rolled back; a version that was is not promoted again")
    if current is not None and current.adapter_sha256 == challenger.adapter_sha256:
        decision = _refusal(f"champion version {current.version} holds the same adapter; nothing changed")
        _record(challenger, "unchanged", decision)
        return decision
    return None


def _is_closed(version: ModelVersion) -> bool:
    """Whether a version's promotion is over, so that the champion read afterwards already reflects it."""
    return REPLACED_TAG in version.tags and VERDICT_TAG in version.tags


def _settle(challenger: ModelVersion, closed: set[int], gate: Gate) -> ModelVersion:
    """Move the alias to the best version announced at the same time; see the module's docstring."""
    weighed: set[int] = set()
    winner = challenger
    while (rivals := _rivals(challenger, closed)).keys() != weighed:
        weighed = set(rivals)
        winner = rivals[min(rivals)]
        for rival in rivals.values():  # by version number, so that every release reaches the same winner
            if rival.version != winner.version and gate(rival, winner).promoted:
                winner = rival
        _set_alias(winner, CHAMPION)
    return winner


def _rivals(challenger: ModelVersion, closed: set[int]) -> dict[int, ModelVersion]:
    """Return the challenger and every version that announced itself and was not closed when the champion was read."""
    return {
        version.version: version
        for version in versions(challenger.uri, challenger.name)
        if version.version == challenger.version or (REPLACED_TAG in version.tags and version.version not in closed)
        if version.tags.get(VERDICT_TAG) != "rolled back"
    }


def _lost(decision: Decision, winner: ModelVersion) -> Decision:
    reason = f"version {winner.version}, released at the same time, was judged better"
    check = Check("releases at the same time", float(winner.version), None, False, reason)
    return Decision(False, (*decision.checks, check), (reason,))


def _refusal(reason: str) -> Decision:
    return Decision(False, (), (reason,))


def _recorded(version: ModelVersion) -> Decision:
    """Return the decision kept with a champion; one without (its alias set by hand) counts as promoted."""
    document = json.loads(version.tags.get(DECISION_TAG, "null"))
    if document is None:
        return Decision(True, (), (f"version {version.version} is champion already",))
    checks = tuple(Check(**check) for check in document["checks"])
    return Decision(document["promoted"], checks, tuple(document["reasons"]))


def _record(version: ModelVersion, verdict: str, decision: Decision) -> None:
    reasons = "; ".join(decision.reasons)
    _tag(version, {VERDICT_TAG: verdict, REASONS_TAG: reasons, DECISION_TAG: json.dumps(decision.as_document())})


def _tag(version: ModelVersion, tags: Mapping[str, str]) -> None:
    with speaking_to(version.uri):
        for key, value in tags.items():
            connect(version.uri).set_model_version_tag(version.name, str(version.version), key, value)


def _set_alias(version: ModelVersion, alias: str) -> None:
    with speaking_to(version.uri):
        client = connect(version.uri)
        try:
            client.set_registered_model_alias(version.name, alias, str(version.version))
        except Exception:  # two first uses of an alias at the same time both insert its row; now it is there
            client.set_registered_model_alias(version.name, alias, str(version.version))


def _create_registered_model(client: Any, name: str) -> None:
    try:
        client.create_registered_model(name)
    except Exception:  # another release may have been first
        if not client.search_registered_models(filter_string=f"name = '{name}'"):
            raise


def _model_version(uri: str, version: Any) -> ModelVersion:
    return ModelVersion(uri, version.name, int(version.version), version.run_id, dict(version.tags))
