"""The report's pictures: curves, the rounds' timeline, bytes, and maps of layers against modules."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from fedpipe_core.report.facts import ReportFacts, place_of
from fedpipe_core.report.svg import Frame, Scale, circle, element, grid, padded, polyline, rectangle, text, tick_step
from fedpipe_core.schemas import RoundRecord, UpdateRecord

EDGE_COLOURS = 8
MIB = 2**20


@dataclass(frozen=True)
class Series:
    """One line of a chart: points are (round, value)."""

    name: str
    colour: str
    points: Sequence[tuple[float, float]]
    strong: bool = False


@dataclass(frozen=True)
class Activity:
    """A stretch of an edge's round, in seconds from its begin."""

    kind: str
    start: float
    seconds: float
    title: str


def edge_colour(facts: ReportFacts, edge_id: str) -> str:
    """Class of an edge's colour; beyond eight edges all are grey, since no more can be told apart."""
    return f"e{facts.edges.index(edge_id)}" if len(facts.edges) <= EDGE_COLOURS else "ex"


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """Names with the colour of their class."""
    items = "".join(f'<span><i class="swatch {class_}"></i>{escape(name)}</span>' for name, class_ in entries)
    return f'<p class="legend">{items}</p>'


def curves(series: Sequence[Series], label: str, form: str) -> str:
    """Lines over rounds with a dot at every round, strong ones above the others."""
    frame = Frame(430, 190)
    values = [y for line in series for _, y in line.points]
    rounds = sorted({x for line in series for x, _ in line.points})
    if not values:
        return '<p class="none">No round is closed yet.</p>'
    x, y = Scale(rounds[0], rounds[-1], 0, frame.width), Scale(*padded(values), frame.height, 0)
    step = max(1, int(tick_step(rounds[-1] - rounds[0], 8)))
    marks = "".join(text(x(r), frame.height + 18, f"{r:g}", anchor="middle") for r in rounds[::step])
    lines = "".join(_curve(line, x, y, form) for line in sorted(series, key=lambda line: line.strong))
    return frame.document(grid(frame, y, "g") + marks + lines, label)


def timeline(facts: ReportFacts) -> str:
    """A row an edge: transfer, validation and training in each round, and between them the wait for the others."""
    spans = [entry.seconds for entry in facts.rounds]
    frame = Frame(820, 24.0 * (len(facts.edges) + 1), left=130, top=20)
    x = Scale(0, sum(spans), 0, frame.width)
    drawn, begin = [], 0.0
    for entry, updates in zip(facts.rounds, facts.updates, strict=False):
        drawn.append(_round_rule(x(begin), frame, f"round {entry.round}"))
        starts = _starts(updates)
        busy_until = max((starts[e] + update.round_seconds for e, update in updates.items()), default=0.0)
        for row, edge_id in enumerate(facts.edges):
            found = _activities(entry, updates.get(edge_id), starts.get(edge_id, 0.0), edge_id)
            drawn.append(_bars(found, x, begin, row))
        judging = max(0.0, entry.seconds - busy_until)
        title = f"round {entry.round}, coordinator: aggregated and judged in {judging:.1f} s"
        own = Activity("coordinator", entry.seconds - judging, judging, title)
        drawn.append(_bars([own], x, begin, len(facts.edges)))
        begin += entry.seconds
    names = [*facts.edges, "coordinator"]
    labels = "".join(text(-10, 24 * row + 15, name, "label", "end") for row, name in enumerate(names))
    ticks = "".join(text(x(tick), frame.height + 18, f"{tick:g} s", anchor="middle") for tick in x.ticks(8))
    return frame.document("".join(drawn) + labels + ticks, "What every edge did, second by second")


