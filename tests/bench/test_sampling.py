"""Are samples taken fairly? With clocks and events that the tests hold in their hands."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from bench import sampling
from bench.ceilings import measure_ceilings
from bench.sampling import EventRecorder, HostRecorder, Within, sample, warm_up

CPU = torch.device("cpu")


@dataclass
class Scripted:
    """A recorder whose calls say how long they take; every call costs its time on the clock."""

    now: float = 0.0
    log: list[str] = field(default_factory=list)

    def start(self, call: Any, typical: float | None) -> float:
        seconds = call()
        self.now += seconds
        return seconds

    def seconds(self, mark: float) -> float:
        return mark

    def clock(self) -> float:
        return self.now

    def call(self, name: str, *times: float) -> Any:
        """A call that takes these times, then the last of them for ever."""
        left = list(times)

        def run() -> float:
            self.log.append(name)
            return left.pop(0) if len(left) > 1 else left[0]

        return run


def test_each_round_asks_everyone_once_in_changing_order():
    recorder = Scripted()
    calls = {name: recorder.call(name, 1.0) for name in "abc"}
    taken = sample(calls, 0.0, CPU, 20, least=20, recorder=recorder, clock=recorder.clock)
    rounds = ["".join(recorder.log[i : i + 3]) for i in range(0, 60, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) >= 4
    assert {name: len(times) for name, times in taken.items()} == {"a": 20, "b": 20, "c": 20}


def test_a_drift_hits_all_alike():
    """The machine becomes slower call by call; two equal calls come out equal."""
    recorder = Scripted()
    drift = [1 + i / 100 for i in range(1000)]
    taken = sample(
        {name: lambda: drift.pop(0) for name in "ab"},
        0.0,
        CPU,
        100,
        least=100,
        recorder=recorder,
        clock=recorder.clock,
    )
    means = {name: sum(times) / len(times) for name, times in taken.items()}
    assert means["a"] == pytest.approx(means["b"], rel=0.01)


def test_the_budget_ends_sampling_but_never_before_the_least():
    recorder = Scripted()
    calls = {"a": recorder.call("a", 1.0), "b": recorder.call("b", 1.0)}
    taken = sample(calls, 40.0, CPU, 200, least=2, recorder=recorder, clock=recorder.clock)
    assert 2 <= len(taken["a"]) < 40 and 40 <= recorder.now <= 42
    recorder = Scripted()
    taken = sample(
        {"a": recorder.call("a", 5.0)}, 1.0, CPU, 200, least=4, recorder=recorder, clock=recorder.clock
    )
    assert len(taken["a"]) == 4


def test_warm_up_lasts_until_batches_agree():
    recorder = Scripted()
    batches = [1.0] * sampling.BATCH + [0.5] * sampling.BATCH + [0.400] * sampling.BATCH + [0.396] * 100
    median = warm_up(recorder.call("a", *batches), 1e9, recorder, recorder.clock)
    assert median == 0.396 and len(recorder.log) == 4 * sampling.BATCH


def test_warm_up_is_bounded_in_calls_and_in_time():
    recorder = Scripted()
    restless = [1.5**i for i in range(200)]
    warm_up(recorder.call("a", *restless), 1e99, recorder, recorder.clock)
    assert len(recorder.log) == sampling.BATCH * sampling.BATCHES
    recorder = Scripted()
    warm_up(recorder.call("a", 1.0), 2.5, recorder, recorder.clock)
    assert len(recorder.log) == 3


def test_warm_up_is_no_sample():
    recorder = Scripted()
    compiled = recorder.call("a", 100.0, 1.0)
    taken = sample({"a": compiled}, 1000.0, CPU, 5, recorder=recorder, clock=recorder.clock)
    assert taken["a"] == [1.0] * 5


def test_one_that_fails_stops_no_other():
    recorder, failures = Scripted(), {}

    def breaks(after: int) -> Any:
        left = [1.0] * after
        return lambda: left.pop()

    calls = {"good": lambda: 1.0, "late": breaks(3), "never": breaks(0)}
    taken = sample(
        calls, 0.0, CPU, 9, least=9, recorder=recorder, clock=recorder.clock, on_failure=failures.__setitem__
    )
    assert {name: len(times) for name, times in taken.items()} == {"good": 9}
    assert {name: type(error) for name, error in failures.items()} == {
        "late": IndexError,
        "never": IndexError,
    }
    with pytest.raises(IndexError):
        sample({"never": breaks(0)}, 0.0, CPU, 1, recorder=recorder, clock=recorder.clock)


# ---- On a GPU


@dataclass
class Gpu:
    """Stands for torch.cuda: a queue that runs as time passes for the host, and logs what is enqueued.

    `late` calls find the GPU ahead of the host.
    """

    log: list[Any] = field(default_factory=list)
    late: int = 0
    elapsed: float = 2e-3

    def Event(self, enable_timing: bool) -> Any:
        assert enable_timing
        gpu = self

        class Event:
            def record(self) -> None:
                gpu.log.append("event")

            def query(self) -> bool:
                gpu.late -= 1
                return gpu.late >= 0

            def elapsed_time(self, other: Any) -> float:
                return gpu.elapsed * 1e3

        return Event()

    def _sleep(self, cycles: int) -> None:
        self.log.append(("sleep", cycles))

    def synchronize(self, device: Any) -> None:
        self.log.append("wait")

    def zero_(self) -> None:
        self.log.append("flush")


def steps(log: list[Any]) -> list[str]:
    return [step if isinstance(step, str) else step[0] for step in log]


def test_every_sample_flushes_and_sleeps_before_its_first_event():
    gpu = Gpu()
    recorder = EventRecorder(CPU, cuda=gpu, buffer=gpu)
    calls = {name: lambda name=name: gpu.log.append(name) for name in ("a", "b")}
    taken = sample(calls, 0.0, CPU, 3, least=3, recorder=recorder)
    one = ["flush", "sleep", "event", "call", "event"]
    said = ["call" if step in calls else step for step in steps(gpu.log) if step != "wait"]
    assert said == one * 6
    assert taken == {"a": [2e-3] * 3, "b": [2e-3] * 3}
    # Nobody waits for the GPU between the calls of a round.
    assert steps(gpu.log)[:10].count("wait") == 0 and "wait" in steps(gpu.log)[10:12]


def test_a_sample_in_which_the_gpu_waited_for_the_host_is_thrown_away():
    gpu, runs = Gpu(late=2), Counter()
    recorder = EventRecorder(CPU, cuda=gpu, buffer=gpu)

    def call() -> None:
        runs["a"] += 1

    mark = recorder.start(call, None)
    sleeps = [step[1] for step in gpu.log if step[0] == "sleep"]
    assert runs["a"] == 3 and len(mark) == 1
    assert sleeps[0] == 0 < sleeps[1] < sleeps[2] <= sampling.MOST_LEAD * sampling.FASTEST_CLOCK
    # One that waits for the GPU itself can never be ahead of it, and is taken as it is.
    gpu.late = 10**6
    assert len(recorder.start(call, None)) == 1
    assert recorder.leads[call] <= sampling.MOST_LEAD


def test_short_calls_are_means_of_several():
    assert EventRecorder.calls_a_sample(None) == 1
    assert EventRecorder.calls_a_sample(1e-3) == 1
    assert EventRecorder.calls_a_sample(5e-6) == 2
    assert EventRecorder.calls_a_sample(1e-7) == sampling.MANY_RESOLUTIONS
    gpu = Gpu(elapsed=5e-6)
    recorder = EventRecorder(CPU, cuda=gpu, buffer=gpu)
    mark = recorder.start(lambda: None, 5e-6)
    assert len(mark) == 2 and gpu.log.count("flush") == 2
    assert recorder.seconds(mark) == pytest.approx(5e-6)


def test_host_samples_enqueue_several_calls_and_then_wait():
    log: list[str] = []
    recorder = HostRecorder(lambda: log.append("wait"))
    assert recorder.start(lambda: log.append("call"), None) >= 0
    assert log == ["call", "wait"]
    log.clear()
    recorder.start(lambda: log.append("call"), 1e-4)
    assert log == ["call"] * 10 + ["wait"]
    log.clear()
    recorder.start(lambda: log.append("call"), 1e-9)
    assert log == ["call"] * recorder.most_calls + ["wait"]


def test_what_must_hold_is_entered_once_a_sample():
    class During:
        def __enter__(self) -> None:
            log.append("in")

        def __exit__(self, *error: Any) -> None:
            log.append("out")

    log: list[str] = []
    HostRecorder().start(Within(lambda: log.append("call"), During), 4e-4)
    assert log == ["in", *["call"] * 3, "out"]


def test_ceilings_are_computed_from_medians():
    class Second:
        def start(self, call: Any, typical: float | None) -> None:
            call()

        def seconds(self, mark: None) -> float:
            return 0.5

    found = measure_ceilings("cpu", 0.0, recorder=Second())
    assert found.copy_bytes_per_second == 2 * (1 << 22) / 0.5
    assert found.matmul_flops_per_second == dict.fromkeys(
        ("bfloat16", "float16", "float32", "float8_e4m3fn"), 2 * 128**3 / 0.5
    )
