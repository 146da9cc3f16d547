"""A page as a reader uses it: open a tab, go to a moment, point at a number, read what is said of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from playwright.sync_api import Locator, Page

from tilewise.tools.watch.recording import Moment, Pass, Program, Recording, Stage

Array = np.ndarray
TITLE = "The cat sat </script><b>on & on"  # would break out of the page, if it could


@dataclass(frozen=True)
class Beat:
    """A moment, and where in the pass it lies."""

    program: Program
    stage: Stage
    moment: Moment


def beats(shown: Pass) -> list[Beat]:
    return [
        Beat(program, stage, moment)
        for program in shown.programs
        for stage in program.stages
        for moment in stage.moments
    ]


@dataclass(frozen=True)
class Said:
    """What the page says of the number that is pointed at."""

    name: str
    words: str
    value: str
    origin: str

    @property
    def number(self) -> np.float32:
        return np.float32({"true": 1, "false": 0}.get(self.value, self.value))


def same(said: Said, recorded: object) -> bool:
    """Whether a number is said to the last bit."""
    return bool(np.array_equal(said.number, np.float32(recorded), equal_nan=True))


def shape_in(label: str) -> tuple[int, int]:
    """Rows and columns of a field of cells, from what it is called."""
    rows, columns = re.search(r"(\d+) by (\d+)", label).groups()
    return int(rows), int(columns)


class View:
    def __init__(self, page: Page, recording: Recording) -> None:
        self.page, self.recording = page, recording
        self.complaints: list[str] = []
        page.set_default_timeout(5000)
        page.on("console", lambda message: self.complaints.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        page.on("requestfailed", lambda request: self.complaints.append(f"failed: {request.url}"))
        page.on("request", self.asked)

    def asked(self, request: object) -> None:
        if not request.url.startswith(("file:", "data:")):
            self.complaints.append(f"network: {request.url}")

    def open(self, file: Path) -> None:
        self.page.goto(file.as_uri())

    def pass_of(self, name: str) -> Pass:
        return next(each for each in self.recording.passes if each.name == name)

    def tab(self, name: str) -> None:
        self.page.locator(f"#tab-{name}").click()

    def go(self, position: int) -> None:
        self.page.locator(".slider").fill(str(position))

    @property
    def position(self) -> int:
        return int(self.page.locator(".slider").input_value())

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).click()

    def variable(self, name: str) -> Locator:
        return self.page.locator(f'.step [data-variable="{name}"]').first

    def point(self, cells: Locator, row: int, column: int) -> Said:
        """Point at a cell of what is drawn."""
        found = cells.evaluate(
            """each => {
                each.scrollIntoView({ block: "center", inline: "center" });
                const box = each.getBoundingClientRect();
                return [box.left, box.top, box.width, box.height, each.ariaLabel];
            }"""
        )
        left, top, width, height, label = found
        rows, columns = shape_in(label)
        self.page.mouse.move(left + (column + 0.5) * width / columns, top + (row + 0.5) * height / rows)
        return self.said()

    def point_at(self, name: str, row: int, column: int) -> Said:
        """Point at an element of a variable of the step."""
        figure = self.variable(name)
        if figure.get_attribute("data-transposed") == "true":
            row, column = column, row
        return self.point(figure.locator(".cells"), row, column)

    def said(self) -> Said:
        places = [".name", ".what .of", ".value", ".origin"]
        texts = self.page.evaluate(
            "places => places.map(place => document.querySelector(`.inspector ${place}`).innerText)", places
        )
        return Said(*texts)

    def pixels(self, canvas: Locator, rows: int, columns: int) -> Array:
        """The colour a quarter into each cell, where no number is written, [rows, columns, 3]."""
        flat = canvas.evaluate(
            """(canvas, [rows, columns]) => {
                const pen = canvas.getContext("2d", { willReadFrequently: true });
                const { data } = pen.getImageData(0, 0, canvas.width, canvas.height);
                const found = [];
                for (let i = 0; i < rows; i++)
                    for (let j = 0; j < columns; j++) {
                        const x = Math.floor(((j + 0.08) * canvas.width) / columns);
                        const y = Math.floor(((i + 0.12) * canvas.height) / rows);
                        const at = 4 * (y * canvas.width + x);
                        found.push(data[at], data[at + 1], data[at + 2]);
                    }
                return found;
            }""",
            [rows, columns],
        )
        return np.array(flat, dtype=float).reshape(rows, columns, 3)
