"""The project's docstrings as Markdown: a line `name:   what it is` becomes an item of a list.

Docstrings here are plain text whose lines break by hand. A line that begins with names and a colon is about
an argument, with the lines that follow it up to an empty one; other indented text is code; all else is prose.
"""

from __future__ import annotations

import re

import griffe

NAME = r"[a-z_]\w*"
ITEM = re.compile(rf"^(?P<name>{NAME}(?:, {NAME})*(?:\([^)]*\))?(?: -> [\w ,]+)?):\s+(?P<text>\S.*)$")


def markdown(docstring: str) -> str:
    """The docstring with a list of its arguments, and what Markdown would take for its own escaped."""
    lines: list[str] = []
    in_item = False
    for line in docstring.splitlines():
        if item := ITEM.match(line):
            if not in_item and lines and lines[-1]:
                lines.append("")
            lines.append(f"- `{item['name']}`: {escaped(item['text'])}")
            in_item = True
        elif in_item and line:
            lines.append("    " + escaped(line.strip()))
        else:
            in_item = False
            lines.append(line if line.startswith("    ") else escaped(line))
    return "\n".join(lines)


def escaped(text: str) -> str:
    """Stars, angles and double underscores as they stand; what is in backticks is left alone."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part if part.startswith("`") else re.sub(r"(\*|__)", r"\\\1", part).replace("<", "&lt;")
        for part in parts
    )


class FreeForm(griffe.Extension):
    """Rewrites each docstring as it is loaded."""

    def on_instance(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
