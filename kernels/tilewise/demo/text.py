"""Where sentences come from: arguments, a file, standard input, or the text that ships with the demo."""

from __future__ import annotations

import os
import select
import stat
import sys
from importlib import resources
from pathlib import Path
from typing import NamedTuple


class DemoError(Exception):
    """The caller must change something; the message says what, in one line."""


def check_choice(option: str, given: int, count: int) -> None:
    """Raise DemoError where an option, which counts from 1, names none of so many."""
    if not 1 <= given <= count:
        raise DemoError(f"{option} {given} must be from 1 to {count}")


class Text(NamedTuple):
    """Sentences, where they came from, and a remark for the reader ("" for none)."""

    sentences: list[str]
    origin: str
    remark: str = ""


def read_text(arguments: list[str], file: Path | None, encoding: str) -> Text:
    """The sentences that the command line asks for, one a line, blank lines left out.

    arguments: sentences, or "-" alone for standard input. file: a text file in `encoding`. With neither,
    whatever is waiting on standard input, else the default text. Raises DemoError if that leaves no sentence.
    """
    if arguments and file is not None:
        raise DemoError("give sentences or --file, not both")
    if file is not None:
        return _one_a_line(_read_file(file), encoding, str(file))
    if arguments == ["-"]:
        return _one_a_line(sys.stdin.buffer.read(), encoding, "standard input")
    if arguments:
        return _one_a_line("\n".join(arguments).encode("utf-8", "surrogateescape"), "utf-8", "the arguments")

    remark = ""
    if _stdin_is_piped():
        if not select.select([sys.stdin.fileno()], [], [], 0)[0]:
            # Waiting for it could mean waiting for ever: whoever started us may never close the pipe.
            remark = "Nothing has arrived on standard input yet. To wait for it, add the argument -"
        elif (data := sys.stdin.buffer.read()).strip():
            return _one_a_line(data, encoding, "standard input")
    default = resources.files(__package__).joinpath("sentences.txt").read_bytes()
    return _one_a_line(default, "utf-8", "the text that ships with the demo")._replace(remark=remark)


def _read_file(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DemoError(f"cannot read {file}: {error.strerror}") from error


def _one_a_line(data: bytes, encoding: str, origin: str) -> Text:
    try:
        text = data.decode(encoding)
    except LookupError as error:
        raise DemoError(f"--encoding {encoding} is not an encoding that Python knows; try utf-8") from error
    except UnicodeDecodeError as error:
        wrong = f"byte 0x{data[error.start]:02x} at offset {error.start}" if data else "the text"
        raise DemoError(
            f"{origin}: {wrong} is not {encoding}; name the encoding it is in, such as --encoding latin-1"
        ) from error
    lines = (line.strip() for line in text.removeprefix("\ufeff").splitlines())
    sentences = [line for line in lines if line]
    if not sentences:
        raise DemoError(
            f"{origin}: no sentences, only blank lines or nothing at all; give one sentence a line"
        )
    return Text(sentences, origin)


def _stdin_is_piped() -> bool:
    """Whether standard input is a pipe or a file, rather than a terminal or nothing."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # closed, or replaced by an object without a descriptor
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)
