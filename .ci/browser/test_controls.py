"""Every control does what it says, by mouse, by keyboard and by touch."""

from __future__ import annotations

import pytest
from view import View, beats

PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}


def stage_starts(view: View, name: str) -> list[int]:
    """The positions at which a step, or what is before or after the walk, begins."""
    found = beats(view.pass_of(name))
    return [i for i, beat in enumerate(found) if i == 0 or beat.stage is not found[i - 1].stage]


def test_buttons_and_slider_go_through_the_moments(show):
    view = show()
    last, starts = len(beats(view.pass_of("forward"))) - 1, stage_starts(view, "forward")
    assert view.position == 0
    for name, expected in (
        ("Next moment", 1),
        ("Previous moment", 0),
        ("Next tile", starts[1]),
        ("Next tile", starts[2]),
        ("Next moment", starts[2] + 1),
        ("Previous tile", starts[2]),  # first back to the beginning of this one
        ("Previous tile", starts[1]),
        ("Last moment", last),
        ("Next moment", last),
        ("First moment", 0),
        ("Previous tile", 0),
    ):
        view.press(name)
        assert view.position == expected, name
    view.go(17)
    assert view.page.locator(".count").inner_text() == f"18 / {last + 1}"


def test_keys_do_what_the_page_says(show):
    view = show()
    last, starts = len(beats(view.pass_of("forward"))) - 1, stage_starts(view, "forward")
    for key, expected in (
        ("ArrowRight", 1),
        ("ArrowLeft", 0),
        ("Shift+ArrowRight", starts[1]),
        ("PageDown", starts[2]),
        ("PageUp", starts[1]),
        ("Shift+ArrowLeft", 0),
        ("End", last),
        ("Home", 0),
    ):
        view.page.keyboard.press(key)
        assert view.position == expected, key
    view.page.get_by_text("Keys", exact=True).click()
    for key in ("Space", "Shift", "Page Up", "Home, End", "Enter"):
        assert view.page.locator(".keys dl").get_by_text(key).first.is_visible()


def test_it_plays_and_pauses(show):
    view = show()
    view.page.get_by_label("Speed").select_option("16")
    view.page.keyboard.press(" ")
    view.page.wait_for_function("Number(document.querySelector('.slider').value) >= 3")
    view.press("Pause")
    stopped = view.position
    view.page.wait_for_timeout(200)
    assert view.position == stopped
    last = len(beats(view.pass_of("forward"))) - 1
    view.go(last - 1)
    view.press("Play")
    view.page.get_by_role("button", name="Play").wait_for()  # at the end it stops by itself
    assert view.position == last
    view.press("Play")  # and begins again
    view.page.wait_for_function(f"Number(document.querySelector('.slider').value) < {last}")


def test_programs_are_chosen_by_list_button_and_tile(show):
    view = show()
    found = beats(view.pass_of("forward"))
    begin = [i for i, beat in enumerate(found) if i == 0 or beat.program is not found[i - 1].program]
    view.page.get_by_label("Program", exact=True).select_option("2")
    assert view.position == begin[2]
    view.page.locator(".programs button").nth(1).click()
    assert view.position == begin[1]
    assert view.page.locator(".programs button[aria-pressed=true]").count() == 1
    scores = view.page.locator(".scores .cells")
    box = scores.bounding_box()  # 40 x 40: the tile in the middle, of rows and keys 16 to 31
    scores.click(position={"x": box["width"] / 2, "y": box["height"] / 2})
    assert (
        found[view.position].stage.tile == (1, 1) and found[view.position].program is found[begin[1]].program
    )
    scores.click(position={"x": box["width"] - 2, "y": 2})  # skipped: no program ever stands there
    assert found[view.position].stage.tile == (1, 1)


def test_arrows_move_inside_a_matrix_and_not_through_the_moments(show):
    view = show()
    view.go(len(beats(view.pass_of("forward"))) - 1)
    cells = view.variable("q").locator(".cells")
    cells.focus()
    before = view.position
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "ArrowUp"):
        view.page.keyboard.press(key)
    assert view.said().name == "Q[1, 1]" and view.position == before
    spoken = view.page.locator("[aria-live]").inner_text()
    assert view.said().value in spoken and "Q[1, 1]" in spoken
    view.page.locator(".scores .cells").focus()
    for key in ["ArrowDown"] * 17 + ["ArrowRight"] * 3:  # to row 17 and key 3
        view.page.keyboard.press(key)
    view.page.keyboard.press("Enter")
    assert beats(view.pass_of("forward"))[view.position].stage.tile == (1, 0)
    assert "step 1 of 2, keys 0 to 15" in view.page.locator("[aria-live]").inner_text()


def test_each_pass_keeps_its_place_and_every_moment_draws(show):
    view = show()
    for shown in view.recording.passes:
        view.tab(shown.name)
        last = len(beats(shown)) - 1
        for position in sorted({0, last // 3, last // 2, last}):
            view.go(position)
            beat = beats(shown)[position]
            assert view.page.locator(".now .note").inner_text() == beat.moment.note
            lines = view.page.locator(".source .line.on")
            first, stop = beat.moment.lines
            assert [int(each.get_attribute("data-line")) for each in lines.all()] == [*range(first, stop + 1)]
    view.tab("forward")
    assert view.position == len(beats(view.pass_of("forward"))) - 1
    tabs = view.page.get_by_role("tab")
    assert tabs.count() == len(view.recording.passes) + 1
    tabs.first.press("ArrowLeft")  # around, to the last
    assert view.page.get_by_role("tab", name="Compare").get_attribute("aria-selected") == "true"


def test_an_unlike_call_is_shown_too(show):
    """Other lengths, dimensions, dtype and heads; a pass whose programs walk the rows of two heads."""
    view = show("unlike")
    for shown in view.recording.passes:
        view.tab(shown.name)
        for position in range(0, len(beats(shown)), 17):
            view.go(position)
    view.tab("dkv")
    heads = [each.stage.head for each in beats(view.pass_of("dkv"))]
    view.go(heads.index(1))
    assert "head 1" in view.page.locator(".whereabouts").inner_text()
    view.tab("compare")
    assert view.page.locator(".made", has_text="Not on this page").count() == len(view.recording.omitted) > 0


def test_cells_grow_and_shrink(show):
    view = show()
    view.go(30)
    width = view.variable("q").locator(".cells").bounding_box()["width"]
    view.press("Larger cells")
    assert view.variable("q").locator(".cells").bounding_box()["width"] > width
    view.press("Smaller cells")
    assert view.variable("q").locator(".cells").bounding_box()["width"] == pytest.approx(width)


def test_a_phone_has_room_and_fingers_do(show):
    view = show(**PHONE)
    for name in [each.name for each in view.recording.passes] + ["compare"]:
        view.page.locator(f"#tab-{name}").tap()
        assert view.page.evaluate("document.documentElement.scrollWidth") == 360, name
    view.page.locator("#tab-forward").tap()
    for button in view.page.locator(".transport button").all():
        box = button.bounding_box()
        assert min(box["width"], box["height"]) >= 40
    view.page.get_by_role("button", name="Next tile").tap()
    view.page.get_by_role("button", name="Play").tap()
    view.page.get_by_role("button", name="Pause").tap()
    cells = view.variable("q").locator(".cells")
    cells.evaluate("each => each.scrollIntoView({ block: 'center' })")
    cells.tap(position={"x": 3, "y": 3})
    assert view.said().name == "Q[0, 0]"
    view.page.get_by_text("How to read this").tap()
    assert view.page.get_by_text("The kernel never makes it").is_visible()
