"""`tilewise show`: its tiles against those counted in the reference's dense mask, its texts and pictures
against its tiles, and the gallery's masks against FlexAttention's."""

from __future__ import annotations

import json
import re
import runpy
import shlex
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask
from typer.testing import CliRunner

import tilewise
from tilewise.cli import build_app
from tilewise.kernels.tile import Tile
from tilewise.plan import tiles
from tilewise.tools.explain import coverage
from tilewise.tools.show.expression import ExpressionError, mask_from
from tilewise.tools.show.picture import picture
from tilewise.tools.show.show import as_dict, show
from tilewise_reference import masks as reference

ROOT = Path(__file__).parents[1]
SKIPPED, CUT, FULL = range(3)
PADDED = torch.tensor([40, 0, 17])
OFTEN = [(0, 5), (5, 0), (1, 1), (33, 70), (70, 33), (100, 100)]


def ids(length):
    """Documents of 29 tokens."""
    return torch.arange(length) // 29


def starts(length):
    """For two heads."""
    return torch.stack([torch.arange(length) // 8, torch.arange(length) // 3 + 5])


def both(*functions):
    """The pairs that all of them keep."""

    def kept(*index):
        found = torch.tensor(True)
        for function in functions:
            found = found & function(*index)
        return found

    return kept


# A mask, what the reference says it is, and how many batches and heads it tells apart.
MASKS = {
    "causal": lambda q, k: (tilewise.Causal(), reference.causal(q, k), 1, 1),
    "top left": lambda q, k: (tilewise.Causal("top_left"), reference.causal(q, k, "top_left"), 1, 1),
    "window": lambda q, k: (tilewise.Window(20, 9), reference.window(20, 9, q, k), 1, 1),
    "prefix": lambda q, k: (tilewise.Prefix(21), reference.prefix(21, q, k), 1, 1),
    "causal and window": lambda q, k: (
        tilewise.Causal() & tilewise.Window(40, 3),
        both(reference.causal(q, k), reference.window(40, 3, q, k)),
        1,
        1,
    ),
    "padding": lambda q, k: (tilewise.Padding(PADDED), reference.padding(PADDED, k), 3, 1),
    "padding on the left": lambda q, k: (
        tilewise.Causal() & tilewise.Padding(PADDED, "left"),
        both(reference.causal(q, k), reference.padding(PADDED, k, "left")),
        3,
        1,
    ),
    "documents": lambda q, k: (
        tilewise.Documents(ids(q), ids(k)) & tilewise.Causal("top_left"),
        both(reference.documents(ids(q), ids(k)), reference.causal(q, k, "top_left")),
        1,
        1,
    ),
    "intervals": lambda q, k: (
        tilewise.Intervals(starts(q), starts(q) + 23),
        reference.intervals(starts(q), starts(q) + 23),
        1,
        2,
    ),
}


def counted(kept, tile_q, tile_kv):
    """The tiles from the first in which a pair counts to the last, row by row; those in which all do are
    full, if they are whole."""
    q_len, kv_len = kept.shape
    found = torch.zeros(-(-q_len // tile_q), -(-kv_len // tile_kv), dtype=torch.uint8)
    for i, rows in enumerate(kept.split(tile_q) if q_len else ()):
        parts = rows.split(tile_kv, 1) if kv_len else ()
        seen = [j for j, part in enumerate(parts) if part.any()]
        for j in range(seen[0], seen[-1] + 1) if seen else ():
            found[i, j] = FULL if parts[j].all() and parts[j].shape[1] == tile_kv else CUT
    return found


@pytest.mark.parametrize("name", MASKS)
def test_tiles_and_pairs_are_those_of_the_dense_mask(name):
    for q_len, kv_len in OFTEN:
        mask, function, batches, heads = MASKS[name](q_len, kv_len)
        index = torch.arange(q_len)[:, None], torch.arange(kv_len)[None]
        for batch, head in ((b, h) for b in range(batches) for h in range(heads)):
            kept = function(torch.tensor([[batch]]), torch.tensor([[head]]), *index).expand(q_len, kv_len)
            for tile in ((16, 16), (32, 16), (16, 64), (128, 128)):
                shown = show(mask, (q_len, kv_len), tile=tile, batch=batch, head=head, pairs=True)
                assert shown.sizes == (batches, heads)
                assert torch.equal(shown.states, counted(kept, *tile)), (q_len, kv_len, batch, head, tile)
                assert torch.equal(shown.pairs, kept) and shown.contradicted == 0


def test_counts_are_those_of_explain():
    mask = (
        tilewise.Causal() & tilewise.Padding(PADDED, "left") & tilewise.Intervals(starts(70), starts(70) + 99)
    )
    q, k = (torch.empty(3, 2, n, 64, device="meta", dtype=torch.bfloat16) for n in (70, 133))
    with tiles.use(Tile(32, 16)):
        explained = tilewise.explain(q, k, k, mask=mask).kernels[0].tiles
    every = [show(mask, (70, 133), tile=(32, 16), batch=b, head=h) for b in range(3) for h in range(2)]
    assert all(shown.of_all == explained for shown in every)
    assert sum((shown.coverage for shown in every), coverage.NOTHING) == explained
    for shown in every:
        drawn = [int((shown.states == state).sum()) for state in (SKIPPED, CUT, FULL)]
        assert drawn == [shown.coverage.skipped, shown.coverage.masked, shown.coverage.full]
    assert len({shown.coverage for shown in every}) == 4, "heads and batches differ"


def test_a_block_of_tiles_is_full_or_skipped_where_all_of_them_are():
    shown = show(tilewise.Window(200, 60), (430, 500), tile=(16, 16))
    states = shown.states
    for down, across in ((1, 1), (2, 3), (5, 4), (27, 32), (99, 99)):
        blocks = [[part for part in rows.split(across, 1)] for rows in states.split(down)]
        wanted = [
            [SKIPPED if (b == SKIPPED).all() else FULL if (b == FULL).all() else CUT for b in row]
            for row in blocks
        ]
        assert shown.blocks(down, across).tolist() == wanted


def test_the_tile_is_the_one_that_is_said():
    shown = show(tilewise.Causal(), (300, 512))
    assert shown.tile == (128, 128) and "H200" in shown.tile_from
    assert show(tilewise.Causal(), (3, 512)).tile[0] == 16  # as for a call of so few rows
    assert show(tilewise.Causal(), (64, 64), pairs=True).tile == (16, 16)


# ---- What cannot be drawn, and masks of the user's own


NO_PICTURES = {
    "a length": (
        tilewise.Causal(),
        (3, -1),
        {},
        "lengths=(3, -1) must be q_len and kv_len, each from 0 to 4,",
    ),
    "pairs": (tilewise.Causal(), (3, 129), dict(pairs=True), "each from 0 to 128 where pairs are drawn"),
    "a tile": (tilewise.Causal(), (3, 5), dict(tile=(16, 24)), "tile_kv=24 must be a power of two"),
    "a batch": (tilewise.Padding(PADDED), (3, 5), dict(batch=3), "batch=3 must be from 0 to 2"),
    "sizes": (tilewise.Documents(ids(5)), (3, 5), {}, "ids.shape=(5,) must broadcast to (1, 3)"),
    "corners": (tilewise.Causal() & tilewise.Padding(3), (3, 5), {}, "say which"),  # as attention says it
}


@pytest.mark.parametrize(("mask", "lengths", "options", "said"), NO_PICTURES.values(), ids=NO_PICTURES)
def test_what_cannot_be_drawn_is_refused(mask, lengths, options, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        show(mask, lengths, **options)


OWN = """
import triton
import triton.language as tl
import tilewise

@triton.jit
def near(q_idx, kv_idx, batch, head, args):
    return (kv_idx <= q_idx) & (kv_idx > q_idx - 9)

@triton.jit
def reach(q_idx, batch, head, args):
    return q_idx - args[0], q_idx + 1, q_idx < 0

def twin(batch, head, q_idx, kv_idx, left):
    return (kv_idx <= q_idx) & (kv_idx > q_idx - 9)

mask = tilewise.UserMask(near, args=(8,), interval=reach, twin=twin)
too_short = tilewise.UserMask(near, args=(7,), interval=reach, twin=twin)

def made():
    return mask & tilewise.Causal()
"""


def test_a_mask_of_a_file(tmp_path, command):
    file = tmp_path / "own_masks.py"
    file.write_text(OWN)
    for name in ("mask", "made"):
        shown = show(mask_from(f"{file}:{name}"), (40, 40), pairs=True)
        kept = reference.window(8, 0, 40, 40)(*torch.zeros(2, 1, 1, dtype=int), *index(40))
        assert torch.equal(shown.states, counted(kept, 16, 16)) and torch.equal(shown.pairs, kept)
        assert not shown.contradicted
    assert "did you mean mask?" in command(f"{file}:masks").output
    wrong = command(f"{file}:too_short", "--pairs", "--lengths", 40)
    assert show(mask_from(f"{file}:too_short"), (40, 40), pairs=True).contradicted == 32
    assert "the mask contradicts itself: of 32 pairs" in wrong.output and wrong.exit_code == 0


def index(length):
    return torch.arange(length)[:, None], torch.arange(length)[None]


def test_an_interval_that_cannot_run_here_is_named(tmp_path, command, monkeypatch):
    file = tmp_path / "own_masks.py"
    file.write_text(OWN)
    monkeypatch.setattr(coverage, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ran = command(f"{file}:mask")
    assert "without TRITON_INTERPRET=1: at most so many tiles are visited" in " ".join(ran.output.split())


# ---- What it reads like


@pytest.fixture
def command(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    return lambda *words: CliRunner().invoke(build_app(), ["show", *map(str, words)])


def drawn_in(output):
    """The states in the lines of a terminal, a mark two characters wide."""
    lines = re.findall(r"^ *\d+  ([·▒█]+)$", output, re.M)
    assert all(line[::2] == line[1::2] for line in lines)
    return [["·▒█".index(mark) for mark in line[::2]] for line in lines]


def test_the_terminal_shows_the_tiles(command, monkeypatch):
    text = "Causal() & Window(100, 0)"
    ran = command(text, "--lengths", 300, 512, "--tile", 32, 16)
    shown = show(mask_from(text), (300, 512), tile=(32, 16))
    assert ran.exit_code == 0 and drawn_in(ran.output) == shown.states.tolist()
    counts = shown.coverage
    assert f"skipped {counts.skipped}, cut {counts.masked}, full {counts.full}; " in ran.output
    assert f"{counts.skipped_share:.1%} skipped" in ran.output and "stands for" not in ran.output
    monkeypatch.setenv("COLUMNS", "40")  # room for 17 marks
    ran = command(text, "--lengths=300", 512, "--tile=16")
    shown = show(mask_from(text), (300, 512), tile=(16, 16))
    assert "a mark stands for 1 × 2 tiles" in ran.output
    assert drawn_in(ran.output) == shown.blocks(1, 2).tolist()


def test_one_number_is_both(command):
    for words in (("--lengths", 70, "--tile=32"), ("--tile", 32, "--lengths=70", "--batch", 0)):
        found = json.loads(command(*words, "Causal()", "--json").output)
        assert (found["q_len"], found["kv_len"], found["tile"]) == (70, 70, [32, 32])
    assert command("Causal()", "--lengths").exit_code == 2


def test_the_terminal_shows_pairs(command, monkeypatch):
    ran = command("Window(44, 3)", "--pairs", "--lengths", 60, 44)
    shown = show(mask_from("Window(44, 3)"), (60, 44), pairs=True)
    state = shown.states.repeat_interleave(16, 0).repeat_interleave(16, 1)[:60, :44]
    lines = [line[5 : 5 + 88] for line in ran.output.splitlines() if re.match(r" *\d+  ", line)]
    looks = {(SKIPPED, False): " ", (CUT, False): "·", (CUT, True): "▓", (FULL, True): "█"}
    cells = zip(state.flatten().tolist(), shown.pairs.flatten().tolist(), strict=True)
    assert "".join(line.ljust(88)[::2] for line in lines) == "".join(looks[cell] for cell in cells)
    assert {SKIPPED, CUT, FULL} == set(state.flatten().tolist()), "the test shows all kinds"
    monkeypatch.setenv("COLUMNS", "60")
    ran = command("Causal()", "--pairs", "--lengths", 40)
    assert ran.exit_code == 2 and "kv_len=40: its pairs need 85 columns" in ran.output


def test_json_has_the_tiles(command):
    ran = command("Causal() & Padding([9, 40])", "--lengths", 40, "--json", "--batch", 1, "--pairs")
    shown = show(mask_from("Causal() & Padding([9, 40])"), (40, 40), batch=1, pairs=True)
    found = json.loads(ran.output)
    assert found == as_dict(shown) and found["batches"] == 2 and found["counts"]["total"] == 9
    assert found["tiles"] == ["css", "fcs", "ffc"]
    assert found["pairs"][2] == "111" + "0" * 37


# ---- The picture

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize(
    ("mask", "lengths", "tile"),
    [
        (tilewise.Causal(), (70, 100), (16, 32)),
        (tilewise.Window(30, 20), (100, 33), (16, 16)),
        (tilewise.Causal(), (0, 20), (16, 16)),
        (tilewise.Causal(), (128, 1), (64, 16)),
    ],
    ids=["causal", "window", "no rows", "one key"],
)
def test_the_picture_has_a_rectangle_a_tile(mask, lengths, tile):
    shown = show(mask, lengths, tile=tile, pairs=True)
    root = ElementTree.fromstring(picture(shown))
    *rects, _, _, _ = root.iter(f"{SVG}rect")  # the last three are the legend's
    assert [rect.get("class") for rect in rects] == [coverage.STATES[s] for s in shown.states.flatten()]
    assert root.find(f"{SVG}title").text.startswith(repr(mask))
    if not rects:
        return
    left, top = (float(rects[0].get(axis)) - 0.5 for axis in "xy")
    right, bottom = (
        max(float(rect.get(axis)) + float(rect.get(size)) for rect in rects) + 1.5
        for axis, size in (("x", "width"), ("y", "height"))
    )
    unit_x, unit_y = (right - left) / lengths[1], (bottom - top) / lengths[0]
    for number, rect in enumerate(rects):  # each begins where its tokens do
        i, j = divmod(number, shown.grid[1])
        assert float(rect.get("x")) - 0.5 == pytest.approx(left + j * tile[1] * unit_x, abs=0.1)
        assert float(rect.get("y")) - 0.5 == pytest.approx(top + i * tile[0] * unit_y, abs=0.1)
    runs = re.findall(r"M(\S+) (\S+?)h([\d.]+)v", "".join(p.get("d") for p in root.iter(f"{SVG}path")))
    drawn = torch.zeros(lengths, dtype=torch.bool)
    for x, y, wide in runs:
        begin, row = round((float(x) - left) / unit_x), round((float(y) - top) / unit_y)
        drawn[row, begin : begin + round(float(wide) / unit_x)] = True
    cut = (shown.states == CUT).repeat_interleave(tile[0], 0).repeat_interleave(tile[1], 1)
    assert torch.equal(drawn, shown.pairs & cut[: lengths[0], : lengths[1]])


def test_the_command_writes_the_picture(command, tmp_path):
    ran = command("Causal()", "--lengths", 40000, "--svg", tmp_path / "causal.svg")
    assert ran.exit_code == 0 and not ran.output
    written = (tmp_path / "causal.svg").read_text(encoding="utf-8")
    shown = show(tilewise.Causal(), (40000, 40000))
    assert written == picture(shown) and "a rectangle is 7 × 7 of them" in written
    *rects, _, _, _ = ElementTree.fromstring(written).iter(f"{SVG}rect")
    assert [rect.get("class") for rect in rects] == [coverage.STATES[s] for s in shown.blocks(7, 7).flatten()]
    assert command("Causal()", "--svg", tmp_path / "no folder" / "a.svg").exit_code == 2


# ---- The gallery


def test_the_gallery_is_what_its_code_makes():
    """Every mask of the page against FlexAttention's, pair by pair; its picture, byte for byte; its table."""
    folder = ROOT / "docs" / "pictures" / "masks"
    page = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    script = runpy.run_path(str(folder / "make.py"))
    entries = script["entries"]()
    assert page.count("![") == len(entries) == len(list(folder.glob("*.svg"))) >= 15
    again = "is out of date; run: python docs/pictures/masks/make.py"
    expressions = 0
    for name, entry in entries.items():
        lengths, flex = (entry["Q_LEN"], entry["KV_LEN"]), entry["block_mask"].mask_mod
        assert flex is entry["mask_mod"]
        batches = entry["block_mask"].shape[0]
        theirs = create_mask(flex, batches, 1, *lengths, device=entry["device"])[:, 0]
        ours = torch.stack([script["shown"](entry, batch).pairs for batch in range(batches)])
        assert torch.equal(ours, theirs), name
        shown = script["drawn"](entry)
        assert shown.contradicted == 0
        drawn = picture(shown)
        assert (folder / f"{name}.svg").read_text(encoding="utf-8") == drawn, f"{name}.svg {again}"
        assert script["visits"](name, entry) in page, f"the table's line of {name} {again}"
    for text in re.findall(r"^mask = (.*)$", page, re.M):
        try:
            found = mask_from(text)
        except ExpressionError:
            continue
        expressions += 1
        assert any(repr(entry["mask"]) == repr(found) for entry in entries.values()), text
    assert expressions >= 6
    for mask in ("Causal", "Window", "Prefix", "Padding", "Documents", "Intervals", "UserMask"):
        assert f"tw.{mask}" in page


def test_what_pages_show_is_what_it_prints(command):
    found = 0
    for page in sorted((ROOT / "docs").glob("*.md")):
        for words, printed in re.findall(
            r"^\$ tilewise show ([^\n]*)\n\n(.*?)^```", page.read_text(), re.M | re.S
        ):
            ran = command(*shlex.split(words))
            assert [line.rstrip() for line in ran.output.splitlines()] == printed.splitlines(), page.name
            found += 1
    assert found >= 2
