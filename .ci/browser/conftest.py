"""Recordings of small calls as pages, and a browser that opens them: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
from playwright.sync_api import Browser, sync_playwright
from view import TITLE, View

import tilewise as tw
from tilewise.plan.request import make_request
from tilewise.tools.watch.page import write
from tilewise.tools.watch.record import Asked, record
from tilewise.tools.watch.recording import Recording

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
WORDS = (
    "the cat sat on the mat because it was warm , and the dog that chased it all morning lay down beside the "
    "stove . nobody had told them where the others slept , so they went to look ."
).split()


@pytest.fixture(scope="session")
def recorded() -> Recording:
    """Every pass there is: a causal call over words of 16 numbers, in tiles of 16, the last of them half."""
    torch.manual_seed(0)
    length = 40
    q, k, v = torch.randn(3, 1, 1, length, 16)
    words = WORDS[:length]
    assert len(words) == length
    return record(Asked(make_request(q, k, v, mask=tw.Causal()), TITLE, "a test", words=(words, words)))


@pytest.fixture(scope="session")
def unlike() -> Recording:
    """What differs: two heads of queries on one of keys, other lengths, dimensions and dtype, a mask with holes, a score."""
    torch.manual_seed(1)
    q = torch.randn(1, 2, 21, 24).bfloat16()
    k, v = torch.randn(1, 1, 35, 24).bfloat16(), torch.randn(1, 1, 35, 8).bfloat16()
    request = make_request(q, k, v, mask=tw.Window(9, 3) & tw.Dense(torch.rand(21, 35) > 0.2), score=tw.Softcap(20.0))
    return record(Asked(request, "Window and softcap", "a test", head=1))


@pytest.fixture(scope="session")
def files(recorded: Recording, unlike: Recording, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    return {
        name: write(recording, folder / name)
        for name, recording in (("recorded", recorded), ("unlike", unlike))
    }


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        raise RuntimeError(f"no browser: install one of {', '.join(BROWSERS)} (apt-get install chromium)")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@pytest.fixture
def show(
    browser: Browser, files: dict[str, Path], recorded: Recording, unlike: Recording
) -> Iterator[Callable[..., View]]:
    """Opens a page; afterwards nothing may have been said in its console, or asked of a network."""
    opened: list[View] = []
    recordings = {"recorded": recorded, "unlike": unlike}

    def open_page(name: str = "recorded", **options: object) -> View:
        settings = {"viewport": {"width": 1280, "height": 720}, "reduced_motion": "reduce"} | options
        context = browser.new_context(**settings)
        view = View(context.new_page(), recordings[name])
        opened.append(view)
        view.open(files[name])
        return view

    yield open_page
    for view in opened:
        view.page.context.close()
        assert not view.complaints
