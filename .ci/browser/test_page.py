"""The page as a file: one, small, at home without a network and without JavaScript; open to everybody."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from view import TITLE

PACKAGE = Path(__file__).parents[2] / "kernels" / "tilewise" / "tools" / "watch"
AXE = PACKAGE / "page" / "node_modules" / "axe-core" / "axe.min.js"
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]


def test_it_is_small_and_opens_soon(show, files, recorded):
    assert (PACKAGE / "page.html").stat().st_size < 500_000
    assert files["recorded"].stat().st_size < 5_000_000
    started = time.perf_counter()
    view = show()
    view.page.locator(".map canvas").first.wait_for()
    print(f"drawn after {time.perf_counter() - started:.2f} s")
    assert view.page.title() == TITLE == view.page.locator("h1").inner_text()
    assert view.page.locator("header").inner_text().count(recorded.call.text) == 1


def test_without_javascript_it_says_so(browser, files):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(files["recorded"].as_uri())
    assert "needs JavaScript" in page.locator("body").inner_text()
    context.close()


@pytest.mark.parametrize(
    ("width", "scheme", "names"),
    [
        (1280, "light", ("forward", "dkv", "dq", "splits", "combine", "hopper", "compare")),
        (1280, "dark", ("forward", "hopper", "compare")),
        (360, "light", ("forward", "compare")),
    ],
)
def test_nothing_shuts_anybody_out(width, scheme, names, show):
    """axe-core finds nothing of weight."""
    if not AXE.exists():
        raise RuntimeError(f"no {AXE}: run `npm ci` in {PACKAGE / 'page'}, as .ci/browser/build does")
    view = show(color_scheme=scheme, viewport={"width": width, "height": 720})
    view.page.add_script_tag(path=str(AXE))
    for name in names:
        view.tab(name)
        if name != "compare":
            view.go(25)
            view.point(view.page.locator(".step .cells").first, 1, 0)
        found = view.page.evaluate(
            "async (rules) => (await axe.run({ runOnly: rules })).violations.map("
            "each => [each.impact, each.id, each.nodes.map(node => node.html).slice(0, 3)])",
            RULES,
        )
        assert not [each for each in found if each[0] in ("serious", "critical", "moderate")], name


def test_every_control_is_reached_with_the_tab_key(show):
    view = show()
    view.go(25)
    reachable = "button:not(:disabled):not([tabindex='-1']), input, select, summary, [tabindex='0']"
    expected = view.page.evaluate(
        "(what) => [...document.querySelectorAll(what)].filter(each => each.checkVisibility()).length",
        reachable,
    )
    view.page.evaluate("document.activeElement.blur(); window.scrollTo(0, 0); window.seen = new Set()")
    for _ in range(expected + 9):  # once around, from wherever the last focus was
        view.page.keyboard.press("Tab")
        view.page.evaluate("document.activeElement !== document.body && seen.add(document.activeElement)")
    missed = view.page.evaluate(
        "(what) => [...document.querySelectorAll(what)]"
        ".filter(each => each.checkVisibility() && !seen.has(each)).map(each => each.outerHTML.slice(0, 99))",
        reachable,
    )
    assert expected > 30 and not missed
