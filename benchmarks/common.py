"""How every benchmark prints: tables and verdicts for a person, or with `--json` one object that holds both."""

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

Check = dict[str, Any]


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that knows `--json`."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", action="store_true", help="print one JSON object")
    return made


def at_most(name: str, value: float, target: float) -> Check:
    """A check that holds when the value is no larger than the target."""
    return {"name": name, "value": value, "target": target, "ok": value <= target}


def at_least(name: str, value: float, target: float) -> Check:
    """A check that holds when the value is no smaller than the target."""
    return {"name": name, "value": value, "target": target, "ok": value >= target}


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown that also reads well as it is; first column left, the others right."""
    widths = [max(len(line[column]) for line in (head, *rows)) for column in range(len(head))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(f"| {' | '.join(_aligned(line, widths))} |" for line in (head, rule, *rows))


def _aligned(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]


def finish(as_json: bool, results: Mapping[str, Any], checks: Sequence[Check], text: str) -> None:
    """Print the results and checks as one JSON object, or the text with a line per check."""
    if as_json:
        print(json.dumps({**results, "checks": list(checks)}))
        return
    print(text)
    for check in checks:
        print(told(check))


def told(check: Check) -> str:
    """A check in a line."""
    verdict = "ok" if check["ok"] else "MISSED"
    return f"{check['name']}: {check['value']:.4g} (target {check['target']:g}) {verdict}"
