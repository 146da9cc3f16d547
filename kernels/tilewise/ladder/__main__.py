"""`python -m tilewise.ladder`: the exercises of examples/ladder/, and whether yours is right."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def interpret() -> None:
    """Start this command again with TRITON_INTERPRET=1, unless it is set already: exercises are checked and
    counted on the CPU, and Triton reads the variable when it is imported, which has happened."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def main(words: list[str] | None = None) -> int:
    """Run the command line; 0 where an exercise is right, 1 where it is not."""
    try:
        from .exercises import EXERCISES, NotFound, check, file_of, load
    except ModuleNotFoundError as missing:
        if missing.name != "numpy":
            raise
        sys.exit("ladder: numpy is not installed, and Triton's interpreter needs it: pip install numpy")

    parser = argparse.ArgumentParser(prog="python -m tilewise.ladder", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the exercises")
    checked = commands.add_parser("check", help="check the exercise of a rung")
    checked.add_argument("number", type=int, choices=EXERCISES, help="of the rung")
    checked.add_argument("file", type=Path, nargs="?", help="that holds exercise() [default: the rung's own]")
    options = parser.parse_args(words)
    if options.command == "list":
        for each in EXERCISES.values():
            print(f"{each.number}  {each.rung + '.py':24}{each.asks}")
        return 0
    try:
        is_right, said = check(options.number, load(options.file or file_of(options.number)))
    except NotFound as missing:
        print(f"ladder: {missing}", file=sys.stderr)
        return 1
    print(said)
    return 0 if is_right else 1


if __name__ == "__main__":
    interpret()
    sys.exit(main())
