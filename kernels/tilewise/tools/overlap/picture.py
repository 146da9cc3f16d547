"""Who works when? The timeline of `overlap_machine` as a picture, in SVG for light and for dark pages."""

from __future__ import annotations

import itertools
from pathlib import Path
from string import Template

from .machine import Machine, Work
from .simulation import H200, HOPPER, PORTABLE

# Both pictures: a tile of 128 rows at head_dim 128, from the first product on.
PICTURES = {"hopper_portable.svg": PORTABLE[128], "hopper_overlap.svg": HOPPER[128]}
CLOCKS, TICK = 8192, 1024
LEFT, WIDTH, TOP, ROW, GAP, LETTER = 92, 900, 4, 30, 10, 7.0
ROWS = ("tensor cores", "warpgroup 1", "warpgroup 2", "copies")
LABELS = {"softmax": "softmax", "rescale": "O"}
LOWERED = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")

PAGE = Template("""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 $width $height" font-family="sans-serif" font-size="12">
<title>$title</title>
<style>
text { fill: #1f2328 } .on { fill: #ffffff } line { stroke: #8c959f; stroke-width: 0.5 }
.w1 { fill: #2f6db3; stroke: #2f6db3 } .w2 { fill: #b3560a; stroke: #b3560a }
.c { fill: #8c959f; stroke: #8c959f }
.soft { fill-opacity: 0.25 }
@media (prefers-color-scheme: dark) { text { fill: #d1d7e0 } .on { fill: #ffffff } }
</style>
$body
</svg>
""")
BOX = Template('<rect class="$kind" x="$x" y="$y" width="$width" height="$height" rx="2"/>')
LABEL = Template('<text class="$kind" x="$x" y="$y" text-anchor="$anchor">$text</text>')
LINE = Template('<line x1="$x" x2="$x" y1="$top" y2="$bottom"/>')


def picture(name: str) -> str:
    """The text of one of PICTURES."""
    machine = Machine(PICTURES[name], 8, 1, H200).run()
    begin = min(work.begin for work in machine.timeline if work.name == "S")
    bottom = TOP + len(ROWS) * (ROW + GAP)
    body = []
    for tick in range(0, CLOCKS + 1, TICK):
        x = place(tick)
        body.append(LINE.substitute(x=x, top=TOP, bottom=bottom))
        body.append(label(x, bottom + 14, f"{tick} clocks" if tick == 0 else str(tick)))
    for row, text in enumerate(ROWS):
        body.append(label(LEFT - 8, TOP + row * (ROW + GAP) + ROW / 2 + 4, text, anchor="end"))
    parts = sorted(machine.timeline, key=lambda work: (work.role, work.name, work.step))
    for _, works in itertools.groupby(parts, key=lambda work: (work.role, work.name, work.step)):
        body += box(list(works), begin)
    title = (
        f"The {PICTURES[name].kernel} kernel at head_dim {PICTURES[name].dim}: what works when, by the model"
    )
    return PAGE.substitute(width=LEFT + WIDTH + 24, height=bottom + 20, title=title, body="\n".join(body))


def box(works: list[Work], start: float) -> list[str]:
    """One product, softmax, rescaling or copy, as a box with its name; nothing where it is out of sight."""
    first = works[0]
    begin, end = min(work.begin for work in works) - start, max(work.end for work in works) - start
    if end <= 0 or begin >= CLOCKS:
        return []
    is_product = first.name in ("S", "PV")
    row = 0 if is_product else ROWS.index(first.role)
    # The tensor cores have a lane for each warpgroup: where a kernel has no turns, products are interleaved.
    lane, height = (ROWS.index(first.role) - 1, ROW / 2) if is_product else (0, ROW)
    kind = {"copies": "c", "warpgroup 1": "w1", "warpgroup 2": "w2"}[first.role]
    left, right = place(max(begin, 0)), place(min(end, CLOCKS))
    y = TOP + row * (ROW + GAP) + lane * height
    kinds = kind if is_product else f"{kind} soft"
    body = [BOX.substitute(kind=kinds, x=left, y=y, width=max(1, right - left - 1), height=height - 1)]
    text = LABELS.get(first.name, first.name) + str(first.step).translate(LOWERED)
    if right - left >= LETTER * len(text):
        body.append(label((left + right) / 2, y + height / 2 + 4, text, kind="on" if is_product else ""))
    return body


def place(clock: float) -> float:
    return LEFT + round(clock * WIDTH / CLOCKS, 1)


def label(x: float, y: float, text: str, kind: str = "", anchor: str = "middle") -> str:
    return LABEL.substitute(kind=kind, x=round(x, 1), y=round(y, 1), anchor=anchor, text=text)


def draw(folder: Path) -> None:
    """Write all PICTURES into `folder`."""
    for name in PICTURES:
        (folder / name).write_text(picture(name), encoding="utf-8")
