"""`report.html`: the content of report.json as one page with plots, without scripts and without anything from outside.

Losses by block on a log axis, time and memory by block, tokens by expert as a heat map, then tables. Plots are SVG of
`WIDTH` user units, colours are variables that follow the reader's light or dark setting.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

WIDTH, HEIGHT = 760.0, 240.0
LEFT, RIGHT, TOP, BOTTOM = 68.0, 8.0, 8.0, 34.0  # margins around what is plotted
LEVELS = 8  # shades of a heat map

Value = float | None
Content = Mapping[str, Any]

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c2330; --soft: #5d6778; --line: #d9dee7; --panel: #f5f7fa;
  --c0: #c2570c; --c1: #1d62c9; --c2: #0f8a66; --c3: #8a3fc4; --c4: #a3285a; --c5: #6b7280; --warn: #c01f2e; }
@media (prefers-color-scheme: dark) { :root { --paper: #12161d; --ink: #e5e9f0; --soft: #9aa5b6; --line: #323a47;
  --panel: #1a202a; --c0: #f59a57; --c1: #6ea8fe; --c2: #4fd1a5; --c3: #c493f0; --c4: #f085ae; --c5: #a7b0bf;
  --warn: #ff7b86; } }
body { margin: 0 auto; padding: 24px 20px 48px; max-width: 1000px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 23px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 32px 0 6px; }
p { margin: 4px 0 10px; } .soft { color: var(--soft); } .warn { color: var(--warn); }
.tiles { display: flex; flex-wrap: wrap; gap: 10px; margin: 18px 0; padding: 0; list-style: none; }
.tiles li { background: var(--panel); border: 1px solid var(--line); border-radius: 6px; padding: 8px 14px; }
.tiles b { display: block; font-size: 18px; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.legend span { margin-right: 18px; white-space: nowrap; }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 6px; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
.grid { stroke: var(--line); stroke-width: 1; } .cell { fill: var(--panel); }
.scroll { overflow: auto; max-height: 460px; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums; }
th { position: sticky; top: 0; background: var(--panel); text-align: left; font-weight: 600; white-space: nowrap; }
th, td { padding: 4px 10px; border-bottom: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere; }
td:first-child { min-width: 9em; } td:nth-child(2) { min-width: 7em; }
td.n, th.n { text-align: right; white-space: nowrap; }
summary { cursor: pointer; font-size: 17px; font-weight: 600; margin: 28px 0 6px; }
""" + "\n".join(
    f".s{i} {{ stroke: var(--c{i}); fill: none; stroke-width: 1.6; }} .f{i} {{ fill: var(--c{i}); }} "
    f".b{i} {{ background: var(--c{i}); }}"
    for i in range(6)
)


def page(content: Content) -> str:
    """The page of what `CalibrationReport.to_dict` returns."""
    blocks = content["blocks"]
    title = f"{content['model']} to {content['scheme']}, {content['method']}"
    names = [row["name"] for row in blocks]
    parts = [
        f"<h1>{_escape(title)}</h1>",
        f'<p class="soft">Calibration of {_escape(content["started"])}, by tritonq.</p>',
        "" if content["complete"] else '<p class="warn">It has not come to its end.</p>',
        _tiles(content),
        _section("Loss by block", _losses(blocks, names)),
        _section("Time by block", _times(blocks, names)),
        _section("Peak memory by block", _memory(blocks, names)),
    ]
    if content["tokens_by_expert"]:
        parts.append(_section("Tokens by expert", _experts(content["tokens_by_expert"], content["fallbacks"])))
    parts += [
        _section("Memory steps", _steps(content["memory_steps"])),
        _section("Fallbacks", _fallbacks(content["fallbacks"])),
        _section("Blocks", _block_table(content)),
        _details("Layers", _layer_table(blocks)),
        _details("Static input scales", _pairs(content["static_scales"], ("layer", "scales"))),
        _details("Options", _pairs(content["options"], ("option", "value"))),
        _details("Events", _event_table(content["events"])),
    ]
    return "\n".join([
        "<!doctype html>", '<html lang="en">', "<head>", '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        f"<title>{_escape(title)}</title>", f"<style>{_STYLE}</style>", "</head>", "<body>",
        *filter(None, parts), "</body>", "</html>", "",
    ])  # fmt: skip


