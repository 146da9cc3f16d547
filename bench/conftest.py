"""Without a GPU the benchmarks run once, tiny, in Triton's interpreter: they work, and time nothing."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

# Triton decides how `@triton.jit` runs when it is imported, which the plugin does.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton.language as tl
from triton.runtime import interpreter

from bench.plugin import (
    pytest_addoption,
    pytest_benchmark_compare_machine_info,
    pytest_benchmark_update_json,
    pytest_configure,
    pytest_generate_tests,
    pytest_report_header,
    timed,
)

__all__ = [
    "pytest_addoption",
    "pytest_benchmark_compare_machine_info",
    "pytest_benchmark_update_json",
    "pytest_configure",
    "pytest_generate_tests",
    "pytest_report_header",
    "timed",
]


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter() -> Iterator[None]:
    """As for the tests: the interpreter replaces Triton's functions once, not at each call."""
    replace = interpreter._patch_lang

    def replace_once(fn: Any) -> Any:
        languages = [module for module in fn.__globals__.values() if module is tl or module is tl.core]
        return replace(fn) if any(tl.core.is_builtin(language.load) for language in languages) else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", replace_once)
        yield
