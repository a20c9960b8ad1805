import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tiny_models import save_tiny_model

from fedpipe_core.errors import ReleaseError, TrackingError
from fedpipe_core.gate import Check, Decision
from tasks import registry
from tasks.mlflow_client import connect
from tasks.registry import ADAPTER_TAG, BASE_TAG, ModelVersion
from tasks.tracking import TrackedRun, open_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrackedRun:
    uri = f"sqlite:///{tmp_path_factory.mktemp('registry') / 'mlflow.db'}"
    return open_run(uri, "intents", "run-1", {}, {})


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), "bert")


def version(run: TrackedRun, name: str, adapter: str) -> ModelVersion:
    """A registered version without files: aliases and tags are all that promotion touches."""
    client = connect(run.uri)
    registry._create_registered_model(client, name)
    tags = {ADAPTER_TAG: adapter, BASE_TAG: "base"}
    return registry._model_version(run.uri, client.create_model_version(name, "unused", run.run_id, tags))


def quality_gate(run: TrackedRun, before: Callable[[], object] = lambda: None) -> registry.Gate:
    """Judge versions by the number at the end of their adapter's name: `a-7` beats `b-5`."""

    def quality(candidate: ModelVersion) -> float:
        return float(str(candidate.adapter_sha256).rpartition("-")[2])

    def gate(challenger: ModelVersion, current: ModelVersion | None) -> Decision:
        before()
        gain = quality(challenger) - (quality(current) if current else 0)
        check = Check("quality", gain, 0.0, gain > 0, f"quality changed by {gain:+g}")
        return Decision(check.passed, (check,), (check.reason,))

    return gate


def champion_number(run: TrackedRun, name: str) -> int | None:
    current = registry.champion(run.uri, name)
    return current.version if current else None


def refreshed(stale: ModelVersion) -> ModelVersion:
    return next(v for v in registry.versions(stale.uri, stale.name) if v.version == stale.version)


def test_unknown_model_has_neither_versions_nor_champion(run: TrackedRun) -> None:
    assert registry.versions(run.uri, "nobody") == []
    assert registry.champion(run.uri, "nobody") is None


def test_version_is_found_by_alias_by_number_and_by_the_models_name_alone(run: TrackedRun) -> None:
    first, second = version(run, "found", "a-5"), version(run, "found", "b-3")
    for candidate in (first, second):
        registry.promote(candidate, quality_gate(run))
    numbers = {
        address: registry.find_version(run.uri, address).version
        for address in ("found", "found@champion", "found@challenger", "found@2")
    }
    assert numbers == {"found": 1, "found@champion": 1, "found@challenger": 2, "found@2": 2}
    assert registry.aliases(first) == ("champion",)
    with pytest.raises(ReleaseError, match=r"has no found@best; .* versions 1, 2; aliases challenger, champion"):
        registry.find_version(run.uri, "found@best")
    with pytest.raises(ReleaseError, match="has no nobody@champion; registered under 'nobody': nothing"):
        registry.find_version(run.uri, "nobody")


def test_first_version_becomes_champion_and_carries_the_reasons(run: TrackedRun) -> None:
    first = version(run, "first", "a-5")
    decision = registry.promote(first, quality_gate(run))
    assert decision.promoted
    assert champion_number(run, "first") == 1
    tags = refreshed(first).tags
    assert tags[registry.VERDICT_TAG] == "promoted"
    assert tags[registry.REASONS_TAG] == "quality changed by +5"
    assert tags[registry.REPLACED_TAG] == registry.NO_VERSION


def test_worse_version_stays_challenger_and_carries_the_reasons(run: TrackedRun) -> None:
    best, worse = version(run, "worse", "a-5"), version(run, "worse", "b-3")
    registry.promote(best, quality_gate(run))
    decision = registry.promote(worse, quality_gate(run))
    assert decision.reasons == ("quality changed by -2",)
    assert champion_number(run, "worse") == best.version
    assert refreshed(worse).tags[registry.VERDICT_TAG] == "refused"
    assert connect(run.uri).get_model_version_by_alias("worse", "challenger").version == worse.version


