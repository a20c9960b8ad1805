"""Make the tables, verdicts and pictures of docs/evidence.md anew from the runs that are kept.

Run `python benchmarks/evidence_page.py`. A block of the page runs from `<!-- evidence.py ARGUMENTS -->` to
`<!-- end -->` and shows what these arguments print; a run that is not kept is an error.
"""

import re
import shlex
from pathlib import Path

from common import told
from evidence import parse, pieces, sections
from federations import FOLDER, IMAGES

PAGE = FOLDER.parent / "docs" / "evidence.md"
RESULTS = FOLDER / "results"
BLOCK = re.compile(r"<!-- evidence\.py (.*?) -->\n.*?<!-- end -->", re.DOTALL)


def made_anew(page: str, images: Path) -> str:
    """The page with every block as the kept runs have it; pictures are written into `images`."""
    return BLOCK.sub(lambda found: f"<!-- evidence.py {found[1]} -->\n{_block(found[1], images)}<!-- end -->", page)


def _block(arguments: str, images: Path) -> str:
    options = parse([*shlex.split(arguments), "--results", str(RESULTS)])
    parts = []
    for piece in pieces(options.part, list(sections(options, kept_only=True)), images):
        verdicts = [f"- {told(check)}" for check in piece.checks]
        shown = [f"![{picture.stem.replace('-', ' ')}](images/{picture.name})" for picture in piece.pictures]
        parts += [piece.table, "\n".join(verdicts), *shown]
    return "".join(f"\n{part}\n" for part in parts if part) + "\n"


if __name__ == "__main__":
    PAGE.write_text(made_anew(PAGE.read_text(encoding="utf-8"), IMAGES), encoding="utf-8")
