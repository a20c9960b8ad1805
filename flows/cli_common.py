"""What all commands share: how they end, show progress and print their result."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout")]


@contextmanager
def explained(as_json: bool) -> Iterator[None]:
    """Turn an expected failure into one sentence on stderr and its exit code."""
    from fedpipe_core.errors import FedPipeError

    try:
        yield
    except FedPipeError as error:
        print(f"fedpipe: {error}", file=sys.stderr)
        if as_json:
            print(json.dumps({"status": "failed", "error": str(error)}))
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        print("fedpipe: interrupted; what is finished is kept, --run NAME --resume continues it", file=sys.stderr)
        raise typer.Exit(130) from None


@contextmanager
def showing() -> Iterator[None]:
    """Show progress on stderr, as bars on a terminal; Prefect's API keeps the log that it would print beside them."""
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    from rich.console import Console

    from flows.display import LiveBars, PlainLines
    from tasks import progress

    console = Console(stderr=True)
    if not console.is_terminal:
        with progress.listening(PlainLines()):
            yield
        return
    with LiveBars(console) as bars, progress.listening(bars):
        yield


def print_result(document: dict[str, Any], as_json: bool, render: Callable[[dict[str, Any]], str]) -> None:
    """Print a command's result on stdout: as JSON, or as `render` words it."""
    print(json.dumps(document) if as_json else render(document))