def transfers(facts: ReportFacts) -> str:
    """Per round what edges downloaded and uploaded, in MiB, stacked by edge."""
    frame = Frame(430, 170, bottom=34)
    stacks = [
        (entry.round, way, [(edge_id, _transferred(update, way)) for edge_id, update in updates.items()])
        for entry, updates in zip(facts.rounds, facts.updates, strict=False)
        for way in ("down", "up")
    ]
    if not stacks:
        return '<p class="none">No round is closed yet.</p>'
    tallest = max(sum(size for _, size in parts) for *_, parts in stacks)
    y = Scale(0, (tallest * 1.08) or 1.0, frame.height, 0)
    slot = frame.width / len(facts.rounds)
    width = min(34.0, slot / 3)
    drawn = [grid(frame, y, "g")]
    for index, (number, way, parts) in enumerate(stacks):
        middle = slot * (index // 2 + 0.5) + (width / 2 + 2) * (1 if way == "up" else -1)
        drawn.append(_stack(facts, middle - width / 2, width, y, (f"round {number}", way, parts)))
        if slot > 3 * 16:
            drawn.append(text(middle, frame.height + 13, way, anchor="middle"))
    step = max(1, int(tick_step(len(facts.rounds), 12)))
    drawn += [
        text(slot * (index + 0.5), frame.height + 28, f"round {entry.round}", anchor="middle")
        for index, entry in enumerate(facts.rounds)
        if index % step == 0
    ]
    return frame.document("".join(drawn), "MiB down and up in every round")


def module_map(values: Mapping[str, float], colour: str, label: str, write: Callable[[float], str]) -> str:
    """Kinds of modules down, layers across; the darker the larger. Cells without a value stay empty."""
    places = {place_of(name): name for name in values}
    stacks = {stack for stack, _, _ in places}
    kinds = list(dict.fromkeys((stack, kind) for stack, _, kind in places))
    layers = range(1 + max(layer for _, layer, _ in places))
    cell = max(9.0, min(30.0, 420 / len(layers)))
    left = 12 + 5.6 * max(len(_kind_name(stack, kind, stacks)) for stack, kind in kinds)
    frame = Frame(cell * len(layers), 22.0 * len(kinds), left=left, top=4, bottom=24)
    largest = max(values.values()) or 1.0
    drawn = []
    for row, (stack, kind) in enumerate(kinds):
        drawn.append(text(-8, 22 * row + 15, _kind_name(stack, kind, stacks), "tick", "end"))
        for layer in layers:
            name = places.get((stack, layer, kind))
            cells = (name, values.get(name, 0.0) if name else 0.0)
            drawn.append(_cell(cell * layer, 22.0 * row, cell, cells, (largest, colour, write)))
    every = max(1, round(24 / cell))
    drawn += [text(cell * (i + 0.5), frame.height + 15, str(i), anchor="middle") for i in layers[::every]]
    return frame.document("".join(drawn), label, widest=1.15 * (frame.left + frame.width))


def _curve(line: Series, x: Scale, y: Scale, form: str) -> str:
    points = [(x(a), y(b)) for a, b in line.points]
    weight = "strong" if line.strong else "fine"
    dots = "".join(
        circle(px, py, 3.4 if line.strong else 2.4, f"dot {line.colour}", f"{line.name}, round {a:g}: {b:{form}}")
        for (a, b), (px, py) in zip(line.points, points, strict=True)
    )
    return polyline(points, f"line {weight} {line.colour}", line.name) + dots


def _round_rule(x: float, frame: Frame, name: str) -> str:
    rule = element("line", {"x1": x, "x2": x, "y1": -14, "y2": frame.height, "class_": "rule"})
    return rule + text(x + 4, -6, name)


def _starts(updates: Mapping[str, UpdateRecord]) -> dict[str, float]:
    """Seconds after the first edge at which each began; all 0 where begins were not recorded."""
    known = {edge_id: update.started_at for edge_id, update in updates.items() if update.started_at is not None}
    first = min(known.values(), default=0.0)
    return {edge_id: known.get(edge_id, first) - first for edge_id in updates}


def _activities(entry: RoundRecord, update: UpdateRecord | None, start: float, edge_id: str) -> list[Activity]:
    where = f"round {entry.round}, {edge_id}"
    if update is None:
        reason = entry.dropped.get(edge_id, "no update")
        return [Activity("missing", 0.0, entry.seconds, f"{where}: {reason}")]
    transfer, training = update.transfer_seconds, update.train_seconds
    rest = max(0.0, update.round_seconds - transfer - training)
    end = start + update.round_seconds
    waiting = f"{where}: waited {max(0.0, entry.seconds - update.round_seconds):.1f} s for the others"
    return [
        Activity("waiting", 0.0, entry.seconds, waiting),
        Activity("transfer", start, transfer, f"{where}: moved its adapters in {transfer:.2f} s"),
        Activity("preparing", start + transfer, rest, f"{where}: validated and prepared in {rest:.1f} s"),
        Activity("training", end - training, training, f"{where}: trained {update.steps} steps in {training:.1f} s"),
    ]


def _bars(found: Sequence[Activity], x: Scale, begin: float, row: int) -> str:
    drawn = []
    for activity in found:
        thin = activity.kind in ("waiting", "missing")
        width = max(x(activity.seconds) - 1.0, 0.8 if activity.seconds else 0.0)
        at = (x(begin + activity.start), 24.0 * row + (9.0 if thin else 4.0))
        drawn.append(rectangle(*at, (width, 6.0 if thin else 16.0), f"act-{activity.kind}", activity.title))
    return "".join(drawn)


def _transferred(update: UpdateRecord, way: str) -> float:
    return (update.adapter.size_bytes if way == "up" else update.download_bytes) / MIB


def _stack(
    facts: ReportFacts, x: float, width: float, y: Scale, stack: tuple[str, str, Sequence[tuple[str, float]]]
) -> str:
    where, way, parts = stack
    drawn, reached = [], 0.0
    for edge_id, size in parts:
        top, height = y(reached + size), y(reached) - y(reached + size)
        title = f"{where}, {edge_id}: {size:.2f} MiB {way}"
        class_ = f"fill {edge_colour(facts, edge_id)}{' pale' if way == 'down' else ''}"
        drawn.append(rectangle(x, top, (width, max(height - 1.0, 0.4)), class_, title))
        reached += size
    return "".join(drawn)


def _kind_name(stack: str, kind: str, stacks: set[str]) -> str:
    short = kind.removesuffix(".dense")
    return f"{stack.rpartition('.')[2]} {short}" if len(stacks) > 1 else short


def _cell(
    x: float, y: float, width: float, cell: tuple[str | None, float], look: tuple[float, str, Callable[[float], str]]
) -> str:
    (name, value), (largest, colour, write) = cell, look
    size = (width - 2, 20.0)
    if not value or name is None:
        return rectangle(x, y, size, "empty", f"{name}: none" if name else "")
    share = value / largest
    shape = rectangle(x, y, size, f"fill {colour}", f"{name}: {write(value)}", fill_opacity=0.12 + 0.88 * share)
    words = write(value)
    fits = 6.0 * len(words) < width
    number = text(x + width / 2 - 1, y + 14, words, "on-dark" if share > 0.55 else "on-light", "middle")
    return shape + (number if fits else "")
