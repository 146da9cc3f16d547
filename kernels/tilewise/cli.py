"""The subcommands of `tilewise`, and what to install where one of their packages is missing."""

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
    try:
        from tilewise.demo.command import demo
    except ModuleNotFoundError as missing:  # the tools need less than the demo does
        sentence = what_to_install(missing)

        @app.command("demo", context_settings=dict(allow_extra_args=True, ignore_unknown_options=True))
        def demo_is_missing() -> None:
            """Compare sentences with a pretrained encoder; needs the extra "demo"."""
            sys.exit(sentence)
    else:
        app.command()(demo)
    return app


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
