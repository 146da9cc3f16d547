"""What a call costs the host: everything above the kernels, which are replaced by nothing, and with Triton's
launch, in eager mode and compiled, beside PyTorch's own attention.

    python -m pytest bench/test_host.py --benchmark-columns=median,iqr

Short sequences and decoding are bound by this time, not by the GPU. The tensors are so small that PyTorch's
attention does next to no arithmetic either; on a GPU it launches its kernels, and nobody waits for them. Only
without a GPU do the rows with a launch mean nothing: they interpret the kernels.
"""

from .results import Row

GROUPS = ("host",)


def test_host(timed: Row) -> None:
    assert timed.status == "ok", timed.reason
