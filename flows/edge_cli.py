"""The `fedpipe edge` commands: what is done at an edge."""

import json
from pathlib import Path
from typing import Annotated

import typer

from flows.cli_common import AsJson, explained, print_result, showing

edge_app = typer.Typer(help="What is done at an edge.", no_args_is_help=True, rich_markup_mode=None)
EdgeConfigPath = Annotated[Path, typer.Argument(help="This machine's edge.yaml", show_default=False)]


@edge_app.command()
def keygen(
    path: Annotated[Path, typer.Argument(help="File for the private key, which must not exist", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Make a key that signs an edge's, or the coordinator's, records, and print its public part."""
    with explained(as_json):
        from fedpipe_core.signatures import new_key, save_key

        key = new_key()
        save_key(key, path)
        print_result({"key": str(path), "public_key": key.public}, as_json, lambda document: key.public)


@edge_app.command("check")
def check_command(
    config: EdgeConfigPath,
    run_name: Annotated[
        str | None, typer.Option("--run", help="Print the rows in tokens, and the profile it would send to a run")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check this edge's rows, device, key and store, and print what it would report; nothing is published."""
    with explained(as_json), showing():
        from fedpipe_core.edge_config import load_edge_config
        from tasks.edge_check import check_edge

        document = check_edge(load_edge_config(config), run_name)
        print_result(document, as_json, lambda found: json.dumps(found, indent=2))


@edge_app.command()
def worker(
    config: EdgeConfigPath,
    pool: Annotated[str, typer.Option(help="Work pool that the federation's config names for this edge")] = "edges",
) -> None:
    """Take up what a coordinator sends to this edge's queue, until stopped; Prefect's server may start later."""
    with explained(as_json=False):
        from flows.edge_worker import run_worker

        try:
            run_worker(config, pool)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
