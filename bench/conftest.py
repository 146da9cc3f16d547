"""Without a GPU the benchmarks run once, tiny, in Triton's interpreter: they work, and time nothing."""

import os
from collections.abc import Iterator

import pytest
import torch

# Triton decides how `@triton.jit` runs when it is imported, which the plugin does.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from bench.plugin import (
    pytest_addoption,
    pytest_benchmark_compare_machine_info,
    pytest_benchmark_update_json,
    pytest_configure,
    pytest_generate_tests,
    pytest_report_header,
    timed,
)
from harness.quick import quick_interpreter

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
def quick() -> Iterator[None]:
    """As for the tests."""
    with quick_interpreter():
        yield
