"""What is drawn agrees with the data: colours, patterns, words, lanes; in both themes."""

from __future__ import annotations

import numpy as np
import pytest
from view import beats


def first(view, name, variable, state=None):
    return next(
        i
        for i, beat in enumerate(beats(view.pass_of(name)))
        if variable in beat.moment.sets and state in (None, beat.stage.state)
    )


def ranks(x: np.ndarray) -> np.ndarray:
    return np.argsort(np.argsort(x, kind="stable"), kind="stable")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_order_as_the_numbers(scheme, show, recorded):
    """Scores: blue above 0 and orange below, stronger for larger ones. Weights: further from the paper for
    larger ones. A matrix drawn on its side, or with rows swapped, would not."""
    view = show(color_scheme=scheme)
    position = first(view, "forward", "s", "full")
    view.go(position)
    s = recorded.arrays[beats(view.pass_of("forward"))[position].moment.sets["s"]][:8]  # of 16 rows, 40 = 32 + 8
    shown = view.pixels(view.variable("s").locator("canvas"), 16, 16)[:8]
    blueness = shown[..., 2] - shown[..., 0]
    centre = blueness[np.abs(s) < 0.05 * np.abs(s).max()].mean()
    large = np.abs(s) > 0.15 * np.abs(s).max()
    assert large.sum() > 60
    assert np.array_equal(np.sign(blueness - centre)[large], np.sign(s)[large])

    position = first(view, "forward", "p", "full")
    view.go(position)
    p = recorded.arrays[beats(view.pass_of("forward"))[position].moment.sets["p"]][:8]
    shown = view.pixels(view.variable("p").locator("canvas"), 16, 16)[:8]
    lightness = shown.sum(-1) * (1 if scheme == "dark" else -1)
    assert np.corrcoef(ranks(lightness.ravel()), ranks(p.ravel()))[0, 1] > 0.99


def test_what_is_masked_looks_like_no_number(show, recorded):
    view = show()
    found = beats(view.pass_of("forward"))
    position = next(i for i, beat in enumerate(found) if "kept" in beat.moment.sets) + 1
    view.go(position)
    s = recorded.arrays[found[position].moment.sets["s"]][:8]
    shown = view.pixels(view.variable("s").locator("canvas"), 16, 16)[:8]
    masked = shown[np.isneginf(s)]
    assert len(masked) > 20 and np.ptp(masked, axis=0).max() <= 8  # the edge of a line
    numbers = shown[np.isfinite(s)]
    assert np.abs(numbers - np.median(masked, axis=0)).max(-1).min() > 8


def test_the_map_has_the_grids_tiles_and_the_steps_numbers(show, recorded):
    view = show()
    for name in ("forward", "dkv"):
        view.tab(name)
        grid = "".join(view.pass_of(name).grid)
        for sign, kind in ((".", "skipped"), ("%", "cut"), ("#", "full")):
            assert view.page.locator(f".ground .tile.{kind}").count() == grid.count(sign) > 0
    patterns = {view.page.locator(f".ground .tile.{kind}").first.get_attribute("fill") for kind in ("cut", "skipped")}
    assert len(patterns - {None}) == 2  # told apart by more than colour
    # Sᵀ of a step, and S on the map
    position = first(view, "dkv", "sT", "full")
    view.go(position)
    canvas = view.page.locator('.on-map:not(.leaving) [data-name="map-sT"]')
    rows, keys = (16, 16) if beats(view.pass_of("dkv"))[position].stage.tile[0] < 2 else (8, 16)
    on_map = view.pixels(canvas, rows, keys)
    in_step = view.pixels(view.variable("sT").locator("canvas"), 16, 16)[:, :rows]
    assert np.abs(on_map - in_step.transpose(1, 0, 2)).max() <= 2


