"""The subcommands of `tilewise`, and what to install where one of their packages is missing."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer

# What the extra "demo" brings (pyproject.toml). A missing module that is not listed here is a bug of ours.
DEMO_MODULES = {"typer", "rich", "matplotlib", "safetensors", "tokenizers", "numpy"}


def build_app() -> "typer.Typer":
    """The command line as a typer application.

    Raises:
        ModuleNotFoundError: a package of the extra "demo" is not installed.
    """
    import typer

    from tilewise.demo.command import demo

    app = typer.Typer(
        help="Fused attention kernels in Triton.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
    )
    app.command()(demo)

    @app.callback()
    def keep_subcommand_names() -> None:
        # typer drops the name of a lone subcommand, unless there is a callback.
        pass

    return app


def main() -> None:
    """Run the command line; where an extra is missing, say which in one line and exit with 1."""
    try:
        build_app()(prog_name="tilewise")
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.partition(".")[0] not in DEMO_MODULES:
            raise
        sys.exit(f"tilewise: {missing.name} is not installed: pip install 'tilewise[demo]'")
