"""Drawing in SVG: elements, scales with round ticks, and axes. Colours come from the page's style sheet by class."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

TITLE_LINES = "&#10;"


@dataclass(frozen=True)
class Frame:
    """A drawing area inside margins: x runs over [0, width], y over [0, height] of the inner part, y downwards."""

    width: float
    height: float
    left: float = 44
    top: float = 10
    right: float = 14
    bottom: float = 26

    def document(self, content: str, label: str, widest: float | None = None) -> str:
        """The picture, which scales with the page's width, up to `widest` pixels."""
        limit = f' style="max-width:{widest:g}px"' if widest else ""
        full_width, full_height = self.left + self.width + self.right, self.top + self.height + self.bottom
        return (
            f'<svg viewBox="0 0 {full_width:g} {full_height:g}" role="img" aria-label="{escape(label)}"{limit}>'
            f'<g transform="translate({self.left:g} {self.top:g})">{content}</g></svg>'
        )


@dataclass(frozen=True)
class Scale:
    """Maps values of [low, high] to [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / ((self.high - self.low) or 1.0)
        return self.start + share * (self.end - self.start)

    def ticks(self, wanted: int = 4) -> list[float]:
        """About `wanted` values at steps of 1, 2, 2.5 or 5 times a power of ten, inside the range."""
        step = tick_step(self.high - self.low, wanted)
        first = math.ceil(self.low / step - 1e-9)
        return [index * step for index in range(first, math.floor(self.high / step + 1e-9) + 1)]


def tick_step(span: float, wanted: int) -> float:
    """The step of 1, 2, 2.5 or 5 times a power of ten that divides `span` into about `wanted` parts, or a tenth more."""
    raw = max(span, 1e-12) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    return float(next(factor * power for factor in (1, 2, 2.5, 5, 10) if raw <= factor * power * 1.1))


def padded(values: Sequence[float], share: float = 0.06) -> tuple[float, float]:
    """Range of the values with some room at both ends; never empty."""
    low, high = min(values), max(values)
    room = (high - low) * share or abs(high) * share or 1.0
    return low - room, high + room


def element(tag: str, attributes: Mapping[str, object], content: str = "", title: str = "") -> str:
    """An element; a title becomes its tooltip. Attribute names take `_` for `-`; numbers are rounded to 0.01."""
    written = "".join(f' {name.rstrip("_").replace("_", "-")}="{_value(value)}"' for name, value in attributes.items())
    inner = (f"<title>{escape(title)}</title>" if title else "") + content
    return f"<{tag}{written}>{inner}</{tag}>" if inner else f"<{tag}{written}/>"


def text(x: float, y: float, content: str, class_: str = "tick", anchor: str = "start") -> str:
    """A line of text."""
    return element("text", {"x": x, "y": y, "class_": class_, "text_anchor": anchor}, escape(content))


def rectangle(x: float, y: float, size: tuple[float, float], class_: str, title: str = "", **more: object) -> str:
    """A rectangle with slightly rounded corners."""
    width, height = size
    return element("rect", {"x": x, "y": y, "width": width, "height": height, "class_": class_, **more}, title=title)


def polyline(points: Sequence[tuple[float, float]], class_: str, title: str = "") -> str:
    """A line through the points."""
    joined = " ".join(f"{x:.2f},{y:.2f}" for x, y in points)
    return element("polyline", {"points": joined, "class_": class_}, title=title)


def circle(x: float, y: float, radius: float, class_: str, title: str = "") -> str:
    """A dot."""
    return element("circle", {"cx": x, "cy": y, "r": radius, "class_": class_}, title=title)


def grid(frame: Frame, y: Scale, form: str) -> str:
    """Horizontal rules at the ticks of y, with their values at the left."""
    return "".join(
        element("line", {"x1": 0, "x2": frame.width, "y1": y(tick), "y2": y(tick), "class_": "rule"})
        + text(-8, y(tick) + 3.5, format(tick, form), anchor="end")
        for tick in y.ticks()
    )


def _value(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else escape(str(value))
