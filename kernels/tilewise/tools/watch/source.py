"""A file of the package as tokens, for the page to colour."""

from __future__ import annotations

from pygments.lexers.python import PythonLexer
from pygments.token import Comment, Keyword, Name, Number, String, _TokenType

from .tracer import source_of

CLASSES: tuple[tuple[_TokenType, str], ...] = (
    (Comment, "c"),
    (Keyword, "k"),
    (Number, "n"),
    (String, "s"),
    (Name.Decorator, "d"),
    (Name.Function, "f"),
)


def tokens(file: str) -> list[list[tuple[str, str]]]:
    """The lines of a file, each a list of (class, text)."""
    lines: list[list[tuple[str, str]]] = [[]]
    for kind, piece in PythonLexer(stripnl=False).get_tokens(source_of(file)):
        name = next((name for of, name in CLASSES if kind in of), "")
        for number, part in enumerate(piece.split("\n")):
            if number:
                lines.append([])
            if part and lines[-1] and lines[-1][-1][0] == name:
                lines[-1][-1] = (name, lines[-1][-1][1] + part)
            elif part:
                lines[-1].append((name, part))
    return lines[:-1]
