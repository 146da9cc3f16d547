"""What did each implementation do in each case? The rows of a group as a table, in Markdown and in colour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table as RichTable
from rich.text import Text

from ..results import Row, Status
from .cases import in_words
from .ranking import HOPPER, Contest, case_names, contests, has_rate, is_tilewise, limit, over_portable
from .sections import Section
from .units import digits, duration, memory, one_line, percent, span, times

# To the left; numbers stand to the right.
TEXT_COLUMNS = ("case", "in words", "implementation", "status", "group", "goal", "level", "lowest", "highest")
NOT_OK: tuple[Status, ...] = ("wrong", "failed", "left out", "unsupported", "unavailable")
SHOWN_CASES = 4  # in a note; of more, the number


@dataclass(frozen=True)
class Table:
    """Cells ready to print. `ours` says which lines are tilewise's."""

    title: str
    columns: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    ours: tuple[bool, ...] = ()
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        """The table, and its notes as a list."""
        from tabulate import tabulate  # an evidence run prints to the terminal alone, and does without

        align = ["left" if column in TEXT_COLUMNS or not column else "right" for column in self.columns]
        parts = []
        if self.lines:
            escaped = [[cell.replace("|", "\\|") for cell in line] for line in self.lines]
            parts.append(
                tabulate(escaped, self.columns, tablefmt="pipe", colalign=align, disable_numparse=True)
            )
        parts += ["\n".join(f"- {note}" for note in self.notes)] if self.notes else []
        return "\n\n".join(parts)

    def rich(self) -> RichTable:
        table = RichTable(
            title=Text(self.title, style="bold"),
            title_justify="left",
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            caption=Text("\n".join(self.notes)) if self.notes else None,
            caption_justify="left",
        )
        for column in self.columns:
            left = column in TEXT_COLUMNS or not column
            table.add_column(column, justify="left" if left else "right", overflow="fold")
        for line, ours in zip(self.lines, self.ours or (False,) * len(self.lines), strict=True):
            table.add_row(*map(Text, line), style="bold" if ours else None)
        return table


def group_table(section: Section, group: str, is_page: bool = False) -> Table:
    """A line for every row of the group that is worth one, fastest first within a case; in notes, who could
    not take part and why. is_page: with room for a column that says in words what each case is."""
    rows = section.groups[group]
    works, names = list(dict.fromkeys(row.work for row in rows)), case_names(rows)
    lines, ours = [], []
    for contest in contests(rows):
        name = names[contest.key]
        for row in in_order(contest):
            words = in_words(row) if is_page and name else ""
            first = {"case": name, "in words": words, "implementation": row.implementation}
            lines.append(first | cells(section, contest, row))
            ours.append(is_tilewise(row.implementation))
            name = ""  # said once
    # A column that says nothing in any line is left out.
    columns = [c for c in dict.fromkeys(c for line in lines for c in line) if any(line[c] for line in lines)]
    return Table(
        title=group if len(works) != 1 or works[0] in group else f"{group}: {works[0]}",
        columns=tuple(columns),
        lines=tuple(tuple(line[column] for column in columns) for line in lines),
        ours=tuple(ours),
        notes=tuple(reasons(rows)),
    )


def in_order(contest: Contest) -> list[Row]:
    """Right and timed rows by their time, then wrong and failed ones. Who does not offer what the case asks
    for is told in a note instead, but tilewise always has its line."""
    shown = [
        row
        for row in contest.rows
        if row.status not in ("unsupported", "unavailable") or is_tilewise(row.implementation)
    ]
    return sorted(shown, key=lambda row: (row.status != "ok", row.median is None, row.median or 0.0))


def cells(section: Section, contest: Contest, row: Row) -> dict[str, str]:
    """One line of the table by column; rates and ratios only of right answers on a GPU."""
    line = dict.fromkeys(
        [
            "median", "p20 to p80", "TFLOP/s", "of matmul", "GB/s", "of copy", "ratio", "over portable",
            "extra memory",
        ], ""
    )  # fmt: skip
    median = row.median
    if median:
        low, high = np.percentile(row.seconds, (20, 80))
        line |= {"median": duration(median), "p20 to p80": span(float(low), float(high), median)}
    if median and section.on_gpu and row.status == "ok":
        ceilings = section.ceilings
        ratio = contest.ratio(row)
        line["ratio"] = "" if ratio is None else times(ratio)
        gain = over_portable(contest) if row.implementation == HOPPER else None
        line["over portable"] = "" if gain is None else times(gain)
        if has_rate(row):
            line["TFLOP/s"] = digits(row.flops / median / 1e12)
            rate = ceilings and ceilings.matmul_flops_per_second.get(row.dtype)
            line["of matmul"] = percent(row.flops / median / rate) if rate else ""
        if ceilings and ceilings.copy_bytes_per_second and limit(row, ceilings) == "memory":
            line["GB/s"] = digits(row.bytes / median / 1e9)
            line["of copy"] = percent(row.bytes / median / ceilings.copy_bytes_per_second)
    if row.peak_bytes is not None:
        line["extra memory"] = memory(row.peak_bytes)
    line["error"] = "" if row.error is None else f"{row.error:.1e}"
    line["PyTorch's error"] = "" if row.torch_error is None else f"{row.torch_error:.1e}"
    line["status"] = "" if row.status == "ok" else row.status.upper() if row.status == "wrong" else row.status
    return line


def reasons(rows: Sequence[Row], statuses: Sequence[Status] = NOT_OK) -> list[str]:
    """Every row of these statuses with its reason, in one line where implementation and reason are the same;
    tilewise's first."""
    everything = {row.key for row in rows}
    same: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.status in statuses:
            same.setdefault((row.implementation, row.status, row.reason), []).append(row)
    lines = []
    for (implementation, status, reason), found in sorted(
        same.items(), key=lambda one: not is_tilewise(one[0][0])
    ):
        cases = list(dict.fromkeys(row.case for row in found))
        if len({row.key for row in found}) == len(everything):
            where = "every case"
        elif len(cases) <= SHOWN_CASES:
            where = ", ".join(cases)
        else:
            where = f"{len(cases)} cases from {cases[0]} to {cases[-1]}"
        lines.append(f"{implementation}: {status} in {where}: {one_line(reason) or 'no reason given'}")
    return lines
