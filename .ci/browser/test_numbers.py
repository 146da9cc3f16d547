"""The numbers on the page are those of the recording, to the last bit, and the words about them add up."""

from __future__ import annotations

import os
import re

import numpy as np
import pytest
import torch
from view import beats, same

import tilewise as tw
from tilewise.plan import tiles
from tilewise.tools.watch.record import TILE

CELLS = ((1, -2), (-1, 3))  # of a matrix or a vector, as far as it has them


def cells_of(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    rows, columns = (*shape, 1, 1)[:2]
    return sorted({(row % rows, column % columns) for row, column in CELLS})


def element(array: np.ndarray, row: int, column: int) -> np.generic:
    return array.reshape(array.shape[0] if array.ndim else 1, -1)[row, column]


def test_each_variable_is_shown_as_recorded(show):
    """Of every pass, wherever a variable is first set in its second half, some numbers are read off the page."""
    view = show()
    for shown in view.recording.passes:
        view.tab(shown.name)
        found = beats(shown)
        asked = set()
        for position in [*range(len(found) // 2, len(found)), *range(len(found) // 2)]:
            new = {key: index for key, index in found[position].moment.sets.items() if key not in asked}
            if not new:
                continue
            view.go(position)
            for key, index in new.items():
                array = view.recording.arrays[index]
                for row, column in cells_of(array.shape):
                    said = view.point_at(key, row, column)
                    assert same(said, element(array, row, column)), (shown.name, key, row, column, said)
                asked.add(key)
        assert asked == {key for beat in found for key in beat.moment.sets}, shown.name


def test_o_is_what_the_call_gives(show, recorded):
    """The recording's tensor, the page's number and a call of tilewise, for every row's first column."""
    view = show()
    q, k, v = (torch.tensor(recorded.arrays[recorded.tensors[name]])[None, None] for name in "qkv")
    assert os.environ["TRITON_INTERPRET"] == "1"
    with tiles.use(TILE, ("forward",)):
        out = tw.attention(q, k, v, mask=tw.Causal(), impl="portable")[0, 0]
    view.press("Last moment")
    cells = view.page.locator(".map .growing .cells")
    assert len(out) == 40
    for row in range(0, len(out), 3):
        said = view.point(cells, row, 5)
        assert torch.equal(torch.tensor(said.number), out[row, 5]), row


def test_a_table_has_all_numbers(show, recorded):
    view = show()
    found = beats(view.pass_of("forward"))
    position = next(i for i, beat in enumerate(found) if "kept" in beat.moment.sets) + 1
    view.go(position)  # S with its mask
    view.point_at("s", 0, 0)
    view.press("As a table")
    shown = view.page.locator(".table tbody tr").evaluate_all(
        "rows => rows.map(row => [...row.querySelectorAll('td')].map(cell => cell.textContent))"
    )
    s = recorded.arrays[found[position].moment.sets["s"]]
    assert np.isneginf(s).any()
    assert np.array_equal(np.array(shown, dtype=np.float32), s)


def last_number(text: str) -> float:
    return float(re.findall(r"−?[\d.]+(?:e[+-]?\d+)?", text)[-1].replace("−", "-"))


def test_a_score_is_told_by_its_terms(show, recorded):
    view = show()
    found = beats(view.pass_of("forward"))
    position = next(i for i, beat in enumerate(found) if "s" in beat.moment.sets and beat.stage.state == "full")
    view.go(position)
    row, key = 3, 5
    said = view.point_at("s", row, key)
    q, k = (recorded.arrays[recorded.tensors[name]].astype(float) for name in "qk")
    first_row, first_key = (16 * place for place in found[position].stage.tile)
    terms = q[first_row + row] * k[first_key + key]
    largest = np.abs(terms).argmax()
    assert f"(column {largest})" in said.origin.split(" + ")[0]
    assert last_number(said.origin.split("\n")[0]) == pytest.approx(terms.sum(), rel=1e-3)
    words = recorded.words
    assert said.words == f"“{words['queries'][first_row + row]}” × “{words['keys'][first_key + key]}”"


def test_bytes_are_where_the_row_lies(show, recorded):
    view = show()
    found = beats(view.pass_of("forward"))
    position = next(i for i, beat in enumerate(found) if "k" in beat.moment.sets and beat.stage.tile[1] == 1)
    view.go(position)
    first = (16 + 2) * 16 * 4 + 7 * 4  # row 18, column 7, of 16 columns of 4 bytes
    assert f"bytes {first} to {first + 3} of K" in view.point_at("k", 2, 7).origin
    store = next(i for i, beat in enumerate(found) if beat.moment.stores)  # rows 32 to 39 run first
    view.go(store)
    first = (32 + 1) * 16 * 4
    assert f"Written to memory: bytes {first} to {first + 3} of O" in view.point_at("o", 1, 0).origin
    assert "Not written" in view.point_at("o", 12, 0).origin  # row 44 of 40


ORIGINS = (
    ("forward", "p", "exp(S − row_max)"),
    ("forward", "o", "O · rescale + P V"),
    ("forward", "row_sum", "row_sum · rescale + Σ P"),
    ("forward", "rescale", "exp(old row_max − new)"),
    ("forward", "lse", "row_max + ln row_sum"),
    ("dkv", "pT", "exp(S − row_max) / row_sum"),
    ("dkv", "dpT", "Row of V times row of dO"),
    ("dkv", "dsT", "P · (dP − delta)"),
    ("dq", "ds", "P · (dP − delta)"),
    ("dq", "dp", "Row of V times row of dO"),
)


def test_an_origin_ends_in_the_number(show):
    """What the page computes from other recorded numbers is the one that it explains."""
    view = show()
    for name, variable, begins in ORIGINS:
        view.tab(name)
        found = beats(view.pass_of(name))
        places = [i for i, beat in enumerate(found) if variable in beat.moment.sets and beat.stage.kind != "start"]
        if variable == "rescale":  # of a program's first step it is 0
            places = [i for i in places if found[i].stage is not found[i].program.stages[1]]
        view.go(places[len(places) // 2])
        said = view.point_at(variable, 1, 0)
        line = said.origin.split("\n")[0]
        assert line.startswith(begins), said
        assert last_number(line) == pytest.approx(float(said.number), rel=2e-3, abs=1e-6), said


def test_gradients_grow_by_what_is_told(show):
    view = show()
    for name, variable, product in (("dkv", "dv", "Pᵀ dO"), ("dkv", "dk", "dSᵀ Q"), ("dq", "dq", "dS K")):
        view.tab(name)
        found = beats(view.pass_of(name))
        places = [
            i for i, beat in enumerate(found) if variable in beat.moment.sets and beat.stage.kind == "step"
        ]
        view.go(places[1])
        said = view.point_at(variable, 2, 3)
        assert product in said.origin
        assert last_number(said.origin.split("\n")[0]) == pytest.approx(float(said.number), rel=2e-3, abs=1e-6)


def test_nothing_is_told_of_what_is_not_there(show):
    """A number of a tile that the walk has left is gone, and a skipped tile never had one."""
    view = show()
    found = beats(view.pass_of("forward"))
    view.go(next(i for i, beat in enumerate(found) if "p" in beat.moment.sets))
    assert view.point_at("p", 0, 0).value != "none"
    view.press("Next tile")
    assert view.said().value == "none" and "nothing stored it" in view.said().origin
    assert view.point(view.page.locator(".scores .cells"), 0, 39).origin.startswith("No program ever visits")
    assert view.point(view.page.locator(".scores .cells"), 30, 3).origin.startswith("Nothing is stored here")


def test_compared_weights_and_bytes(show, recorded):
    view = show()
    view.tab("compare")
    weights = recorded.compare.similarity[1]
    cells = view.page.locator('.compare .cells:has([data-name="weights-scaled dot product"])')
    for row, column in ((39, 0), (20, 20), (0, 1)):
        assert same(view.point(cells, row, column), recorded.arrays[weights.weights][row, column])
    cost = recorded.compare.bytes
    slider = view.page.get_by_label("Length N")
    for power in (17, 10, 7):
        slider.fill(str(power))
        size = cost.heads * 4**power * cost.element
        unit = (size.bit_length() - 1) // 10
        said = f"{size / 1024**unit:.3g} {['bytes', 'KiB', 'MiB', 'GiB'][unit]}"
        assert view.page.locator(".matrix-bytes").inner_text() == said


def test_the_online_softmax_of_a_row_is_the_kernels(show, recorded):
    view = show()
    view.tab("compare")
    view.page.get_by_label("Row", exact=True).first.select_option("39")
    (program,) = [each for each in view.pass_of("forward").programs if each.owns == (32, 40)]
    steps = [stage for stage in program.stages if stage.tile is not None]
    rows = view.page.locator("table.state tbody tr")
    assert rows.count() == len(steps) == 3
    for stage, row in zip(steps, rows.all(), strict=True):
        sets = {name: index for moment in stage.moments for name, index in moment.sets.items()}
        _, row_max, rescale, row_sum, *_ = row.locator("td").all_inner_texts()
        for text, name in ((row_max, "row_max"), (rescale, "rescale"), (row_sum, "row_sum")):
            expected = float(recorded.arrays[sets[name]][7])
            assert float(text.replace("−", "-")) == pytest.approx(expected, rel=1e-3), name
    view.page.get_by_label("Tiles taken in").fill("1")
    assert rows.nth(2).locator("td").nth(1).inner_text() == ""
