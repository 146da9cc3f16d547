"""Without a GPU the benchmarks run once, tiny, in Triton's interpreter: they work, and time nothing."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_report_header() -> str:
    if torch.cuda.is_available():
        return f"benchmarks on {torch.cuda.get_device_name()}, torch {torch.__version__}"
    return "no GPU: benchmarks run tiny, in Triton's interpreter; their times say nothing about speed"
