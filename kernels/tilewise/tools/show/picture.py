"""A mask's picture as SVG: a rectangle a tile, to scale, for light and dark pages."""

from __future__ import annotations

from string import Template
from xml.sax.saxutils import escape

from ...parts.shape import ceil_div
from ..explain.coverage import STATES
from .show import Shown, counts

SIDE = 400  # of the longer side of the grid, in pixels
SMALLEST = 8  # a tile's side at least
LEFT, TOP, MARGIN, LINE = 12, 48, 12, 22
MOST = SIDE // SMALLEST  # tiles a side; of more, a rectangle stands for several
LEGEND = 110  # the width of an entry
LETTER = 8.5  # the width of a letter at most

PAGE = Template("""\
<svg xmlns="http://www.w3.org/2000/svg" width="$width" height="$height" viewBox="0 0 $width $height" \
role="img" font-family="sans-serif" font-size="13">
<title>$title</title>
<style>
text { fill: #1f2328 } .faint { fill: #656d76 } .head { font-family: monospace }
.skipped { fill: none; stroke: #b8c0c8 } .cut { fill: #cfe0f3; stroke: #2f6db3 }
.full { fill: #2f6db3; stroke: #2f6db3 } .pairs { fill: #2f6db3; fill-opacity: 0.7 }
@media (prefers-color-scheme: dark) {
text { fill: #d1d7e0 } .faint { fill: #9198a1 } .skipped { stroke: #4b535d }
.cut { fill: #1d3350; stroke: #4184d6 } .full { fill: #4184d6; stroke: #4184d6 } .pairs { fill: #4184d6 }
}
</style>
$body
</svg>
""")
RECT = Template('<rect class="$kind" x="$x" y="$y" width="$width" height="$height"/>')
TEXT = Template('<text class="$kind" x="$x" y="$y">$words</text>')


def picture(shown: Shown) -> str:
    """The text of an SVG file."""
    down, across = (max(1, ceil_div(n, MOST)) for n in shown.grid)
    unit_x, unit_y = units(shown, down, across)
    width, height = (shown.kv_len * unit_x, shown.q_len * unit_y)
    sizes = f"q_len {shown.q_len}, kv_len {shown.kv_len}, tiles of {shown.tile[0]} × {shown.tile[1]}"
    if max(shown.sizes) > 1:
        sizes += f", batch {shown.batch}, head {shown.head}"
    entries = legend(shown)
    below = TOP + height + LINE
    if (down, across) != (1, 1):
        sizes += f"; a rectangle is {down} × {across} of them"
    body = [
        text(LEFT, 18, shown.mask, "head"),
        text(LEFT, 36, sizes, "faint"),
        *tiles(shown, down, across, unit_x, unit_y),
        *pairs(shown, unit_x, unit_y),
    ]
    for i, (kind, words) in enumerate(entries):
        x = LEFT + i * LEGEND
        body += [rect(kind, x, below - 11, 12, 12), text(x + 18, below, words, "")]
    widest = max(
        width, len(entries) * LEGEND, LETTER * len(shown.mask), LETTER * 0.75 * len(sizes)
    )  # a mask may be longer than its grid is wide
    return PAGE.substitute(
        width=number(LEFT + widest + MARGIN),
        height=number(below + MARGIN),
        title=escape(f"{shown.mask}: {', '.join(words for _, words in entries)}"),
        body="\n".join(body),
    )


def units(shown: Shown, down: int, across: int) -> tuple[float, float]:
    """The pixels of a token along keys and along queries: alike, unless tiles would be too small to see."""
    longest = max(shown.q_len, shown.kv_len, 1)
    unit = SIDE / longest
    tile_q, tile_kv = shown.tile
    return max(unit, SMALLEST / (across * tile_kv)), max(unit, SMALLEST / (down * tile_q))


def tiles(shown: Shown, down: int, across: int, unit_x: float, unit_y: float) -> list[str]:
    """A rectangle for each tile, or block of them, row by row; the last ones end where the tokens do."""
    found = []
    step_q, step_kv = down * shown.tile[0], across * shown.tile[1]
    for i, row in enumerate(shown.blocks(down, across).tolist()):
        for j, state in enumerate(row):
            rows = min(step_q, shown.q_len - i * step_q)
            keys = min(step_kv, shown.kv_len - j * step_kv)
            x, y = LEFT + j * step_kv * unit_x, TOP + i * step_q * unit_y
            found.append(
                rect(STATES[state], x + 0.5, y + 0.5, max(1, keys * unit_x - 2), max(1, rows * unit_y - 2))
            )
    return found


def pairs(shown: Shown, unit_x: float, unit_y: float) -> list[str]:
    """The pairs that count in cut tiles, a run of them at a time."""
    if shown.pairs is None:
        return []
    cut = shown.states == STATES.index("cut")
    cut = cut.repeat_interleave(shown.tile[0], 0).repeat_interleave(shown.tile[1], 1)
    steps = []
    for i, row in enumerate((shown.pairs & cut[: shown.q_len, : shown.kv_len]).tolist()):
        begin = None
        for j, kept in enumerate([*row, False]):
            if kept and begin is None:
                begin = j
            elif not kept and begin is not None:
                x, y, wide = LEFT + begin * unit_x, TOP + i * unit_y, (j - begin) * unit_x
                steps.append(f"M{number(x)} {number(y)}h{number(wide)}v{number(unit_y)}h-{number(wide)}z")
                begin = None
    return [f'<path class="pairs" d="{"".join(steps)}"/>'] if steps else []


def legend(shown: Shown) -> list[tuple[str, str]]:
    own = counts(shown.coverage)
    return [(state, f"{state} {own[state]:,}") for state in reversed(STATES)]


def rect(kind: str, x: float, y: float, width: float, height: float) -> str:
    return RECT.substitute(kind=kind, x=number(x), y=number(y), width=number(width), height=number(height))


def text(x: float, y: float, words: str, kind: str) -> str:
    return TEXT.substitute(kind=kind, x=number(x), y=number(y), words=escape(words))


def number(x: float) -> str:
    return f"{x:.2f}".rstrip("0").rstrip(".")
