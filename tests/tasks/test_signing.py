"""A store others can write to: forged, copied or altered records are refused with their reasons; the round goes on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_steps import coordinator_at

from fedpipe_core.config import FederationConfig
from fedpipe_core.edge_config import EdgeConfig, signing_key_at_edge
from fedpipe_core.errors import ConfigError, QuorumError, SignatureError
from fedpipe_core.plan_schemas import FederationPlan
from fedpipe_core.schemas import GlobalRecord
from fedpipe_core.signatures import SigningKey, new_key, save_key, sign_record, unsigned
from tasks import edge, federation
from tasks.coordinator import Coordinator
from tasks.edge import EdgeSession, Machine
from tasks.signing import SIGNING_KEY_VARIABLE

KEYS = {name: new_key() for name in ("coordinator", "east", "north", "west", "stranger")}


@pytest.fixture(scope="session")
def signed_config(tiny_config: FederationConfig) -> FederationConfig:
    """The tiny federation with every edge on a machine of its own, each with a key."""
    edges = tuple(
        found.model_copy(update={"work_pool": "edges", "public_key": KEYS[found.edge_id].public})
        for found in tiny_config.edges
    )
    signing = tiny_config.signing.model_copy(update={"mode": "required", "coordinator_key": KEYS["coordinator"].public})
    return tiny_config.model_copy(update={"edges": edges, "signing": signing})


@pytest.fixture
def coordinator(
    signed_config: FederationConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_logger_off: None
) -> Coordinator:
    """A coordinator that signs."""
    save_key(KEYS["coordinator"], tmp_path / "coordinator.pem")
    monkeypatch.setenv(SIGNING_KEY_VARIABLE, str(tmp_path / "coordinator.pem"))
    return coordinator_at(signed_config, tmp_path / "store")


@pytest.fixture
def sessions(coordinator: Coordinator) -> dict[str, EdgeSession]:
    """Edges that sign."""
    return {spec.edge_id: session(coordinator, spec.edge_id, KEYS[spec.edge_id]) for spec in coordinator.config.edges}


def session(coordinator: Coordinator, edge_id: str, key: SigningKey | None) -> EdgeSession:
    spec = next(found for found in coordinator.config.edges if found.edge_id == edge_id)
    machine = Machine(signing_key=key)
    return EdgeSession(coordinator.config, spec, coordinator.store, coordinator.keys, machine)


@pytest.fixture
def plan(coordinator: Coordinator, sessions: dict[str, EdgeSession]) -> FederationPlan:
    """The plan of a signed federation whose round 1 is closed and whose round 2 every edge answered."""
    federation.open_federation(coordinator.config, coordinator.store, coordinator.keys, resume=False)
    for found in sessions.values():
        edge.profile.fn(found, coordinator.shape)
    planned = federation.plan.fn(coordinator)
    federation.publish_first_adapter.fn(coordinator, planned)
    for index in (1, 2):
        for found in sessions.values():
            edge.train_round.fn(found, index)
        if index == 1:
            federation.aggregate_round.fn(coordinator, planned, index)
    return planned


Change = Callable[[dict[str, Any]], dict[str, Any]]


def rewrite(coordinator: Coordinator, key: str, change: Change) -> None:
    """What someone with write access to the store does."""
    document = json.loads(coordinator.store.get(key))
    coordinator.store.put(key, json.dumps(change(document)).encode())


def dropped(coordinator: Coordinator, plan: FederationPlan) -> dict[str, str]:
    """Whom round 2 drops, and why; the others count."""
    made: GlobalRecord = federation.aggregate_round.fn(coordinator, plan, 2)
    assert set(made.counted) == set(plan.edges) - set(made.dropped)
    return made.dropped


def test_signed_round_counts_everyone(coordinator: Coordinator, plan: FederationPlan) -> None:
    assert dropped(coordinator, plan) == {}


def test_altered_update_is_refused(coordinator: Coordinator, plan: FederationPlan) -> None:
    rewrite(coordinator, coordinator.keys.update_record(2, "east"), lambda found: found | {"num_examples": 10**6})
    (reason,) = dropped(coordinator, plan).values()
    assert "run/rounds/0002/updates/east.json does not match its signature by ed25519:" in reason


def test_flipped_byte_of_the_data_is_refused(coordinator: Coordinator, plan: FederationPlan) -> None:
    key = coordinator.keys.update_data(2, "east")
    data = bytearray(coordinator.store.get(key))
    data[-1] ^= 1
    coordinator.store.put(key, bytes(data))
    assert "but its record promises" in dropped(coordinator, plan)["east"]


def test_replay_of_last_rounds_update_is_refused(coordinator: Coordinator, plan: FederationPlan) -> None:
    keys, store = coordinator.keys, coordinator.store
    store.put(keys.update_record(2, "east"), store.get(keys.update_record(1, "east")))
    assert "was signed for run/rounds/0001/updates/east.json and copied here" in dropped(coordinator, plan)["east"]


def test_swapped_updates_are_both_refused(coordinator: Coordinator, plan: FederationPlan) -> None:
    keys, store = coordinator.keys, coordinator.store
    east, west = (store.get(keys.update_record(2, edge_id)) for edge_id in ("east", "west"))
    store.put(keys.update_record(2, "east"), west)
    store.put(keys.update_record(2, "west"), east)
    config = coordinator.config.model_copy(update={"min_edges": 1})
    coordinator.config = config
    reasons = dropped(coordinator, plan)
    assert f"is signed by {KEYS['west'].public}, needed {KEYS['east'].public}" in reasons["east"]
    assert f"is signed by {KEYS['east'].public}, needed {KEYS['west'].public}" in reasons["west"]


@pytest.mark.parametrize(
    ("forge", "words"),
    [
        (unsigned, "is not signed, needed the signature of ed25519:"),
        (
            lambda found: sign_record(unsigned(found), "run/rounds/0002/updates/east.json", KEYS["stranger"]),
            f"is signed by {KEYS['stranger'].public}, needed {KEYS['east'].public}",
        ),
    ],
)
def test_missing_and_wrong_keys_are_refused(
    coordinator: Coordinator, plan: FederationPlan, forge: Change, words: str
) -> None:
    rewrite(coordinator, coordinator.keys.update_record(2, "east"), forge)
    assert words in dropped(coordinator, plan)["east"]


def test_profile_of_a_stranger_is_no_profile(coordinator: Coordinator, plan: FederationPlan, heard: list[str]) -> None:
    rewrite(coordinator, coordinator.keys.profile("east"), unsigned)
    assert set(federation.read_profiles(coordinator)) == {"north", "west"}
    assert "profiles/east.json is not signed" in heard[-1]


def test_edge_obeys_no_plan_and_trains_no_adapter_of_a_stranger(coordinator: Coordinator, plan: FederationPlan) -> None:
    rewrite(coordinator, coordinator.keys.plan, lambda found: found | {"round_seconds": 9.0})
    with pytest.raises(SignatureError, match=r"run/plan.json does not match its signature"):
        session(coordinator, "east", KEYS["east"]).is_planned()
    rewrite(coordinator, coordinator.keys.global_record(2), unsigned)
    with pytest.raises(SignatureError, match=r"rounds/0002/global.json is not signed"):
        edge.read_global(coordinator.store, coordinator.keys, 2, coordinator.config.coordinator_signs)


def test_signatures_take_too_few_edges_for_what_they_are(coordinator: Coordinator, plan: FederationPlan) -> None:
    for edge_id in ("east", "north"):
        rewrite(coordinator, coordinator.keys.update_record(2, edge_id), unsigned)
    with pytest.raises(QuorumError, match=r"round 2 has 1 updates that count.*east.json is not signed"):
        federation.aggregate_round.fn(coordinator, plan, 2)


def test_coordinator_needs_the_private_key_the_config_lists(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(SIGNING_KEY_VARIABLE)
    with pytest.raises(ConfigError, match="FEDPIPE_SIGNING_KEY names no file; set it"):
        _ = coordinator.signing_key
    save_key(KEYS["stranger"], tmp_path / "stranger.pem")
    monkeypatch.setenv(SIGNING_KEY_VARIABLE, str(tmp_path / "stranger.pem"))
    with pytest.raises(ConfigError, match=r"names .*stranger.pem with ed25519:"):
        _ = coordinator.signing_key


def own(tmp_path: Path, key: str | None, **changes: Any) -> EdgeConfig:
    if key is not None:
        save_key(KEYS[key], tmp_path / "edge.pem")
        changes["key"] = str(tmp_path / "edge.pem")
    document = {"edge_id": "east", "data": {"train": "rows.jsonl"}, "coordinator_key": KEYS["coordinator"].public}
    return EdgeConfig.model_validate(document | changes)


def test_edge_and_federation_agree_on_keys(signed_config: FederationConfig, tmp_path: Path) -> None:
    found = signing_key_at_edge(signed_config, own(tmp_path, "east"))
    assert found is not None
    assert found.public == KEYS["east"].public


@pytest.mark.parametrize(
    ("key", "changes", "words"),
    [
        (None, {}, "needs signed records and edge.yaml names no key; make one"),
        ("stranger", {}, "the federation lists ed25519:"),
        ("east", {"coordinator_key": None}, "edge.yaml says coordinator_key None; ask its coordinator"),
        ("east", {"coordinator_key": KEYS["stranger"].public}, "edge.yaml says coordinator_key ed25519:"),
    ],
)
def test_edge_that_does_not_agree_is_told(
    signed_config: FederationConfig, tmp_path: Path, key: str | None, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        signing_key_at_edge(signed_config, own(tmp_path, key, **changes))


def test_unsigned_federation_signs_nothing(tiny_config: FederationConfig, tmp_path: Path) -> None:
    assert signing_key_at_edge(tiny_config, own(tmp_path, None)) is None
    assert tiny_config.edge_signs("east") is tiny_config.coordinator_signs is None
