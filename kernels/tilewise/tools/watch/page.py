"""A recording as a page: one file that opens from disk."""

from __future__ import annotations

import html
from importlib import resources
from pathlib import Path

from .recording import Recording

RECORDING, TITLE = "__RECORDING__", "__TITLE__"


def page(recording: Recording) -> str:
    """The page's text. Nothing in the recording can end the element that holds it."""
    template = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    before, after = template.split(RECORDING)
    data = recording.to_json().replace("<", "\\u003c")
    return before.replace(TITLE, html.escape(recording.title)) + data + after


def write(recording: Recording, folder: Path) -> Path:
    """Write index.html into a folder, which is made; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "index.html"
    path.write_text(page(recording), encoding="utf-8")
    return path
