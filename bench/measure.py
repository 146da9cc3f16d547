"""What does every implementation make of one case? Its answer is checked, its memory and time taken: a Row.

    measure(case, work, implementations, group=..., seconds=..., device=...) -> [Row, ...]

Nothing is left out: who cannot run says why, in the row's status and reason. One that fails stops no other.
Times of all that are right and running are taken in turns, by `sampling.sample`.
"""

from __future__ import annotations

import atexit
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.autograd import forward_ad

from tilewise.tools.inputs import Inputs, case_inputs
from tilewise.tools.words import in_a_line
from tilewise_reference.cases import Case

from .answers import gradient_of_out, judge_backward, judge_forward
from .answers_again import directions, judge_double_backward, judge_tangent, with_tangents
from .answers_fp8 import judge_fp8, judge_quantized
from .answers_known import judge_statistics
from .cold import sample_cold_start
from .implementations import Implementation, Prepared, UnsupportedError
from .implementations.base import STATISTICS, is_backward
from .implementations.fp8 import Quantize
from .results import Row, Work
from .sampling import Call, Recorder, Within, recorder_for, sample

atexit.register(gc.unfreeze)  # what `settle` sets aside is collected at the end after all
SIZES = ("batch", "q_heads", "kv_heads", "q_len", "kv_len", "head_dim", "value_dim")


def measure(
    case: Case,
    work: Work,
    implementations: Sequence[Implementation],
    *,
    group: str,
    seconds: float,
    device: torch.device | str,
    seed: int = 0,
    rounds: int = 200,
    least: int = 3,
    recorder: Recorder | None = None,
) -> list[Row]:
    """A row for each implementation, in their order.

    seconds: for the samples of all of them together, their warm-up included; checks come on top. rounds,
    least: samples of each, at most and at least. work:

    "forward"                    without gradients
    "backward"                   alone, over a graph that is made once
    "double backward"            likewise: the gradients' derivative along random q, k and v
    "forward mode"               out with its tangent, along random q, k and v
    "max logit", "statistics"    out with the largest score of each row; with its entropy and the mass of keys
                                 too
    "fp8"                        out, of numbers of 8 bits by those who have them
    "quantize"                   making such numbers of q, k and v
    "host forward", "host forward and backward"
                                 what the call costs the host; gradients where the case's phase is "training"
    "cold start"                 the first call of a new process whose caches are empty
    """
    device = torch.device(device)
    rows = {each.name: blank(case, work, group, each) for each in implementations}
    torch._dynamo.reset()  # what earlier cases compiled counts against a limit
    settle()
    running: dict[str, Implementation] = {}
    for each in implementations:
        row = rows[each.name]
        reason = each.unavailable(device)
        if reason is not None:
            row.status, row.reason = "unavailable", reason
            continue
        reason = guarded(row, partial(each.refuses, case, work))
        if reason is not None:
            row.status, row.reason = "unsupported", reason
        elif row.status == "ok":
            running[each.name] = each
    if work == "cold start":
        for name, each in running.items():
            share = seconds / len(running)
            guarded(rows[name], partial(sample_cold_start, each, case, rows[name], device, share, least))
    else:
        with one_thread() if work.startswith("host") else nullcontext():
            _measure_running(case, work, running, rows, seconds, device, seed, rounds, least, recorder)
        _free(device)
    return list(rows.values())


def blank(case: Case, work: Work, group: str, implementation: Implementation) -> Row:
    """The row of a comparison, before anything is known."""
    has_no_flops = work.startswith("host") or work in ("cold start", "quantize")
    matmuls = "forward" if work in STATISTICS or work == "fp8" else work
    return Row(
        group=group,
        case=case.name,
        work=work,
        implementation=implementation.name,
        status="ok",
        flops=0 if has_no_flops else case.flops(matmuls),  # type: ignore[arg-type]
        bytes=case.bytes() if work == "forward" else 0,
        dtype=implementation.dtype or case.dtype,
        sizes={name: getattr(case, name) for name in SIZES}
        | ({} if case.lengths is None else {"tokens": case.tokens}),
    )


def guarded(row: Row, step: Callable[[], Any]) -> Any:
    """What `step` returns; where it raises, the row says so, and None comes back."""
    try:
        return step()
    except UnsupportedError as error:
        row.status, row.reason = "unsupported", str(error)
    except torch.OutOfMemoryError as error:
        row.status, row.reason = "failed", f"out of memory: {in_a_line(error)}"
    except Exception as error:  # whatever a rival's library raises is its result here
        row.status, row.reason = "failed", in_a_line(error)
    return None