def _escape(text: Any) -> str:
    return html.escape(str(text))


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{_escape(title)}</h2>\n{body}\n</section>"


def _details(title: str, body: str) -> str:
    return f"<details>\n<summary>{_escape(title)}</summary>\n{body}\n</details>" if body else ""


# ----------------------------------------------------------------------------------------------- what is said in words


def duration(seconds: Value) -> str:
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def size(nbytes: Value) -> str:
    if nbytes is None:
        return ""
    unit, shift = _unit(nbytes)
    return f"{nbytes / (1 << shift):.4g} {unit}"


def _unit(nbytes: float) -> tuple[str, int]:
    return ("GiB", 30) if nbytes >= 1 << 30 else ("MiB", 20) if nbytes >= 1 << 20 else ("KiB", 10)


def _loss(value: Value) -> str:
    return "" if value is None else f"{value:.4g}"


def _ratio(row: Content) -> float | None:
    before, after = row["loss_before"], row["loss_after"]
    return after / before if before and after is not None else None


def _tiles(content: Content) -> str:
    ratios = [ratio for row in content["blocks"] if (ratio := _ratio(row))]
    tiles = [(str(len(content["blocks"])), "blocks"), (duration(content["seconds"]), "time")]
    tiles += [(size(nbytes), f"peak, {device}") for device, nbytes in content["peak_bytes"].items()]
    if ratios:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        tiles.append((f"{100 * mean:.1f}%", "loss after, of that before (geometric mean)"))
    if content["tokens_by_expert"]:
        tiles.append((str(sum(map(len, content["tokens_by_expert"].values()))), "experts"))
    tiles.append((str(len(content["memory_steps"])), "memory steps"))
    body = "".join(
        f'<li><b>{_escape(value)}</b><span class="soft">{_escape(name)}</span></li>' for value, name in tiles
    )
    return f'<ul class="tiles">{body}</ul>'


def short_names(names: Sequence[str]) -> list[str]:
    """What tells dotted names apart: without the parts that all begin or end with; the last part of a single one."""
    split = [name.split(".") for name in names]
    if len(set(names)) < 2:
        return [parts[-1] for parts in split]
    shortest = min(map(len, split))
    first = next((i for i in range(shortest) if len({parts[i] for parts in split}) > 1), shortest - 1)
    room = shortest - first - 1
    last = next((i for i in range(room) if len({parts[-1 - i] for parts in split}) > 1), max(room, 0))
    return [".".join(parts[first : len(parts) - last]) for parts in split]


def _cut(text: str, length: int = 10) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


# -------------------------------------------------------------------------------------------------------------- plots


class _Axis:
    """From values to heights in user units, and the ticks of it."""

    def __init__(self, values: Iterable[Value], log: bool) -> None:
        known = [value for value in values if value is not None and (value > 0 or not log)]
        self.log = log
        if log:
            self.low, self.high = _step_down(min(known)), _step_up(max(known))
            if self.low == self.high:
                self.low, self.high = self.low / 2, self.high * 2
            self.ticks = _log_ticks(self.low, self.high)
        else:
            top = max(known) or 1.0
            step = _step_up(top / 5)
            self.low, self.high = 0.0, step * math.ceil(round(top / step, 6))
            self.ticks = [step * i for i in range(round(self.high / step) + 1)]

    def y(self, value: float) -> float:
        if self.log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = value / self.high
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - share)


_MANTISSAS = (1.0, 2.0, 5.0, 10.0)