def test_equal_adapter_changes_nothing_and_asks_no_gate(run: TrackedRun) -> None:
    best, same = version(run, "same", "a-5"), version(run, "same", "a-5")
    registry.promote(best, quality_gate(run))
    decision = registry.promote(same, lambda challenger, current: pytest.fail("the gate was asked"))
    assert not decision.promoted
    assert decision.reasons == ("champion version 1 holds the same adapter; nothing changed",)
    assert champion_number(run, "same") == best.version


def test_promoting_the_champion_again_returns_the_recorded_decision(run: TrackedRun) -> None:
    best = version(run, "again", "a-5")
    decision = registry.promote(best, quality_gate(run))
    assert registry.promote(best, lambda challenger, current: pytest.fail("the gate was asked")) == decision


def test_rollback_restores_the_version_that_was_replaced_and_records_both(run: TrackedRun) -> None:
    first, second = version(run, "back", "a-5"), version(run, "back", "b-7")
    for candidate in (first, second):
        registry.promote(candidate, quality_gate(run))
    assert registry.rollback(run.uri, "back").version == first.version
    assert champion_number(run, "back") == first.version
    assert refreshed(second).tags[registry.VERDICT_TAG] == "rolled back"
    assert refreshed(first).tags[registry.RESTORED_TAG] == str(second.version)


def test_version_that_was_rolled_back_is_not_promoted_again_but_a_new_one_is(run: TrackedRun) -> None:
    first, second = version(run, "once", "a-5"), version(run, "once", "b-7")
    for candidate in (first, second):
        registry.promote(candidate, quality_gate(run))
    registry.rollback(run.uri, "once")
    refused = registry.promote(refreshed(second), quality_gate(run))
    assert refused.reasons == ("version 2 was rolled back; a version that was is not promoted again",)
    third = version(run, "once", "c-6")
    assert registry.promote(third, quality_gate(run)).promoted
    assert champion_number(run, "once") == third.version


def test_rollback_without_a_champion_or_a_predecessor_is_refused(run: TrackedRun) -> None:
    with pytest.raises(ReleaseError, match="model nobody has no champion to roll back"):
        registry.rollback(run.uri, "nobody")
    registry.promote(version(run, "single", "a-5"), quality_gate(run))
    with pytest.raises(ReleaseError, match="replaced no version; there is nothing to roll back to"):
        registry.rollback(run.uri, "single")


def test_rollback_to_a_deleted_version_is_refused(run: TrackedRun) -> None:
    first, second = version(run, "deleted", "a-5"), version(run, "deleted", "b-7")
    for candidate in (first, second):
        registry.promote(candidate, quality_gate(run))
    connect(run.uri).delete_model_version("deleted", str(first.version))
    with pytest.raises(ReleaseError, match="replaced version 1, which was deleted"):
        registry.rollback(run.uri, "deleted")
    assert champion_number(run, "deleted") == second.version


def test_champion_set_by_hand_is_what_the_next_version_is_judged_against(run: TrackedRun) -> None:
    for adapter in ("a-5", "b-7", "c-9"):
        registry.promote(version(run, "hand", adapter), quality_gate(run))
    connect(run.uri).set_registered_model_alias("hand", "champion", "1")
    fourth = version(run, "hand", "d-6")
    assert registry.promote(fourth, quality_gate(run)).promoted
    assert champion_number(run, "hand") == fourth.version


