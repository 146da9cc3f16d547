"""The pictures of docs/gallery.md, made from the code that stands below each of them there.

python docs/pictures/masks/make.py    writes them beside this file, and prints the page's last table
"""

from __future__ import annotations

import os
import re
import runpy
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")  # where no GPU is, so that masks' functions run

from torch.nn.attention.flex_attention import create_block_mask

from tilewise.parts.shape import ceil_div
from tilewise.tools.show.picture import picture
from tilewise.tools.show.show import Shown, show

FOLDER = Path(__file__).parent
PAGE = FOLDER.parents[1] / "gallery.md"
TILE = 16
ENTRY = re.compile(r"^!\[.*?\]\(pictures/masks/(\w+)\.svg\)\n\n```py\n(.*?)^```", re.M | re.S)
HEADING = """\
| mask | tiles | tilewise visits | of these masked | FlexAttention visits | of these masked |
|---|---|---|---|---|---|"""


def entries() -> dict[str, dict[str, Any]]:
    """What the code of each picture defines: mask, mask_mod, block_mask, Q_LEN and KV_LEN."""
    text = PAGE.read_text(encoding="utf-8")
    before = re.search(r"^```py\n(.*?)^```", text, re.M | re.S)
    assert before is not None
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, code in ENTRY.findall(text):
            path = Path(folder, f"{name}.py")  # Triton reads the source of functions
            path.write_text(before[1] + "\n\n" + code, encoding="utf-8")
            found[name] = runpy.run_path(str(path))
    return found


def shown(entry: dict[str, Any], batch: int) -> Shown:
    return show(entry["mask"], (entry["Q_LEN"], entry["KV_LEN"]), tile=(TILE, TILE), batch=batch, pairs=True)


def drawn(entry: dict[str, Any]) -> Shown:
    """The last sequence of a batch."""
    return shown(entry, entry["block_mask"].shape[0] - 1)


def visits(name: str, entry: dict[str, Any]) -> str:
    """The line of the page's table."""
    ours = drawn(entry).of_all
    sizes = entry["block_mask"].shape
    blocks = create_block_mask(entry["mask_mod"], *sizes, device=entry["device"], BLOCK_SIZE=TILE)
    masked, full = int(blocks.kv_num_blocks.sum()), int(blocks.full_kv_num_blocks.sum())
    tiles = sizes[0] * ceil_div(sizes[2], TILE) * ceil_div(sizes[3], TILE)
    cells = (name.replace("_", " "), tiles, ours.visited, ours.masked, masked + full, masked)
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    print(HEADING)
    for name, entry in entries().items():
        (FOLDER / f"{name}.svg").write_text(picture(drawn(entry)), encoding="utf-8")
        print(visits(name, entry))
