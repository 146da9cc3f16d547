"""Number formats, as a command line names them."""

from __future__ import annotations

from enum import Enum

import torch


class Dtype(str, Enum):
    """What q, k and v are computed in."""

    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


TORCH_DTYPES = {Dtype.fp32: torch.float32, Dtype.fp16: torch.float16, Dtype.bf16: torch.bfloat16}