def fail(row: Row, error: Exception) -> None:
    def again() -> None:
        raise error

    guarded(row, again)


def _measure_running(
    case: Case,
    work: Work,
    running: dict[str, Implementation],
    rows: dict[str, Row],
    seconds: float,
    device: torch.device,
    seed: int,
    rounds: int,
    least: int,
    recorder: Recorder | None,
) -> None:
    """Check, then time, those that can run; fill their rows in."""
    records = is_backward(work) or (work.startswith("host") and case.phase == "training")
    calls: dict[str, Call] = {}
    moving = forward_ad.dual_level() if work == "forward mode" else nullcontext()
    with torch.set_grad_enabled(records), moving:
        try:
            inputs = case_inputs(case, device, seed, gradients=records)
            if work == "forward mode":
                inputs = with_tangents(inputs, seed)
        except Exception as error:  # too large for this GPU, most likely
            for name in running:
                fail(rows[name], error)
            return
        for name, each in running.items():
            call = guarded(rows[name], partial(ready, each, case, inputs, work, rows[name], seed))
            if call is not None:
                calls[name] = call
            _free(device)
        taken = sample(
            calls,
            seconds,
            device,
            rounds,
            least=least,
            seed=seed,
            recorder=recorder or recorder_for(device, host=work.startswith("host")),
            on_failure=lambda name, error: fail(rows[name], error),
        )
    for name, times in taken.items():
        rows[name].seconds = times


def ready(
    implementation: Implementation, case: Case, inputs: Inputs, work: Work, row: Row, seed: int
) -> Call | None:
    """What is timed, after its answer was judged and its memory taken; None where the answer is wrong."""
    prepared = implementation.prepare(case, inputs, work)
    if work == "forward mode":
        judgement = judge_tangent(implementation, case, inputs, prepared, seed)
    elif work == "double backward":
        judgement = judge_double_backward(implementation, case, inputs, prepared, seed)
    elif work in STATISTICS:
        judgement = judge_statistics(implementation, case, inputs, prepared, work, seed)
    elif work == "fp8":
        judgement = judge_fp8(implementation, case, inputs, prepared, work)
    elif isinstance(implementation, Quantize):
        judgement = judge_quantized(implementation, inputs, prepared)
    elif is_backward(work):
        judgement = judge_backward(implementation, case, inputs, prepared, work, seed)
    else:
        judgement = judge_forward(implementation, case, inputs, prepared, work)
    row.error, row.torch_error, row.allowed_error = judgement[:3]
    if judgement.wrong:
        row.status, row.reason = "wrong", judgement.wrong
        return None
    call = timed_call(prepared, case, inputs, work, seed)
    if implementation.name != "jax cudnn":  # whose memory PyTorch does not know of
        peak = peak_bytes(call, inputs.q.device)
        row.peak_bytes = None if peak is None else peak + prepared.extra_bytes
    if prepared.during is not nullcontext:
        call = Within(call, prepared.during)
    return call


def timed_call(prepared: Prepared, case: Case, inputs: Inputs, work: Work, seed: int) -> Call:
    """The forward; or the backward alone, over a graph that is there; or both."""
    if not is_backward(work):
        return prepared.call
    do = gradient_of_out(case, inputs, seed)
    if work == "backward":
        return prepared.backward(do)
    if work == "double backward":
        return prepared.double_backward(do, directions(inputs, seed))
    do, leaves = prepared.native(do), list(prepared.leaves.values())
    return lambda: torch.autograd.grad(prepared.call(), leaves, do)


@contextmanager
def one_thread() -> Iterator[None]:
    """On the CPU, threads that wait for work would be what is measured."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def peak_bytes(call: Call, device: torch.device, cuda: Any = torch.cuda) -> int | None:
    """The most memory in use during one call beyond that in use before it; None where nothing counts it."""
    if device.type != "cuda":
        return None
    cuda.synchronize(device)
    cuda.reset_peak_memory_stats(device)
    before = cuda.memory_allocated(device)
    result = call()
    cuda.synchronize(device)
    peak = cuda.max_memory_allocated(device) - before
    del result
    return int(peak)


def settle() -> None:
    """Let the collections of `_free` look only at what a comparison makes. A process with PyTorch and its
    compiler has some 350,000 objects that stay: looking at all took 0.85 s, once for each implementation."""
    gc.collect()
    gc.freeze()


def _free(device: torch.device) -> None:
    """Memory of what is over goes back, so that the next one has it."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