@pytest.mark.parametrize("order", [("a-7", "b-6", "c-9"), ("c-9", "a-7", "b-6"), ("b-6", "c-9", "a-7")])
def test_releases_at_the_same_time_leave_the_best_as_the_only_champion(run: TrackedRun, order: tuple[str, ...]) -> None:
    name = f"race-{order[0]}"
    registry.promote(version(run, name, "z-5"), quality_gate(run))
    challengers = [version(run, name, adapter) for adapter in order]
    barrier = threading.Barrier(len(challengers))
    decisions: dict[str, Decision] = {}

    def release(challenger: ModelVersion) -> None:
        waited: list[int] = []  # all have read the same champion before the first of them may move the alias

        def wait_once() -> None:
            if not waited:
                waited.append(barrier.wait(timeout=60))

        decisions[str(challenger.adapter_sha256)] = registry.promote(challenger, quality_gate(run, wait_once))

    threads = [threading.Thread(target=release, args=(challenger,)) for challenger in challengers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    current = registry.champion(run.uri, name)
    assert current is not None
    assert current.adapter_sha256 == "c-9"
    assert decisions["c-9"].promoted
    assert len(decisions) == 3


def test_first_releases_at_the_same_time_leave_one_champion(run: TrackedRun) -> None:
    challengers = [version(run, "newborn", f"a-{quality}") for quality in range(1, 7)]
    barrier = threading.Barrier(len(challengers))

    def release(challenger: ModelVersion) -> None:
        barrier.wait(timeout=60)
        registry.promote(challenger, quality_gate(run))

    with ThreadPoolExecutor(len(challengers)) as pool:
        list(pool.map(release, challengers))
    current = registry.champion(run.uri, "newborn")
    assert current is not None
    assert current.adapter_sha256 == "a-6"


def test_slow_release_does_not_displace_a_better_one_that_finished_meanwhile(run: TrackedRun) -> None:
    registry.promote(version(run, "slow", "z-5"), quality_gate(run))
    slow, fast = version(run, "slow", "a-6"), version(run, "slow", "b-9")

    def finish_the_other_first() -> None:
        if champion_number(run, "slow") == 1:
            registry.promote(fast, quality_gate(run))

    decision = registry.promote(slow, quality_gate(run, finish_the_other_first))
    assert champion_number(run, "slow") == fast.version
    assert decision.reasons == ("version 3, released at the same time, was judged better",)
    assert refreshed(slow).tags[registry.VERDICT_TAG] == "refused"


def test_release_cut_short_after_its_announcement_is_completed_by_the_next(run: TrackedRun) -> None:
    registry.promote(version(run, "cut", "z-5"), quality_gate(run))
    cut = version(run, "cut", "a-9")
    registry._tag(cut, {registry.REPLACED_TAG: "1"})
    registry.promote(version(run, "cut", "b-6"), quality_gate(run))
    assert champion_number(run, "cut") == cut.version


def test_same_adapter_is_not_registered_twice(run: TrackedRun, model_folder: Path) -> None:
    tags = {ADAPTER_TAG: "a-1", BASE_TAG: "base"}
    first = registry.register_model(run, "twice", model_folder, tags, "# Card")
    assert registry.register_model(run, "twice", model_folder, tags, "# Card") == first
    other = registry.register_model(run, "twice", model_folder, {**tags, ADAPTER_TAG: "b-2"}, "# Card")
    assert other.version == 2


def test_upload_that_fails_leaves_no_version_and_a_failed_model(model_folder: Path, tmp_path: Path) -> None:
    run = open_run(f"sqlite:///{tmp_path / 'mlflow.db'}", "disk", "run-1", {}, {})
    (tmp_path / "mlartifacts").write_text("a file where the artifact folder should be")
    with pytest.raises(TrackingError, match="did not answer or refused"):
        registry.register_model(run, "unlucky", model_folder, {ADAPTER_TAG: "a", BASE_TAG: "b"}, "# Card")
    assert registry.versions(run.uri, "unlucky") == []
    client = connect(run.uri)
    experiment_id = client.get_run(run.run_id).info.experiment_id
    assert [str(model.status) for model in client.search_logged_models([experiment_id])] == ["FAILED"]
