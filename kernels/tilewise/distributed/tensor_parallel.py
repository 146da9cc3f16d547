"""The modules of `tilewise.nn` cut over devices by heads (Megatron-LM, arXiv 1909.08053)."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from ..nn.core import AttentionCore
from ..nn.cross_attention import CrossAttention
from ..nn.projected import ProjectedAttention

Module = TypeVar("Module", bound=ProjectedAttention)


class HeadParallel(ParallelStyle):
    """A style for `parallelize_module`: each device of a mesh of one dimension has some of the heads of a
    `tilewise.nn` module, with the rows of its projections that make them and the columns that read them.

    input_layouts: how the module's inputs come, Replicate() by default; Shard(1) where each rank has a part
        of the length, which is then gathered.
    output_layouts: how its result leaves, Replicate() by default. Without `out_projection` the result is a
        DTensor, Shard(-1) by heads, whatever is given here.
    use_local_output: give the result as each rank's plain tensor, not as a DTensor.

    The projections are split first (`split_projections`), so that parameters are called q.weight, k.weight
    and v.weight. They, sinks and temperatures are DTensors along heads; norms and scales are on every device,
    with the sum of all gradients. Key heads that are fewer than the devices are gathered after the
    projection. Rank 0's values count. Raises ValueError where heads cannot be cut over the mesh.
    """

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__()
        self.input_layouts = Replicate() if input_layouts is None else input_layouts
        self.output_layouts = Replicate() if output_layouts is None else output_layouts
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        check(module, device_mesh)
        assert isinstance(module, ProjectedAttention)
        module.split_projections()
        plan: dict[str, ParallelStyle] = {
            name: ColwiseParallel(use_local_output=False) for name in ("q", "k", "v")
        }
        if module.out is not None:
            plan["out"] = RowwiseParallel(
                output_layouts=self.output_layouts, use_local_output=self.use_local_output
            )
        count = 2 if isinstance(module, CrossAttention) else 1
        plan[""] = PrepareModuleInput(  # once for all three, so that their gradients are added up first
            input_layouts=(self.input_layouts,) * count,
            desired_input_layouts=(Replicate(),) * count,
            input_kwarg_layouts={"values": self.input_layouts},
            desired_input_kwarg_layouts={"values": Replicate()},
        )
        distribute_core(module.core, device_mesh, self.src_data_rank)
        return parallelize_module(module, device_mesh, plan, src_data_rank=self.src_data_rank)


def tensor_parallel(module: Module, mesh: DeviceMesh) -> Module:
    """The module cut over the mesh by heads, in place: as `HeadParallel()` does, which goes into a plan of
    `parallelize_module` for a whole model, beside PyTorch's styles."""
    parallelize_module(module, mesh, HeadParallel())
    return module


def check(module: nn.Module, mesh: DeviceMesh) -> None:
    if not isinstance(module, ProjectedAttention):
        raise ValueError(
            f"module is a {type(module).__name__}, and must be a tilewise.nn.SelfAttention or "
            "CrossAttention; in a model, parallelize_module(model, mesh, {name: HeadParallel()}) names them"
        )
    if mesh.ndim != 1:
        raise ValueError(f"{mesh=} must have one dimension: take one of it, mesh['name']")
    if module.heads % mesh.size():
        raise ValueError(f"heads={module.heads} must be a multiple of the {mesh.size()} devices of the mesh")


def distribute_core(core: AttentionCore, mesh: DeviceMesh, source: int | None) -> None:
    """Make DTensors of what is learned between heads: along heads where there is a number a head."""

    def distributed(x: Tensor, placement: Placement) -> Tensor:
        return distribute_tensor(x, mesh, [placement], src_data_rank=source)

    for part in [each for each in (core.q_norm, core.k_norm) if each is not None]:
        for name, x in list(part.named_parameters()):
            put(part, name, distributed(x, Replicate()))
    held: dict[str, Any] = {"sink": core.sink, "scale": core.scale, "temperature": core.temperature}
    for name, x in held.items():
        if isinstance(x, Tensor):
            put(core, name, distributed(x, Shard(0) if x.dim() else Replicate()))


def put(module: nn.Module, name: str, x: Tensor) -> None:
    """In the place of a parameter, or of a buffer."""
    old = getattr(module, name)
    if isinstance(old, nn.Parameter):
        x = nn.Parameter(x, requires_grad=old.requires_grad)
    setattr(module, name, x)
