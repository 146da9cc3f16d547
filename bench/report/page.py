"""What does a whole report look like? A page of Markdown with a section a machine, and pictures beside it."""

from __future__ import annotations

from pathlib import Path

from .cases import group_title
from .figures import Picture, draw_all, slug
from .sections import Section
from .summary import NO_SPEED, ceiling_line, gain_table, goal_table, ratio_table, status_lines
from .table import group_table
from .units import count

PAGE = "report.md"
HOW_TO_READ = """\
"case" is a name for commands, and "in words" what it is. "median" and "p20 to p80" are of the row's
samples. "ratio" is the time of the fastest rival over the row's own: above 1 the row is faster than every
rival. "over portable" is the portable kernel's time over that of Hopper's forward. TFLOP/s count the
matmuls over the pairs of query and key that count; "of matmul" and "of copy" are shares of what a large
matmul and a copy reached in the same run; GB/s stand where memory is the limit. "extra memory" is the most
that a call had in use beyond what was there before it. "error" is the largest distance from float64, beside
that of PyTorch's own computation in the same dtype. A row whose answer is wrong is never anybody's fastest
rival."""


def write_report(sections: list[Section], out: Path) -> Path:
    """Write report.md and its pictures into the folder `out`; returns the page's path."""
    out.mkdir(parents=True, exist_ok=True)
    parts = ["# Benchmarks", HOW_TO_READ]
    for number, section in enumerate(sections, 1):
        prefix = slug(section.name) if len(sections) == 1 else f"{number}-{slug(section.name)}"
        parts += section_parts(section, draw_all(section, out, prefix))
    page = out / PAGE
    page.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return page


def section_parts(section: Section, pictures: list[Picture]) -> list[str]:
    """The section's paragraphs: where it was measured, how tilewise stands, then each group."""
    parts = [f"## {section.name}", section.made_with]
    if section.on_gpu:
        parts.append(ceiling_line(section))
    else:
        parts.append(f"**{NO_SPEED}**")
    parts.append("\n".join(f"- {line}" for line in about(section)))
    tables = [ratio_table(section), gain_table(section), goal_table(section)] if section.on_gpu else []
    for table in tables:
        if table is not None and table.lines:
            parts += [f"### {table.title}", table.markdown()]
    parts += ["### What came of it", "\n".join(f"- {line}" for line in status_lines(section))]
    parts += [shown(picture) for picture in pictures if picture.group is None]
    for group in section.groups:
        table = group_table(section, group, is_page=True)
        parts += [f"### {table.title}", f"{group_title(group)}." if group_title(group) != group else ""]
        parts += [shown(picture) for picture in pictures if picture.group == group]
        parts.append(table.markdown())
    return parts


def about(section: Section) -> list[str]:
    """Where the section comes from, all versions, and the GPU's state before the first row."""
    machine = section.machine
    lines = [f"from {', '.join(section.files)}"]
    lines.append(", ".join(f"{name} {version}" for name, version in machine.versions.items()))
    if machine.clocks:
        lines.append(", ".join(f"{name} {value:g}" for name, value in machine.clocks.items()))
    for stage in section.stages:
        state = ", ".join(f"{name} {value:g}" for name, value in stage.clocks.items())
        lines.append(f"before {stage.name}: {state}" if state else "")
    if section.repeated:
        lines.append(f"{count(section.repeated, 'row')} measured again later: the last one counts")
    return [line for line in lines if line]


def shown(picture: Picture) -> str:
    """The picture; a click leads to the SVG."""
    return f"[![{picture.title}]({picture.file}.png)]({picture.file}.svg)"