def _step_up(value: float) -> float:
    """The next number of 1, 2, 5, 10, 20, ..."""
    power = 10.0 ** math.floor(math.log10(value))
    return next((m * power for m in _MANTISSAS if m * power >= value * (1 - 1e-9)), 10 * power)


def _step_down(value: float) -> float:
    power = 10.0 ** math.floor(math.log10(value))
    return next((m * power for m in reversed(_MANTISSAS) if m * power <= value * (1 + 1e-9)), power)


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    fine = [m * 10.0**e for e in range(first, last + 1) for m in _MANTISSAS[:3]]
    fine = [tick for tick in fine if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
    if len(fine) <= 7:
        return fine
    decades = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
    return [10.0**e for e in decades[:: -(-len(decades) // 7)]]


def _centre(index: int, count: int) -> float:
    return LEFT + (index + 0.5) * (WIDTH - LEFT - RIGHT) / count


def _frame(axis: _Axis, names: Sequence[str], label: str, marks: str, title: str) -> str:
    """Grid, ticks and labels around marks; x is the block's place in order."""
    bottom = HEIGHT - BOTTOM
    lines = []
    for tick in axis.ticks:
        y = axis.y(tick)
        lines.append(f'<line class="grid" x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(f'<text x="{LEFT - 6:g}" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    short = short_names(names)
    widest = max(len(_cut(name)) for name in short) * 6.5 + 8
    every = max(1, math.ceil(len(names) * widest / (WIDTH - LEFT - RIGHT)))
    every = every if every < 3 else int(_step_up(every))
    for index in range(0, len(names), every):
        x = _centre(index, len(names))
        lines.append(f'<text x="{x:.1f}" y="{bottom + 15:g}" text-anchor="middle">{_escape(_cut(short[index]))}</text>')
    lines.append(f'<text x="{LEFT:g}" y="{HEIGHT - 4:g}">block</text>')
    turned = f"translate(11 {(TOP + bottom) / 2:.0f}) rotate(-90)"
    lines.append(f'<text transform="{turned}" text-anchor="middle">{_escape(label)}</text>')
    return (
        f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{_escape(title)}">\n'
        + "\n".join(lines)
        + f"\n{marks}\n</svg>"
    )


def _line(values: Sequence[Value], axis: _Axis, names: Sequence[str], colour: int, text: Callable[[float], str]) -> str:
    """Points joined where neighbours have values; what is not positive lies on the bottom of a log axis."""
    count = len(values)
    pieces: list[list[str]] = [[]]
    dots = []
    radius = min(3.2, max(1.0, 0.35 * (WIDTH - LEFT - RIGHT) / count))
    for index, value in enumerate(values):
        if value is None:
            pieces.append([])
            continue
        x, y = _centre(index, count), axis.y(value)
        pieces[-1].append(f"{x:.1f},{y:.1f}")
        tip = f"<title>{_escape(names[index])}: {_escape(text(value))}</title>"
        dots.append(f'<circle class="f{colour}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}">{tip}</circle>')
    lines = [f'<polyline class="s{colour}" points="{" ".join(piece)}"/>' for piece in pieces if len(piece) > 1]
    return "\n".join([*lines, *dots])


def _legend(entries: Iterable[tuple[str, str]]) -> str:
    body = "".join(f'<span><i class="{css}"></i>{_escape(name)}</span>' for css, name in entries)
    return f'<p class="legend">{body}</p>'


def _none(text: str) -> str:
    return f'<p class="soft">{_escape(text)}</p>'


def _losses(blocks: Sequence[Content], names: Sequence[str]) -> str:
    before, after = ([row[key] for row in blocks] for key in ("loss_before", "loss_after"))
    if not any(value for value in (*before, *after)):
        return _none("No block's loss was measured, or all are 0.")
    axis = _Axis((*before, *after), log=True)
    marks = _line(before, axis, names, 0, _loss) + "\n" + _line(after, axis, names, 1, _loss)
    missing = sum(value is None for value in after)
    note = _none(f"Not measured after {missing} of {len(blocks)} blocks.") if missing else ""
    legend = _legend([("b0", "before")] * any(v is not None for v in before) + [("b1", "after")])
    return legend + _frame(axis, names, "mean squared error", marks, "loss by block before and after") + note


def _times(blocks: Sequence[Content], names: Sequence[str]) -> str:
    seconds = [row["seconds"] for row in blocks]
    if not any(seconds):
        return _none("No block has been timed.")
    axis = _Axis(seconds, log=False)
    width = min(60.0, max(0.6, 0.78 * (WIDTH - LEFT - RIGHT) / len(seconds)))
    bars = []
    for index, value in enumerate(seconds):
        if value:
            x, y = _centre(index, len(seconds)) - width / 2, axis.y(value)
            box = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{HEIGHT - BOTTOM - y:.1f}"'
            bars.append(f'<rect class="f2" {box}><title>{_escape(names[index])}: {duration(value)}</title></rect>')
    return _frame(axis, names, "seconds", "\n".join(bars), "time by block")


def _memory(blocks: Sequence[Content], names: Sequence[str]) -> str:
    devices = list(dict.fromkeys(device for row in blocks for device in row["peak_bytes"]))
    largest = max((nbytes for row in blocks for nbytes in row["peak_bytes"].values()), default=0)
    if not largest:
        return _none("No memory was measured.")
    unit, shift = _unit(largest)
    columns = {
        d: [None if (n := row["peak_bytes"].get(d)) is None else n / (1 << shift) for row in blocks] for d in devices
    }
    axis = _Axis([value for column in columns.values() for value in column], log=False)
    marks = [
        _line(column, axis, names, i % 6, lambda v: f"{v:.4g} {unit}") for i, column in enumerate(columns.values())
    ]
    legend = _legend((f"b{i % 6}", device) for i, device in enumerate(devices))
    return legend + _frame(axis, names, unit, "\n".join(marks), "peak memory by block and device")


def _experts(tokens: Mapping[str, Sequence[int]], fallbacks: Mapping[str, Any]) -> str:
    """A row for each module of experts, a cell for each expert, by its share of the row's largest count."""
    fell: dict[str, set[int]] = {}
    for layer, experts in fallbacks.items():
        if isinstance(experts, list):
            fell.setdefault(layer.rpartition(".")[0] or layer, set()).update(experts)
    height = max(4.0, min(18.0, 460.0 / len(tokens)))
    columns = max(map(len, tokens.values()))
    width = (WIDTH - LEFT - RIGHT) / columns
    gap = 1.0 if min(width, height) > 6 else 0.0
    shades: list[list[str]] = [[] for _ in range(LEVELS + 1)]
    marked, labels = [], []
    every = math.ceil(13 / height)
    for row, (short, (name, counts)) in enumerate(zip(short_names(list(tokens)), tokens.items(), strict=True)):
        y, most = row * height, max(counts, default=0)
        if row % every == 0:
            labels.append(
                f'<text x="{LEFT - 6:g}" y="{y + height / 2 + 4:.1f}" text-anchor="end">{_escape(_cut(short))}</text>'
            )
        for expert, count in enumerate(counts):
            x = LEFT + expert * width
            cell = f"M{x:.1f} {y:.1f}h{width - gap:.2f}v{height - gap:.2f}h-{width - gap:.2f}z"
            shades[math.ceil(LEVELS * count / most) if most else 0].append(cell)
            if expert in fell.get(name, ()):
                marked.append(cell)
    bottom = len(tokens) * height
    paths = [f'<path class="cell" d="{"".join(shades[0])}"/>'] if shades[0] else []
    paths += [
        f'<path class="f1" fill-opacity="{level / LEVELS:.3g}" d="{"".join(cells)}"/>'
        for level, cells in enumerate(shades)
        if level and cells
    ]
    if marked:
        paths.append(f'<path d="{"".join(marked)}" fill="none" stroke="var(--warn)" stroke-width="1.5"/>')
    every = max(1, math.ceil(columns * 30 / (WIDTH - LEFT - RIGHT)))
    every = every if every < 3 else int(_step_up(every))
    for expert in range(0, columns, every):
        x = LEFT + (expert + 0.5) * width
        labels.append(f'<text x="{x:.1f}" y="{bottom + 14:.1f}" text-anchor="middle">{expert}</text>')
    labels.append(f'<text x="{LEFT:g}" y="{bottom + 30:.1f}">expert</text>')
    box = f'viewBox="0 0 {WIDTH:g} {bottom + 34:.0f}" role="img" aria-label="tokens by expert"'
    note = "The stronger the colour, the more tokens, beside the expert of its row that saw most"
    note += "; outlined: fell back to rounding to nearest." if marked else "."
    return _none(note) + f"<svg {box}>\n" + "\n".join([*paths, *labels]) + "\n</svg>" + _expert_table(tokens)


# ------------------------------------------------------------------------------------------------------------- tables


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], numbers: Sequence[int] = ()) -> str:
    """Rows as a table; the columns in `numbers` are set to the right."""
    css = [' class="n"' if i in numbers else "" for i in range(len(head))]
    lines = ["<tr>" + "".join(f"<th{c}>{_escape(cell)}</th>" for c, cell in zip(css, head, strict=True)) + "</tr>"]
    for row in rows:
        lines.append(
            "<tr>" + "".join(f"<td{c}>{_escape(cell)}</td>" for c, cell in zip(css, row, strict=True)) + "</tr>"
        )
    return '<div class="scroll"><table>\n' + "\n".join(lines) + "\n</table></div>"


def _expert_table(tokens: Mapping[str, Sequence[int]]) -> str:
    rows = []
    for name, counts in tokens.items():
        order = sorted(counts)
        rows.append((name, sum(counts), *((order[0], order[len(order) // 2], order[-1]) if order else ("", "", ""))))
    return table(("experts", "tokens", "fewest", "median", "most"), rows, (1, 2, 3, 4))


def _steps(steps: Sequence[Content]) -> str:
    return _event_table(steps) or _none("None: everything fitted into memory as it was.")


def _event_table(events: Sequence[Content]) -> str:
    rows = [(duration(event["seconds"]), event["what"], _words(event["details"])) for event in events]
    return table(("after", "what", "details"), rows, (0,)) if rows else ""


def _fallbacks(fallbacks: Mapping[str, Any]) -> str:
    return _pairs(fallbacks, ("layer", "experts or reason")) or _none("None.")


def _pairs(content: Mapping[str, Any], head: tuple[str, str]) -> str:
    return table(head, [(key, _words(value)) for key, value in content.items()]) if content else ""


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_words(entry)}" for key, entry in value.items())
    if isinstance(value, list):
        return ", ".join(map(_words, value))
    return f"{value:.5g}" if isinstance(value, float) else "none" if value is None else str(value)


def _block_table(content: Content) -> str:
    devices = list(content["peak_bytes"])
    rows = []
    for row in (*content["parts"], *content["blocks"]):
        ratio = _ratio(row)
        rows.append((
            row["name"], _loss(row["loss_before"]), _loss(row["loss_after"]),
            "" if ratio is None else f"{100 * ratio:.1f}%", duration(row["seconds"]),
            *(size(row["peak_bytes"].get(device)) for device in devices),
        ))  # fmt: skip
    head = ("block", "loss before", "loss after", "of before", "time", *(f"peak, {device}" for device in devices))
    return table(head, rows, range(1, len(head))) if rows else _none("No block is done yet.")


def _layer_table(blocks: Sequence[Content]) -> str:
    rows = [
        (
            name,
            notes.get("format", ""),
            _words({k: v for k, v in notes.items() if k not in ("format", "tokens") and v != []}),
        )
        for block in blocks
        for name, notes in block["layers"].items()
    ]
    return table(("layer", "format", "notes"), rows) if rows else ""
