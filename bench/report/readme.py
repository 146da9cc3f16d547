"""What does the README say about speed? What the results in bench/measured say, and nothing else.

The goals in docs/benchmarks.md are written from `goals.py` alongside.
"""

from __future__ import annotations

from pathlib import Path

from ..results import load
from .goals import levels
from .sections import Section, gather
from .summary import ceiling_line, gain_table, goal_table, ratio_table, status_lines

ROOT = Path(__file__).parents[2]
MEASURED = Path("bench", "measured")
NOTHING = (
    "Nothing is said about speed until it is measured. `python bootstrap.py bench evidence --out DIR` "
    "measures it, on a GPU, beside every rival that is installed; [docs/benchmarks.md](docs/benchmarks.md) "
    "says how, and what tilewise is meant to reach."
)


def measured(folder: Path) -> list[Section]:
    """The committed results, a section a machine. Raises ValueError for one that was made without a GPU."""
    sections = gather([load(path) for path in sorted(folder.glob("*.jsonl"))])
    for section in sections:
        if not section.on_gpu:
            raise ValueError(
                f"{folder}: {', '.join(section.files)}: made without a GPU, which belongs elsewhere"
            )
    return sections


def performance(sections: list[Section]) -> str:
    """The README's section, in Markdown."""
    if not sections:
        return NOTHING
    parts = []
    for section in sections:
        files = ", ".join(f"[{name}](bench/measured/{name}.jsonl)" for name in section.files)
        parts.append(f"**{section.name}**: {section.made_with}; {ceiling_line(section)}. From {files}.")
        for table in (ratio_table(section), gain_table(section), goal_table(section)):
            if table is not None and table.lines:
                parts += [f"{table.title}:", table.markdown()]
        parts.append("\n".join(f"- {line}" for line in status_lines(section)))
    parts.append("[docs/benchmarks.md](docs/benchmarks.md) says how it was measured and how to repeat it.")
    return "\n\n".join(parts)


def between(text: str, name: str, body: str) -> str:
    """The text with `body` between the two markers of this name. Raises ValueError where they are missing."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"the page must have each of the lines {begin} and {end} once")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{body}\n{end}{rest.split(end)[1]}"


def filled(root: Path = ROOT) -> dict[Path, str]:
    """Each generated page's path, and its text as it ought to be."""
    bodies = {
        root / "README.md": ("performance", performance(measured(root / MEASURED))),
        root / "docs" / "benchmarks.md": ("goals", levels().markdown()),
    }
    return {path: between(path.read_text(encoding="utf-8"), *body) for path, body in bodies.items()}
