"""HTML by small functions: tables, tiles, cards, and numbers as a reader wants them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

MIB = 2**20


@dataclass(frozen=True)
class Cell:
    """A table's cell whose content is HTML already, or that has a class of its own."""

    content: str
    class_: str = ""


def table(head: Sequence[str], rows: Iterable[Sequence[object]], numbers: Sequence[int] = ()) -> str:
    """A table; columns at the indices `numbers` are right-aligned. Strings are escaped, `Cell`s taken as they are."""
    titles = "".join(f"<th{_class('number', i in numbers)}>{escape(name)}</th>" for i, name in enumerate(head))
    lines = "".join(f"<tr>{''.join(_cell(value, i in numbers) for i, value in enumerate(row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table></div>'


def section(title: str, sub: str, *content: str) -> str:
    """A heading, a sentence that says how to read what follows, and that."""
    return f'<section><h2>{escape(title)}</h2><p class="sub">{escape(sub)}</p>{"".join(content)}</section>'


def card(title: str, *content: str) -> str:
    """A framed picture with its title."""
    return f'<div class="card"><h3>{escape(title)}</h3>{"".join(content)}</div>'


def cards(items: Iterable[str]) -> str:
    """Cards side by side where there is room."""
    return f'<div class="grid">{"".join(items)}</div>'


def tile(value: str, name: str) -> str:
    """A number worth a large print."""
    return f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>'


def measured_beside(predicted: float, measured: float | None, written: tuple[str, str], colour: str) -> Cell:
    """A bar of what was measured with a mark where it was predicted."""
    if measured is None:
        return Cell(f"{escape(written[0])} planned")
    largest = max(predicted, measured) * 1.05 or 1.0
    reached, mark = 100 * measured / largest, 100 * predicted / largest
    bar = (
        f'<div class="track {colour}" title="measured {escape(written[1])}, predicted {escape(written[0])}">'
        f'<i style="width:{reached:.1f}%"></i><u style="left:{mark:.1f}%"></u></div>'
    )
    return Cell(f"{escape(written[1])} of {escape(written[0])}{bar}")


def size(count: float) -> str:
    """Bytes in the unit that reads best."""
    return (
        f"{count / MIB:.2f} MiB"
        if count < 10 * MIB
        else f"{count / MIB:,.0f} MiB"
        if count < 10 * 1024 * MIB
        else (f"{count / MIB / 1024:,.1f} GiB")
    )


def duration(seconds: float) -> str:
    """Seconds in the unit that reads best."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 20 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def short(digest: str) -> Cell:
    """The first characters of a hash, the whole on hover."""
    return Cell(f'<span title="{escape(digest)}">{escape(digest[:12])}</span>', "hash")


def words(name: str) -> str:
    """A field's name as words."""
    return name.replace("_", " ")


def _cell(value: object, is_number: bool) -> str:
    found = value if isinstance(value, Cell) else Cell(escape(str(value)))
    return f"<td{_class(f'number {found.class_}' if is_number else found.class_, True)}>{found.content}</td>"


def _class(names: str, wanted: bool) -> str:
    return f' class="{names.strip()}"' if wanted and names.strip() else ""
