"""What is run to tune a pass: a case to time, and the same case made small to check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from tilewise_reference import Case
from tilewise_reference.cases import Features

from ...kernels.backward import launch_dkv, launch_dq
from ...kernels.forward import launch_forward
from ...kernels.one_walk import launch_dqkv
from ...kernels.prepare import prepare
from ...kernels.tile import HOPPER_PASSES, Pass, Tile
from ...plan import tiles
from ...plan.bind import bind
from ...plan.checks import check
from ...plan.passes import empty_in_order_of, run_backward, run_forward
from ...plan.request import make_request
from ...plan.rules.hopper import backward_reasons
from ..inputs import case_inputs
from ..poison import poisoned_memory
from .answers import Expected, expect, gradient_tensors, worst_share

Tensor = torch.Tensor
FORWARDS: tuple[Pass, ...] = ("forward", "hopper")
WHOLE_BACKWARDS: tuple[Pass, ...] = ("dqkv", "hopper_backward")
CHECK_LENGTH = 336  # several tiles, and no multiple of one; but of 16, as the lengths that are timed


def small(case: Case, length: int = CHECK_LENGTH) -> Case:
    """The case with a batch of 1 and no more than `length` queries and keys. Heads and dimensions stay, and
    lengths that 16 divides: to the compiler it is the same call, so nothing is compiled twice."""

    def shorter(size: int) -> int:
        return size if size <= length else length if size % 16 == 0 else length - 3

    features = case.features.copy()
    q_len, kv_len = shorter(case.q_len), shorter(case.kv_len)
    if "bias" in features:
        sizes = zip(features["bias"], (1, case.q_heads, q_len, kv_len), strict=True)
        batch, heads, rows, columns = (min(given, most) for given, most in sizes)
        features["bias"] = batch, heads, rows, columns
    if "window" in features:
        left, right = features["window"]
        features["window"] = (
            None if left is None else min(left, length // 3),
            None if right is None else min(right, length // 3),
        )
    return replace(case, batch=1, q_len=q_len, kv_len=kv_len, features=features)


def with_every_feature(case: Case, length: int = CHECK_LENGTH, work: Pass = "forward") -> Case:
    """A small call of the case's dtype and dimensions with what makes a kernel large: the last check of a
    tile, so that no feature asks for more than the chip has with it. Of Hopper's, what it takes."""
    heads = 4
    features: Features = dict(
        causal="bottom_right", window=(length // 2, 0), documents=2, softcap=20.0, alibi=True, sink=True,
        bias=(1, heads, length - 3, length - 3), dropout=0.1, trained=True,
    )  # fmt: skip
    if work in HOPPER_PASSES:
        del features["documents"], features["dropout"]
    return replace(
        small(case, length),
        name="every feature",
        q_heads=heads,
        kv_heads=2,
        q_len=length - 3,
        kv_len=length - 3,
        features=features,
    )


def forward_launcher(work: Pass) -> Callable[..., None]:
    """The launch of the portable forward or of Hopper's, for which Gluon is imported."""
    if work == "forward":
        return launch_forward
    from ...kernels.hopper import launch

    return launch.launch_forward


def backward_launcher(work: Pass) -> Callable[..., None]:
    """The launch of the portable backward in one walk or of Hopper's."""
    if work == "dqkv":
        return launch_dqkv
    from ...kernels.hopper.backward import launch

    return launch.launch_backward


class Workload:
    """One case on a device: any pass with any tile, to be timed or checked.

    Raises ValueError or NotImplementedError where `attention` would.
    """

    def __init__(self, case: Case, device: torch.device, seed: int = 0) -> None:
        self.case, self.device = case, device
        inputs = case_inputs(case, device, seed, gradients=True)
        self.request = make_request(inputs.q, inputs.k, inputs.v, **inputs.arguments, impl="portable")
        check(self.request)
        self.dim = tiles.widest(self.request.shape)
        generator = torch.Generator(device).manual_seed(seed + 1)
        rows = (*inputs.q.shape[:3], inputs.v.shape[3])
        self.do = torch.randn(rows, generator=generator, device=device, dtype=inputs.q.dtype)
        self._forward: tuple[Tensor, Tensor] | None = None
        self._expected: Expected | None = None

    def tile(self, tile: Tile, work: Pass) -> Tile:
        """What a call like this one gets of a row's tile."""
        return tiles.cut_tile(tile, self.request.shape, self.dim, work)

    def forward(self) -> tuple[Tensor, Tensor]:
        """out and the statistics that a backward starts from, once, by the tile in force."""
        if self._forward is None:
            with torch.no_grad():
                out, _, statistics = run_forward(self.request, return_lse=True, for_backward=True)
            assert statistics is not None
            self._forward = out, statistics
        return self._forward

    def launcher(self, work: Pass, tile: Tile) -> Callable[[], None]:
        """A function that runs this pass alone and keeps nothing; those of dkv and of whole backwards include
        what prepares them, for they share tile_q, and those of the latter what clears and finishes dQ."""
        q, k, shape = self.request.q.detach(), self.request.k.detach(), self.request.shape
        tile, call = self.tile(tile, work), bind(self.request)
        if work in FORWARDS:
            launch = forward_launcher(work)
            lse = q.new_empty(shape.scores[:3], dtype=torch.float32)
            filled = empty_in_order_of(q, shape.value_dim), lse, q.new_empty((2, *lse.shape), dtype=lse.dtype)
            return lambda: launch(call, *filled, tile)
        out, statistics = self.forward()
        if work == "dq":
            dkv_tile = tiles.choose_tile(q, shape, "dkv")
            backward = prepare(call, out, statistics, self.do, None, dkv_tile.tile_q)
            dq = empty_in_order_of(q, shape.head_dim)
            return lambda: launch_dq(backward, dq, tile)
        dk, dv = empty_in_order_of(k, shape.head_dim), empty_in_order_of(k, shape.value_dim)
        if work in WHOLE_BACKWARDS:
            launch, dq = backward_launcher(work), empty_in_order_of(q, shape.head_dim)
            return lambda: launch(
                prepare(call, out, statistics, self.do, None, tile.tile_q), dq, dk, dv, tile, True
            )
        return lambda: launch_dkv(prepare(call, out, statistics, self.do, None, tile.tile_q), dk, dv, tile)

    def portable_launcher(self, work: Pass) -> Callable[[], None]:
        """The same of the portable kernels that answer where Hopper's of this pass does not."""
        passes: tuple[Pass, ...] = ("forward",) if work in FORWARDS else ("dkv", "dq")
        q, shape = self.request.q, self.request.shape
        launchers = [self.launcher(each, tiles.choose_tile(q, shape, each)) for each in passes]

        def launch() -> None:
            for each in launchers:
                each()

        return launch

    def answer(self, work: Pass, tile: Tile) -> dict[str, Tensor]:
        """What the pass gives with this tile, by name; memory that it does not write is NaN."""
        # What is learned is summed by the portable kernels, also where the backward is Hopper's.
        others = [work in ("dkv", "dqkv") and x.requires_grad for _, x in self.request.other_tensors]
        needs = [work in ("dq", *WHOLE_BACKWARDS), *[work in ("dkv", *WHOLE_BACKWARDS)] * 2, *others]
        start = None if work in FORWARDS else self.forward()
        request = replace(self.request, impl="hopper") if work in HOPPER_PASSES else self.request
        if work == "hopper_backward":
            for reason in backward_reasons(request):  # the portable kernels would answer
                raise ValueError(reason)
        walks = tiles.use_walks(1 if work == "dqkv" else 2)
        with tiles.use(self.tile(tile, work), (work,)), walks, poisoned_memory(), torch.no_grad():
            if start is None:
                out, lse, _ = run_forward(request, return_lse=True, for_backward=True)
                assert lse is not None
                return {"out": out, "lse": lse}
            grads = run_backward(request, *start, self.do, None, needs)
        learned = [x.requires_grad for _, x in self.request.other_tensors]
        asked = [*needs[:3], *(need for need, has_one in zip(needs[3:], learned, strict=True) if has_one)]
        names = [name for name, need in zip(gradient_tensors(self.request), asked, strict=True) if need]
        return dict(zip(names, grads, strict=True))

    def worst(self, work: Pass, tile: Tile) -> tuple[float, str]:
        """The largest error of the pass with this tile as a share of what is allowed, and of which result."""
        if self._expected is None:
            self._expected = expect(self.request, self.do)
        found = self.answer(work, tile)
        return max((worst_share(name, got, self._expected), name) for name, got in found.items())
