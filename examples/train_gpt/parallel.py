"""A model of which each rank has a part: of the parameters, of the batch, and of every text.

The parameters are cut over all ranks by PyTorch's `fully_shard` (FSDP2), layer by layer: a rank gathers the
whole of a layer when its turn comes, and forgets it. Each rank then computes on its own characters alone.
Only attention needs those of other ranks: `context_parallel_attention` fetches them. The gradients are
averaged over all ranks: each rank's loss is a mean over as many characters as any other's, so the mean of
the ranks' gradients is the gradient of the whole batch's loss.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from tilewise.distributed import context_parallel_attention, positions, split
from tilewise.nn import AttentionCore

from .model import GPT, build_gpt
from .parts import make_folder, save_parts
from .ranks import SeveralRanks
from .settings import Settings
from .training import Run


class ContextParallelCore(AttentionCore):
    """Attention between heads, of texts whose rows are on several ranks."""

    def __init__(self, heads: int, head_dim: int, *, mesh: DeviceMesh, impl: str | None) -> None:
        super().__init__(heads, head_dim, impl=impl)
        self.mesh = mesh

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        """q, k, v [batch, heads, rows, head_dim], this rank's rows -> the same. The mask is of the whole."""
        return context_parallel_attention(q, k, v, mesh=self.mesh, mask=options["mask"], impl=self.impl)


class DropoutOfAPart(nn.Dropout):
    """Drops what `nn.Dropout` would in one process: the random numbers of the whole batch are drawn on every
    rank, and each keeps those of its part.

    So the losses can be compared. A large model would save the drawing, and give every rank its own seed.
    """

    def __init__(self, p: float, ranks: SeveralRanks, mesh: DeviceMesh) -> None:
        super().__init__(p)
        self.ranks, self.mesh = ranks, mesh

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, rows, width] of this rank -> the same."""
        if not self.training or not self.p:
            return x
        batch, rows, width = x.shape
        ones = x.new_ones(batch * self.ranks.shard, rows * self.ranks.context, width)
        kept = self.ranks.own_texts(F.dropout(ones, self.p))
        return x * split(kept, self.mesh, dim=1)


class PartOfARun(Run):
    """What one rank does of a run that all ranks do together."""

    def __init__(self, settings: Settings, vocabulary: int, impl: str | None, ranks: SeveralRanks) -> None:
        self.vocabulary, self.impl = vocabulary, impl
        self.line, self.grid = ranks.meshes(settings.device)
        self.texts = self.grid["context"]
        super().__init__("tilewise", settings, vocabulary, impl, ranks)
        self.positions = positions(settings.context, self.texts, device=settings.device)

    def build(self, variant: str, vocabulary: int, impl: str | None) -> GPT:
        core = partial(ContextParallelCore, mesh=self.texts)
        dropout = partial(DropoutOfAPart, ranks=self.ranks, mesh=self.texts)
        model = build_gpt(variant, self.settings, vocabulary, impl, core, dropout)
        for block in model.blocks:
            fully_shard(block, mesh=self.line)
        return fully_shard(model, mesh=self.line)

    def own(self, batch: Tensor) -> Tensor:
        return split(self.ranks.own_texts(batch), self.texts, dim=1)

    def tensors(self, out: Path) -> dict[str, Any]:
        made = self.ranks.together(lambda: make_folder(out) if self.ranks.first else None)
        folder = out / self.ranks.told_by_the_first(made)
        save_parts(folder, self.model, self.optimizer)
        return {"parts": folder.name}

    def load_whole(self, state: dict[str, Any]) -> None:
        # Of the optimizer, one process saves what it knows of weight 0, 1, ...; DCP goes by their names.
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        numbered = [names[each] for group in self.optimizer.param_groups for each in group["params"]]
        known, groups = state["optimizer"]["state"], state["optimizer"]["param_groups"]
        renamed = {
            "state": {numbered[number]: known[number] for number in known},
            "param_groups": [g | {"params": [numbered[number] for number in g["params"]]} for g in groups],
        }
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self.model, state["model"], options=options)
        set_optimizer_state_dict(self.model, self.optimizer, renamed, options=options)

    def whole(self) -> GPT | None:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(self.model, options=options)
        if not self.ranks.first:
            return None
        model = build_gpt("tilewise", self.settings, self.vocabulary, self.impl)
        model.load_state_dict(weights)
        return model
