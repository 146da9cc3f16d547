"""`python -m tilewise.tools.compiled`: compile for one target, in a process of its own."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from ...kernels.room import SHARED_BYTES
from .compiler import compile_only, read


def main() -> None:
    """Compile for one target and print, as JSON lines, each kernel, each error, and each variant done."""
    parser = argparse.ArgumentParser(
        prog="python -m tilewise.tools.compiled", description="Compile without a GPU."
    )
    parser.add_argument("source", help="module:function that returns a list of Variant")
    parser.add_argument("target", choices=SHARED_BYTES)
    parser.add_argument("--arguments", type=json.loads, default={}, help="the function's, as a JSON object")
    parser.add_argument("--assembly", type=Path, help="a folder to write the machine code to")
    parser.add_argument("--messages", action="store_true", help="ask what the assembler says")
    options = parser.parse_args()
    module, function = options.source.split(":")
    with contextlib.redirect_stdout(sys.stderr):  # stdout carries the answers alone
        variants = getattr(importlib.import_module(module), function)(**options.arguments)
    for variant in variants:
        answers: list[dict[str, Any]] = []
        with contextlib.redirect_stdout(sys.stderr):
            try:
                with compile_only(options.target, variant.kernels) as launched:
                    variant.launch()
                if not launched:
                    raise RuntimeError("it launched no kernel")
                for each in launched:
                    compiled = read(variant.name, each, options.target, options.assembly, options.messages)
                    answers.append(dataclasses.asdict(compiled))
            except Exception as error:  # one variant's failure must not hide the others'
                answers = [{"variant": variant.name, "error": f"{type(error).__name__}: {error}"}]
        for answer in [*answers, {"done": variant.name}]:
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
