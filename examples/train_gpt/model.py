"""The GPT, and what makes its three variants differ: one call.

x = tokens + positions
x = x + attention(norm(x));  x = x + mlp(norm(x))            `layers` times (pre-norm, arXiv 2002.04745)
logits = norm(x) · tokensᵀ                                   the head is the token table (arXiv 1608.05859)

`build_gpt` gives every variant the same weights: they depend on the seed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tilewise import Causal
from tilewise.nn import AttentionCore, SelfAttention

from .settings import Settings

Attend = Callable[..., Tensor]  # q, k, v [batch, heads, length, head_dim], mask= -> the same as q

MakeCore = Callable[..., AttentionCore]  # heads, head_dim, impl= -> what attends between heads


class SdpaCore(AttentionCore):
    """Attention between heads by PyTorch's own function."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        """q, k, v [batch, heads, length, head_dim] -> [batch, heads, length, head_dim]."""
        if not isinstance(options["mask"], Causal):
            raise ValueError(f"mask={options['mask']!r} must be Causal()")
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class ControlCore(SdpaCore):
    """PyTorch's attention with every result moved at random by up to one rounding of its dtype.

    That is as right as PyTorch's own. How far its losses drift away shows how far those of another right
    attention may.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        out = super().forward(q, k, v, **options)
        # A generator of its own: dropout's random numbers stay those of the other variants.
        generator = torch.Generator(out.device).manual_seed(0)
        noise = torch.rand(out.shape, generator=generator, device=out.device)
        rounding = torch.finfo(out.dtype).eps / 2
        return (out * (1 + (2 * noise - 1) * rounding)).to(out.dtype)


CORES: dict[str, type[AttentionCore]] = {
    "tilewise": AttentionCore,
    "sdpa": SdpaCore,
    "control": ControlCore,
}


class Block(nn.Module):
    """x [batch, length, width] -> the same: attention, then an MLP, a norm before each."""

    def __init__(
        self, settings: Settings, core: MakeCore, impl: str | None, dropout: Callable[[float], nn.Module]
    ) -> None:
        super().__init__()
        width, heads = settings.width, settings.heads
        self.attention_norm = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads=heads, out_projection=True)
        self.attention.core = core(heads, self.attention.head_dim, impl=impl)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.dropout = dropout(settings.dropout)

    def forward(self, x: Tensor, attend: Attend | None = None) -> Tensor:
        """attend: what computes attention between heads in place of the core, as one that keeps keys and
        values does."""
        normed = self.attention_norm(x)
        if attend is None:
            attended = self.attention(normed, mask=Causal())
        else:
            heads = attend(*self.attention.project(normed), mask=Causal())
            attended = self.attention.out(heads.transpose(1, 2).flatten(2))
        x = x + self.dropout(attended)
        return x + self.dropout(self.down(F.gelu(self.up(self.mlp_norm(x)))))


class GPT(nn.Module):
    """ids [batch, length] int64, of at most `context` characters -> logits [batch, length, vocabulary]."""

    def __init__(
        self,
        settings: Settings,
        vocabulary: int,
        core: MakeCore,
        impl: str | None,
        dropout: Callable[[float], nn.Module],
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, settings.width)
        self.positions = nn.Embedding(settings.context, settings.width)
        self.dropout = dropout(settings.dropout)
        self.blocks = nn.ModuleList([Block(settings, core, impl, dropout) for _ in range(settings.layers)])
        self.norm = nn.LayerNorm(settings.width)

    def forward(
        self, ids: Tensor, positions: Tensor | None = None, attends: Sequence[Attend] | None = None
    ) -> Tensor:
        """positions: where the characters stand, of ids' shape or [length], if not at 0, 1, ...; attends: one
        a block."""
        at = self.positions.weight[: ids.shape[1]] if positions is None else self.positions(positions)
        x = self.dropout(self.tokens(ids) + at)
        for i, block in enumerate(self.blocks):
            x = block(x, None if attends is None else attends[i])
        return F.linear(self.norm(x), self.tokens.weight)

    def loss(self, ids: Tensor, targets: Tensor, positions: Tensor | None = None) -> Tensor:
        """The mean of -log p(target) in nats, fp32; ids and targets [batch, length], positions as in
        `forward`."""
        return F.cross_entropy(self(ids, positions).float().flatten(0, 1), targets.flatten())


def build_gpt(
    variant: str,
    settings: Settings,
    vocabulary: int,
    impl: str | None = None,
    core: MakeCore | None = None,
    dropout: Callable[[float], nn.Module] = nn.Dropout,
) -> GPT:
    """A GPT with the variant's attention and with weights that depend on settings.seed alone.

    variant: a name in CORES. impl: as in `tilewise.attention`; of no effect on the other variants.
    core, dropout: what makes the variant's modules where they are not the usual ones.
    """
    model = GPT(settings, vocabulary, core or CORES[variant], impl, dropout)
    generator = torch.Generator().manual_seed(settings.seed)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.dim() == 2:
            # What is added to the residual stream starts smaller, so that its sum over all layers does not
            # grow with their number.
            adds = name.endswith(("attention.out.weight", "down.weight"))
            shrink = (2 * settings.layers) ** 0.5 if adds else 1.0
            nn.init.normal_(parameter, std=0.5 * settings.width**-0.5 / shrink, generator=generator)
    return model.to(settings.device)
