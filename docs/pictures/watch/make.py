"""Make the pictures of `tilewise watch` again: `python docs/pictures/watch/make.py`.

Needs the extras "demo" and "browser", the demo's model and a Chromium. A browser draws letters as its version
and the machine's fonts have them, so nobody compares these pictures; look at them before they are committed.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Locator, Page, sync_playwright

HERE = Path(__file__).parent
BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome")
SENTENCE = "The cat sat on the mat because it was warm."
HEAD = ("--layer", "6", "--head", "12", "--mask", "none")
# What is recorded, by name.
PAGES = {"text": (), "sentence": (SENTENCE, *HEAD), "article": ("--article", "--mask", "none")}
# Picture: the page, the tab, the moment (from 0), what is taken of it, the size of the window.
PICTURES = {
    "page": ("text", "forward", "P = exp", None, (1440, 1240)),
    "words": ("sentence", "forward", "O = O · rescale", "map", (1100, 900)),
    "step": ("sentence", "forward", "O = O · rescale", "step", (1100, 900)),
    "similarities": ("sentence", "compare", "", "similarity", (1300, 900)),
    "online": ("text", "compare", "", "online", (1200, 900)),
    "article": ("article", "forward", "O = O · rescale", "step", (1100, 900)),
    "hopper": ("text", "hopper", "O = O + P V", "timeline", (1440, 900)),
}
COLOURS = 200


def record(folder: Path) -> dict[str, Path]:
    """The pages, each in a folder of its own."""
    found = {}
    for name, words in PAGES.items():
        command = [sys.executable, "-m", "tilewise", "watch", *words, "--out", name]
        subprocess.run(command, cwd=folder, check=True, env=os.environ | {"TRITON_INTERPRET": "1"})
        found[name] = folder / name / "index.html"
    return found


def go_to(page: Page, equation: str) -> None:
    """Step on to a moment in the middle of the walk that says so."""
    slider = page.locator("input.slider")
    most = int(slider.get_attribute("max") or 0)
    for moment in range(most // 2, most + 1):
        slider.fill(str(moment))
        if equation in (page.locator(".now").inner_text()):
            return
    raise SystemExit(f"no moment says {equation}")


def save(path: Path, png: bytes) -> None:
    """With few colours: a picture of flat ones needs no more."""
    Image.open(io.BytesIO(png)).convert("RGB").quantize(COLOURS).save(path, optimize=True)


def main() -> None:
    browser_path = next(path for name in BROWSERS if (path := shutil.which(name)))
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        pages = record(Path(folder))
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            for name, (source, tab, equation, part, (width, height)) in PICTURES.items():
                if part is not None and scheme == "dark":
                    continue
                page = browser.new_page(
                    viewport={"width": width, "height": height}, color_scheme=scheme, device_scale_factor=1.5,
                    reduced_motion="reduce",
                )  # fmt: skip
                page.goto(pages[source].as_uri())
                page.locator(f"#tab-{tab}").click()
                if equation:
                    go_to(page, equation)
                page.mouse.move(0, 0)
                taken: Page | Locator = page
                if part is None:
                    page.locator(".how summary").click()
                else:  # by its heading; nothing lies over it
                    page.add_style_tag(content=".dock, .now, .tabs { display: none }")
                    page.evaluate("document.querySelectorAll('details').forEach((x) => (x.open = false))")
                    taken = page.locator(f"section[aria-labelledby={part}-title]")
                save(HERE / f"{name}{'_dark' if scheme == 'dark' else ''}.png", taken.screenshot())
                page.close()


if __name__ == "__main__":
    main()
