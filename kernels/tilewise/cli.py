"""The subcommands of `tilewise`, and what to install where one of their packages is missing."""

import importlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer

# What the extras "demo" and "tools" bring (pyproject.toml). A missing module that is not listed here is a bug
# of ours.
EXTRA_MODULES = {
    "typer": "tools",
    "rich": "tools",
    "matplotlib": "demo",
    "safetensors": "demo",
    "tokenizers": "demo",
    "numpy": "demo",
}


def build_app() -> "typer.Typer":
    """The command line as a typer application.

    Raises:
        ModuleNotFoundError: typer or rich is not installed.
    """
    import typer

    from tilewise.tools.doctor.command import doctor
    from tilewise.tools.explain.command import explain
    from tilewise.tools.inspect.command import inspect
    from tilewise.tools.show.command import OneOrTwo, show
    from tilewise.tools.tune.command import tune

    app = typer.Typer(
        help="Fused attention kernels in Triton.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
    )
    for command in (explain, inspect, tune, doctor):
        app.command()(command)
    app.command(cls=OneOrTwo)(show)
    add_needing_more(app, "demo", "tilewise.demo.command", "Compare sentences with a pretrained encoder")
    add_needing_more(app, "watch", "tilewise.tools.watch.command", "Record a call, and write a page of it")
    return app


def add_needing_more(app: "typer.Typer", name: str, module: str, summary: str) -> None:
    """Add a command that needs the extra "demo", which the tools do not; where that is missing, one that
    says so."""
    try:
        command = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as missing:
        sentence = what_to_install(missing)

        def is_missing() -> None:
            sys.exit(sentence)

        is_missing.__doc__ = f'{summary}; needs the extra "demo".'
        settings = dict(allow_extra_args=True, ignore_unknown_options=True)
        app.command(name, context_settings=settings)(is_missing)
    else:
        app.command()(command)


def what_to_install(missing: ModuleNotFoundError) -> str:
    """The one line for a user who lacks a package of an extra; what no extra brings is raised again."""
    extra = EXTRA_MODULES.get((missing.name or "").partition(".")[0])
    if extra is None:
        raise missing
    return f"tilewise: {missing.name} is not installed: pip install 'tilewise[{extra}]'"


def main() -> None:
    """Run the command line; where an extra is missing, say which in one line and exit with 1."""
    try:
        build_app()(prog_name="tilewise")
    except ModuleNotFoundError as missing:
        sys.exit(what_to_install(missing))
