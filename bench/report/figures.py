"""Which pictures does a report have? All that its rows allow, each as SVG and PNG."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from .accuracy import draw_accuracy
from .bars import draw_bars
from .roofline import draw_roofline
from .scaling import draw_scaling
from .sections import Section
from .style import save


@dataclass(frozen=True)
class Picture:
    """Two files: `file` with ".svg" and with ".png". group: None where it is about all of them."""

    group: str | None
    title: str
    file: str


def slug(text: str) -> str:
    """A file's name: "NVIDIA H200" becomes "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def draw_all(section: Section, folder: Path, prefix: str) -> list[Picture]:
    """Draw what the section's rows allow into `folder`, one picture at a time in memory."""
    pictures: list[Picture] = []

    def keep(group: str | None, title: str, name: str, figure: Figure | None) -> None:
        if figure is not None:
            pictures.append(Picture(group, title, f"{prefix}-{slug(name)}"))
            save(figure, folder, pictures[-1].file)

    keep(None, "roofline", "roofline", draw_roofline(section))
    for group, rows in section.groups.items():
        for work in dict.fromkeys(row.work for row in rows):
            name = group if work in group else f"{group}, {work}"
            keep(group, f"{name}: speed by length", f"{name} scaling", draw_scaling(section, group, work))
        keep(group, f"{group}: each case", f"{group} bars", draw_bars(section, group))
        right = draw_accuracy(section, group)
        keep(group, f"{group}: how far from the exact answer", f"{group} errors", right)
    return pictures
