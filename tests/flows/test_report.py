"""`fedpipe report`: one page from the records of a run, that needs nothing beside it."""

import re
from html.parser import HTMLParser
from pathlib import Path

from commands import Command, FinishedRun

from tasks.mlflow_client import connect

VOID = {"meta", "br", "link", "img", "hr", "input"}


class Checker(HTMLParser):
    """Collects tags and addresses, and notices an element that is closed out of order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_whole_and_self_contained(finished: FinishedRun, fedpipe: Command, tmp_path: Path) -> None:
    page = tmp_path / "pages" / "first.html"
    outcome = fedpipe("report", "first", "--store", finished.result["store"], "--out", page, "--json")
    assert outcome.document == {"run": "first", "report": str(page)}
    text, checker = page.read_text(encoding="utf-8"), Checker()
    checker.feed(text)
    assert checker.open == []
    assert checker.addresses == []
    assert not {"script", "link", "img"} & checker.seen
    assert not re.findall(r"https?://|url\(|@import", text)
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    assert headings == [
        "Learning",
        "Plan",
        "Rounds, second by second",
        "Bytes",
        "Where training pays",
        "Ranks chosen",
        "Refused updates",
        "Exports",
        "Gate",
        "Lineage",
    ]
    assert finished.result["adapter_sha256"] in text
    assert "tiny version 1 promoted to champion" in text


def test_same_page_is_in_mlflow(finished: FinishedRun, fedpipe: Command, tmp_path: Path) -> None:
    tracking = finished.result["tracking"]
    kept = connect(tracking["uri"]).download_artifacts(tracking["run_id"], "report.html", str(tmp_path))
    page = tmp_path / "again.html"
    fedpipe("report", "first", "--store", finished.result["store"], "--out", page)
    assert Path(kept).read_text(encoding="utf-8") == page.read_text(encoding="utf-8")


def test_report_of_an_unknown_run_is_refused(finished: FinishedRun, fedpipe: Command) -> None:
    outcome = fedpipe("report", "nothing", "--store", finished.result["store"])
    assert outcome.exit_code == 2
    assert "run nothing is not in" in outcome.stderr


def test_page_that_cannot_be_written_is_told(finished: FinishedRun, fedpipe: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    outcome = fedpipe("report", "first", "--store", finished.result["store"], "--out", tmp_path / "file" / "page.html")
    assert outcome.exit_code == 1
    assert "choose another place with --out" in outcome.stderr
