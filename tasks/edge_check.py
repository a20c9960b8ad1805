"""What an edge finds out before it serves: its rows, device, keys and store, and the profile it would send."""

from pathlib import Path
from typing import Any

import torch

from fedpipe_core.edge_config import EdgeConfig
from fedpipe_core.errors import ConfigError
from fedpipe_core.free_memory import free_memory_bytes
from fedpipe_core.profiling import profile_edge
from fedpipe_core.rows import read_rows
from fedpipe_core.signatures import load_key
from fedpipe_core.token_summary import summarize_tokens
from tasks.served_edge import choose_device, load_base, open_session
from tasks.storage import open_store


def check_edge(own: EdgeConfig, run: str | None) -> dict[str, Any]:
    """Check an edge's own config, and with `run` what it would report to that run and how its rows look in tokens.

    Nothing is published.

    Raises the error that would stop the edge.
    """
    choose_device(own)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, Any] = {
        "edge_id": own.edge_id,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "memory_bytes": min(free_memory_bytes(device), own.memory_bytes or 2**63),
        "threads": own.threads or torch.get_num_threads(),
        "public_key": None if own.key is None else load_key(Path(own.key)).public,
        "store": None if own.store is None else open_store(own.store, write=False).root,
    }
    if run is None:
        return {**found, **_rows(own)}
    if own.store is None:
        raise ConfigError(f"{own.edge_id}: --run needs the address of the store; set `store` in edge.yaml")
    return found | _told(own, run, own.store)


def _told(own: EdgeConfig, run: str, store: str) -> dict[str, Any]:
    """What the edge would report to a run, and what it alone sees of its rows."""
    session, record = open_session(own, run, store)
    load_base(session, record)
    torch.set_num_threads(session.machine.threads)
    base, limits = session.profile_base, session.limits
    profile = profile_edge(own.edge_id, base, session.shape, session.data, session.config, limits)
    tokens = summarize_tokens(session.data, base.tokenizer)
    return {"tokens": tokens, "profile": profile.model_dump(mode="json")}


def _rows(own: EdgeConfig) -> dict[str, Any]:
    """How many rows there are, and of which columns: what can be told without a federation."""
    rows = [sorted(map(str, row.values)) for row in read_rows(own.data.train)]
    found = {"rows": len(rows), "columns": rows[0] if rows else []}
    judged = {"validation_rows": sum(1 for _ in read_rows(own.data.validation))} if own.data.validation else {}
    return found | judged
