"""How every example of several files starts: with its command, or with what to install for it."""

import importlib
import os
import sys

OURS = {"tilewise", "tilewise_reference", "torch", "triton"}


def start(example: str, extra: str, brought: set[str]) -> None:
    """Run the command of the folder `example`; where a package is missing, say what to install, and exit 1.

    extra: of tilewise, what to install. brought: the modules that come with it; a missing module that is
    neither among them nor one of OURS is a bug of ours.
    """
    # Threads with nothing to do sleep rather than spin. On two cores that others kept busy (a load of 7), one
    # step of train_gpt took 460 ms instead of 2080. Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app = importlib.import_module(
            f"{example}.command"
        ).app  # the folder comes before the file of its name
    except ModuleNotFoundError as missing:
        name = (missing.name or "").partition(".")[0]
        if name not in brought | OURS:
            raise
        sys.exit(f"{example}: {name} is not installed: pip install '.[{extra}]' in the clone of tilewise")
    except KeyboardInterrupt:
        sys.exit(130)
    app()