def test_numbers_fade_when_the_walk_leaves_unless_kept(show):
    view = show(reduced_motion="no-preference")
    view.page.get_by_label("Program", exact=True).select_option("1")
    for _ in range(3):
        view.press("Next tile")
    leaving = view.page.locator(".on-map.leaving")
    assert leaving.count() == 1
    assert leaving.evaluate("each => getComputedStyle(each).animationName") == "fade"
    view.page.wait_for_function("getComputedStyle(document.querySelector('.on-map.leaving')).opacity === '0'")
    view.page.get_by_label("keep what has been seen").check()
    assert leaving.count() == 0
    visited = sum(stage.tile is not None for stage in view.pass_of("forward").programs[0].stages)
    assert view.page.locator(".on-map").count() == visited + 2  # of program 1, two steps
    view.page.get_by_label("keep what has been seen").uncheck()
    assert view.page.locator(".on-map:not(.leaving)").count() <= 1


def test_reduced_motion_is_respected(show):
    view = show()  # as every page of these tests
    view.go(first(view, "forward", "p"))
    view.press("Next tile")
    leaving = view.page.locator(".on-map.leaving")
    assert leaving.evaluate("each => getComputedStyle(each).animationName") == "none"
    assert leaving.evaluate("each => getComputedStyle(each).opacity") == "0"


def test_the_theme_follows_the_system_and_the_button(show):
    view = show(color_scheme="dark")
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    dark = view.page.evaluate(ground)
    view.press("Switch to light colours")
    light = view.page.evaluate(ground)
    assert sum(map(int, dark[4:-1].split(","))) < 200 < 600 < sum(map(int, light[4:-1].split(",")))
    view.page.emulate_media(color_scheme="dark")  # what the reader chose, stays
    assert view.page.evaluate(ground) == light


def test_words_stand_at_their_rows(show, recorded):
    view = show()
    view.page.get_by_label("Program", exact=True).select_option("1")  # rows 16 to 31
    view.press("Next tile")
    words = view.variable("q").locator(".side-words span").all_inner_texts()
    assert words == recorded.words["queries"][16:32]
    view.point(view.page.locator(".scores .cells"), 17, 5)
    assert view.page.locator(".words text.on").all_text_contents() == [
        part * 2 for part in (recorded.words["queries"][17], recorded.words["keys"][5])
    ]  # its tooltip, and itself


def test_the_source_is_the_kernels(show, recorded):
    view = show()
    view.go(first(view, "forward", "new_max"))
    shown = view.page.locator(".source .line > span:last-child").all_text_contents()
    tokens = recorded.sources["parts/softmax.py"]
    assert [line.rstrip("\n") for line in shown] == ["".join(text for _, text in line) for line in tokens]
    assert "new_max" in view.page.locator(".statement").inner_text()
    on = view.page.locator(".source .line.on").first.bounding_box()
    box = view.page.locator(".source pre").bounding_box()
    assert box["y"] <= on["y"] <= box["y"] + box["height"]


def test_lanes_are_the_models_and_say_so(show):
    view = show()
    view.tab("hopper")
    model = view.pass_of("hopper").timeline
    assert view.page.locator(".timeline .lane").count() == len(model.lanes)
    assert view.page.locator(".timeline .span").count() == sum(len(lane.spans) for lane in model.lanes)
    assert "A model, not measured." in view.page.locator(".timeline").inner_text()
    found = beats(view.pass_of("hopper"))
    places = [i for i, beat in enumerate(found) if beat.moment.role == "warpgroup 1" and "p" in beat.moment.sets]
    clocks = []
    for position in places:
        view.go(position)
        clocks.append(float(view.page.locator(".timeline .clock").get_attribute("x1")))
    assert clocks == sorted(clocks) and clocks[0] < clocks[-1]


def test_rounding_has_a_line_for_each_dtype(show, recorded):
    view = show()
    view.tab("compare")
    figure = view.page.locator("section", has=view.page.get_by_role("heading", name="Rounding"))
    for choice in ("-1", "39"):
        figure.get_by_label("Row", exact=True).select_option(choice)
        for each in recorded.compare.rounding:
            assert figure.locator("svg").get_by_text(each.dtype, exact=True).count() == 1
