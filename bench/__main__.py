"""`python -m bench`: the commands around the benchmarks, and what to install where a package is missing."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer

# Only what was asked for is imported: a report needs no torch, and evidence no matplotlib.
COMMANDS = {
    "evidence": "bench.evidence",
    "gpu": "bench.gpu",
    "report": "bench.report.commands",
    "compare": "bench.report.commands",
    "readme": "bench.report.commands",
}
EXTRA_MODULES = ("typer", "rich", "matplotlib", "tabulate", "numpy", "pytest", "pytest_benchmark")
FROM_A_CLONE = ("tilewise", "tilewise_reference", "torch", "triton")


def build_app(asked: str | None) -> typer.Typer:
    """The command that was asked for as a typer application; all of them where none was.

    Raises:
        ModuleNotFoundError: a package that the command needs is not installed.
    """
    import typer

    app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)

    @app.callback()
    def bench() -> None:
        """Benchmarks of tilewise beside its rivals; `python -m pytest bench` runs them one by one."""

    for name in [asked] if asked in COMMANDS else COMMANDS:
        app.command(name)(getattr(import_module(COMMANDS[name]), name))
    return app


def what_to_install(missing: ModuleNotFoundError) -> str:
    """The one line for a user who lacks a package; what no extra brings is raised again."""
    package = (missing.name or "").partition(".")[0]
    if package in FROM_A_CLONE:
        how = "pip install -e '.[bench]', or set PYTHONPATH=kernels:reference"
        return f"bench: {package} is not installed: {how}"
    if package not in EXTRA_MODULES:
        raise missing
    return f"bench: {package} is not installed: pip install 'tilewise[bench]'"


def main() -> None:
    """Run the command line; where a package is missing, say which in one line and exit with 1."""
    try:
        build_app(next(iter(sys.argv[1:]), None))(prog_name="python -m bench")
    except ModuleNotFoundError as missing:
        sys.exit(what_to_install(missing))


if __name__ == "__main__":
    main()
