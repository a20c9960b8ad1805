"""Someone who can write to the store meddles with a running federation: each forgery is refused for what it is."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from commands import RUN_SECONDS, run_to_end, running, wait_for_object
from remote_federation import REMOTE, EdgeSite, Keys, write_edge_config
from tiny_federation import EDGES

from fedpipe_core.signatures import new_key, sign_record, unsigned

pytestmark = pytest.mark.slow

CHANGES = {"rounds": 7, "min_edges": 1, "remote.poll_seconds": 0.1, "remote.lease_seconds": 40}
STRANGER = new_key()


def rewrite(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_bytes()))))


def flip_a_byte(updates: Path) -> None:
    data = bytearray((updates / "east.safetensors").read_bytes())
    data[-1] ^= 1
    (updates / "east.safetensors").write_bytes(data)


def replay_the_last_round(updates: Path) -> None:
    index = int(updates.parent.name)
    for name in ("east.json", "east.safetensors"):
        shutil.copy(updates.parent.with_name(f"{index - 1:04d}") / "updates" / name, updates / name)


def swap_two_edges(updates: Path) -> None:
    for suffix in ("json", "safetensors"):
        east, west = updates / f"east.{suffix}", updates / f"west.{suffix}"
        content = east.read_bytes(), west.read_bytes()
        west.write_bytes(content[0])
        east.write_bytes(content[1])


def take_the_signature_away(updates: Path) -> None:
    rewrite(updates / "east.json", unsigned)


def sign_with_another_key(updates: Path) -> None:
    place = "/".join((updates / "east.json").parts[-5:])
    rewrite(updates / "east.json", lambda found: sign_record(unsigned(found), place, STRANGER))


def claim_more_examples(updates: Path) -> None:
    rewrite(updates / "east.json", lambda found: found | {"num_examples": 10**6})


# What is done to round 1, 2, ..., and the words with which east's update is refused.
ATTACKS = (
    (flip_a_byte, "but its record promises"),
    (replay_the_last_round, "was signed for tampered/rounds/0001/updates/east.json and copied here"),
    (swap_two_edges, "is signed by ed25519:"),
    (take_the_signature_away, "is not signed, needed the signature of ed25519:"),
    (sign_with_another_key, f"is signed by {STRANGER.public}, needed ed25519:"),
    (claim_more_examples, "does not match its signature by ed25519:"),
)


def test_every_forgery_is_refused_for_what_it_is_and_the_round_goes_on(
    remote_environment: dict[str, str], federation: Path, sites: dict[str, EdgeSite]
) -> None:
    store = federation / "out/store/tampered"
    arguments = ("run", federation / "federation.yaml", "--run", "tampered", "--no-release", "--json")
    with running(remote_environment, federation, *arguments) as process:
        coordinator = psutil.Process(process.pid)
        for index, (attack, _) in enumerate(ATTACKS, start=1):
            updates = store / f"rounds/{index:04d}/updates"
            wait_for_object(updates.with_name("global.json"))
            coordinator.suspend()  # so that it reads the updates after the attack
            for edge_id in REMOTE:
                wait_for_object(updates / f"{edge_id}.json")
            attack(updates)
            if index == len(ATTACKS):
                (east,) = sites["east"].served()
                east.suspend()
            coordinator.resume()
        forged = store / f"rounds/{len(ATTACKS) + 1:04d}/global.json"
        wait_for_object(forged)
        coordinator.suspend()
        signed = forged.read_bytes()
        rewrite(forged, unsigned)  # east is told to train an adapter that its coordinator did not sign
        east.resume()
        failure = forged.with_name("failures") / "east.json"
        wait_for_object(failure)
        refused = json.loads(failure.read_bytes())["reason"]
        forged.write_bytes(signed)
        coordinator.resume()
        stdout, _ = process.communicate(timeout=RUN_SECONDS)
    assert process.returncode == 0, (federation / "stderr").read_text()
    rounds = json.loads(stdout)["rounds"]
    for entry, (attack, words) in zip(rounds, ATTACKS, strict=False):
        assert words in entry["dropped"]["east"], attack.__name__
        hurt = REMOTE if attack is swap_two_edges else ("east",)
        assert entry["participants"] == [edge_id for edge_id in EDGES if edge_id not in hurt]
    assert "tampered/rounds/0007/global.json is not signed" in refused
    assert rounds[6]["participants"] == list(EDGES)  # who failed before the round was opened tries again


def test_edge_reads_no_federation_that_its_coordinator_did_not_sign(
    remote_environment: dict[str, str], federation: Path, sites: dict[str, EdgeSite], keys: Keys
) -> None:
    store, rows = federation / "out/store", federation / "east.jsonl"
    secrets = {"key": str(keys.path("east")), "coordinator_key": keys.public["coordinator"], "store": str(store)}
    config = write_edge_config(federation / "check", "east", rows, **secrets)
    check = ("edge", "check", config, "--run", "tampered")
    assert run_to_end(remote_environment, federation, *check).exit_code == 0
    rewrite(store / "tampered/federation.json", lambda found: found | {"seed": 4})
    refused = run_to_end(remote_environment, federation, *check)
    assert refused.exit_code == 1
    assert "tampered/federation.json does not match its signature by ed25519:" in refused.stderr
