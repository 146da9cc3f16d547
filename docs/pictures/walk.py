"""The README's picture: the tiles of a causal mask, one program's walk over them, and what it keeps.

python docs/pictures/walk.py    writes walk.svg, for light pages, and walk_dark.svg beside this file
"""

from __future__ import annotations

from pathlib import Path
from string import Template

FOLDER = Path(__file__).parent
TILES, WALKED = 6, 4  # tiles a side; the row of tiles whose program is shown
LEFT, TOP, SIDE, GAP = 96, 62, 52, 4
STATE_X, STATE_Y, STATE_WIDTH, STATE_HEIGHT = 510, 140, 410, 172
WIDTH, HEIGHT = 940, 440

COLORS = {
    "walk.svg": dict(
        text="#1f2328", faint="#656d76", line="#b8c0c8", full="#2f6db3", walk="#b3560a", box="#f6f8fa"
    ),
    "walk_dark.svg": dict(
        text="#d1d7e0", faint="#9198a1", line="#4b535d", full="#4184d6", walk="#e08b3c", box="#1c2128"
    ),
}

PAGE = Template("""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 $width $height" font-family="sans-serif" font-size="14">
<title>A causal mask cut into tiles, one program's walk over its row of tiles, and its running state</title>
<style>
text { fill: $text } .faint { fill: $faint } .code { font-family: monospace } .on { fill: #ffffff }
.head { font-weight: bold } .none { fill: none; stroke: $line } .full { fill: $full }
.cut { fill: none; stroke: $full } .row { fill: none; stroke: $walk; stroke-width: 2.5 }
.walk { fill: none; stroke: $walk; stroke-width: 2.5; marker-end: url(#tip) } .tip { fill: $walk }
.box { fill: $box; stroke: $walk; stroke-width: 1.5 }
</style>
<marker id="tip" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="6" markerHeight="6" orient="auto">
<path class="tip" d="M0 0 L8 4 L0 8 z"/></marker>
$body
</svg>
""")
RECT = Template('<rect class="$kind" x="$x" y="$y" width="$width" height="$height" rx="$rx"/>')
PATH = Template('<path class="$kind" d="$d"/>')
TEXT = Template('<text class="$kind" x="$x" y="$y" text-anchor="$anchor">$text</text>')


def picture(name: str) -> str:
    """The text of one of the two files."""
    body = [*grid(), *walk(), *state(), *legend()]
    return PAGE.substitute(COLORS[name], width=WIDTH, height=HEIGHT, body="\n".join(body))


def grid() -> list[str]:
    """All tiles: those below the diagonal are full, those on it are cut, those above are skipped."""
    body = [
        text(LEFT + TILES * (SIDE + GAP) / 2, TOP - 34, "tiles of keys and values", "head"),
        text(12, TOP - 34, "tiles of queries", "head", "start"),
        *(text(corner(j) + SIDE / 2, TOP - 10, f"K, V {j}", "faint") for j in range(TILES)),
        *(text(LEFT - 10, row_top(i) + SIDE / 2 + 5, f"Q {i}", "faint", "end") for i in range(TILES)),
    ]
    for i in range(TILES):
        for j in range(TILES):
            body += tile(corner(j), row_top(i), "full" if j < i else "cut" if j == i else "none")
    return body


def tile(x: float, y: float, kind: str, side: float = SIDE) -> list[str]:
    """One tile; of a cut one, the half in which pairs count is filled."""
    if kind != "cut":
        return [rect(x, y, side, side, kind)]
    below = f"M{x} {y} L{x + side} {y + side} L{x} {y + side} z"
    return [PATH.substitute(kind="full", d=below), rect(x, y, side, side, "cut")]


def walk() -> list[str]:
    """The row of tiles that one program owns, its steps in order, and the way to its state."""
    y = row_top(WALKED)
    body = [rect(corner(0) - 4, y - 4, (WALKED + 1) * (SIDE + GAP) + 4, SIDE + 8, "row", 6)]
    for j in range(WALKED + 1):
        # A cut tile's number stands in its filled half.
        x, down = (corner(j) + SIDE / 2, 0) if j < WALKED else (corner(j) + SIDE / 4, 12)
        body.append(text(x, y + SIDE / 2 + 5 + down, str(j + 1), "on"))
    for j in range(WALKED):
        middle = y + SIDE / 2
        body.append(arrow(f"M{corner(j) + SIDE / 2 + 10} {middle} L{corner(j + 1) + 9} {middle}"))
    start, target = corner(WALKED + 1), STATE_Y + STATE_HEIGHT / 2
    bend = f"C{start + 90} {y + SIDE / 2} {STATE_X - 70} {target} {STATE_X - 8} {target}"
    body.append(arrow(f"M{start} {y + SIDE / 2} {bend}"))
    return body


def state() -> list[str]:
    """What the program keeps from step to step, and what it writes in the end."""
    x, y = STATE_X + 16, STATE_Y
    return [
        text(STATE_X, STATE_Y - 70, "One program owns Q 4 and takes steps 1 to 5.", "head", "start"),
        text(STATE_X, STATE_Y - 48, "The scores S = Q Kᵀ of a tile live only within its step;", "", "start"),
        text(STATE_X, STATE_Y - 28, "this is all that stays, for each row of Q 4:", "", "start"),
        rect(STATE_X, y, STATE_WIDTH, STATE_HEIGHT, "box", 8),
        *line(x, y + 32, "row_max", "the largest score so far"),
        *line(x, y + 60, "row_sum", "Σ exp(score − row_max) so far"),
        *line(x, y + 88, "O", "Σ exp(score − row_max) · v so far"),
        text(x, y + 126, "Where a step brings a larger score, row_sum and O", "faint", "start"),
        text(x, y + 147, "are multiplied by exp(old row_max − new row_max).", "faint", "start"),
        text(STATE_X, y + STATE_HEIGHT + 34, "After step 5:", "head", "start"),
        text(STATE_X + 104, y + STATE_HEIGHT + 34, "out = O / row_sum", "code", "start"),
        text(STATE_X + 104, y + STATE_HEIGHT + 58, "lse = row_max + ln row_sum", "code", "start"),
    ]


def line(x: float, y: float, name: str, meaning: str) -> list[str]:
    return [text(x, y, name, "code", "start"), text(x + 84, y, meaning, "", "start")]


def legend() -> list[str]:
    y, body = HEIGHT - 20, []
    for x, kind, meaning in (
        (LEFT, "full", "full: every pair counts, no mask is computed"),
        (LEFT + 350, "cut", "cut: the mask decides pair by pair"),
        (LEFT + 630, "none", "skipped: never loaded"),
    ):
        body += [*tile(x, y - 13, kind, 16), text(x + 24, y, meaning, "", "start")]
    return body


def corner(column: int) -> float:
    return LEFT + column * (SIDE + GAP)


def row_top(row: int) -> float:
    return TOP + row * (SIDE + GAP)


def rect(x: float, y: float, width: float, height: float, kind: str, rx: float = 3) -> str:
    return RECT.substitute(kind=kind, x=x, y=y, width=width, height=height, rx=rx)


def arrow(d: str) -> str:
    return PATH.substitute(kind="walk", d=d)


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "middle") -> str:
    return TEXT.substitute(kind=kind, x=x, y=y, anchor=anchor, text=words)


if __name__ == "__main__":
    for name in COLORS:
        (FOLDER / name).write_text(picture(name), encoding="utf-8")
