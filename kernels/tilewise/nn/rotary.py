"""Rotary position embeddings: queries and keys turned by their positions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..parts.dtensors import is_dtensor
from ..parts.rotary import RotaryTable
from .sharded import locally

STYLES = ("half", "interleaved")


class Rotary(nn.Module):
    """Turns pairs of a head's dimensions by position · frequency, so that q · k depends on how far apart the
    two positions are (RoFormer, arXiv 2104.09864).

        (a, b) -> (a cos φ - b sin φ, a sin φ + b cos φ)        φ = position · frequency of the pair
        frequency of pair i = theta^(-2 i / rotary_dim)

    head_dim: the width of a head's queries and keys.
    theta: the base of the frequencies.
    style: which dimensions are a pair. "half": i and i + rotary_dim / 2, as in GPT-NeoX, Phi, and Hugging
        Face's files of Llama, Mistral, Qwen and Gemma. "interleaved": 2 i and 2 i + 1, as in the paper, in
        GPT-J and in Meta's own files of Llama.
    rotary_dim: turn only the first dimensions of a head, an even number of them (all if None).
    frequencies: [rotary_dim / 2] fp32 or fp64, in place of theta's: as stretched for long contexts (NTK,
        YaRN, Llama 3). A copy is kept as a buffer and saved with the module; it is not trained.

    Raises ValueError where an argument is not one of these. Without `frequencies` the module holds no tensor:
    there is nothing that `half()`, a meta device or a checkpoint could round or lose.
    """

    frequencies: Tensor | None

    def __init__(
        self,
        head_dim: int,
        *,
        theta: float = 10000.0,
        style: str = "half",
        rotary_dim: int | None = None,
        frequencies: Tensor | None = None,
    ) -> None:
        super().__init__()
        rotary_dim = head_dim if rotary_dim is None else rotary_dim
        if not isinstance(head_dim, int) or head_dim < 1:
            raise ValueError(f"{head_dim=} must be an int of at least 1")
        if not isinstance(rotary_dim, int) or rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
            raise ValueError(f"{rotary_dim=} must be an even int from 2 to {head_dim=}")
        if style not in STYLES:
            raise ValueError(f"{style=} must be 'half' or 'interleaved'")
        if not (isinstance(theta, int | float) and 0 < theta < math.inf):
            raise ValueError(f"{theta=} must be a positive number")
        self.head_dim, self.rotary_dim, self.theta, self.style = head_dim, rotary_dim, float(theta), style
        if frequencies is not None:
            _check_frequencies(frequencies, rotary_dim)
            if theta != 10000.0:
                raise ValueError(f"{theta=} has no effect beside frequencies=; give one of the two")
            frequencies = frequencies.detach().clone()
        self.register_buffer("frequencies", frequencies)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """Go to another device, but keep the dtype: in fp16 an angle at position 1000 is off by up to 1/2."""
        kept = self.frequencies
        super()._apply(fn, recurse)
        if kept is not None and self.frequencies is not None and self.frequencies.dtype != kept.dtype:
            self.frequencies = kept.to(self.frequencies.device)
        return self

    def forward(self, q: Tensor, k: Tensor, positions: int | Tensor | None = None) -> tuple[Tensor, Tensor]:
        """q [batch, heads, length, head_dim] and k [batch, kv_heads, length, head_dim] -> both turned, in
        their own dtypes, by way of fp32 (or fp64 if that is theirs).

        positions: of the rows of both, ints [length] or [batch, length]; or an int, the position of the first
            row; from 0 if None. Nested tensors take None alone.
        Raises ValueError where an input does not fit the module or another input.
        """
        self._check_inputs(q, k)
        if q.is_nested:
            return self._turn_nested(q, k, positions)
        angles = self._angles(_as_positions(positions, q)).unsqueeze(-2)  # the same for all heads
        angles = angles.to(torch.promote_types(q.dtype, torch.float32))
        cos, sin = angles.cos(), angles.sin()
        if is_dtensor(q) and is_dtensor(k):
            return locally(self._turn, q, cos, sin), locally(self._turn, k, cos, sin)
        return self._turn(q, cos, sin), self._turn(k, cos, sin)

    def table(
        self,
        positions: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> RotaryTable:
        """cos and sin of the positions 0 to positions - 1, as `cached_attention` takes them for `rotary`; in
        dtype torch.float64 where its q is."""
        if device is None and self.frequencies is not None:
            device = self.frequencies.device
        angles = self._angles(torch.arange(positions, device=device))
        return RotaryTable(angles.cos().to(dtype), angles.sin().to(dtype), self.style == "interleaved")

    def _angles(self, positions: Tensor) -> Tensor:
        """positions [...] -> angles [..., rotary_dim / 2] in fp64, within one turn.

        fp32 cannot tell angles near 10⁶ apart that differ by less than 1/16, but has room for what is left of
        them after whole turns.
        """
        if self.frequencies is None:
            exponents = torch.arange(0, self.rotary_dim, 2, dtype=torch.float64, device=positions.device)
            frequencies = self.theta ** (exponents / -self.rotary_dim)
        else:
            frequencies = self.frequencies.double()
        return torch.remainder(positions.unsqueeze(-1) * frequencies, 2 * math.pi)

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [batch, heads, length, head_dim]; cos and sin [(batch,) length, 1, rotary_dim / 2]."""
        x = x.transpose(1, 2)  # in memory, heads are within a row, and stay there
        turned, rest = x[..., : self.rotary_dim], x[..., self.rotary_dim :]
        pairs = self.rotary_dim // 2
        sizes, axis = ((2, pairs), -2) if self.style == "half" else ((pairs, 2), -1)
        a, b = turned.to(cos.dtype).unflatten(-1, sizes).unbind(axis)
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), axis).flatten(-2).to(x.dtype)
        return (turned if rest.shape[-1] == 0 else torch.cat((turned, rest), -1)).transpose(1, 2)

    def _turn_nested(self, q: Any, k: Any, positions: int | Tensor | None) -> tuple[Tensor, Tensor]:
        """Rows are numbered through all sequences: within each, that moves every position by the same."""
        if positions is not None:
            raise NotImplementedError("positions= with nested tensors is not built: give None, for 0, 1, ...")

        def jagged(rows: Tensor, like: Any) -> Tensor:
            rows = rows.squeeze(0).transpose(0, 1)
            return torch.nested.nested_tensor_from_jagged(rows, like.offsets()).transpose(1, 2)

        turned_q, turned_k = self.forward(q.values().unsqueeze(0), k.values().unsqueeze(0))
        return jagged(turned_q, q), jagged(turned_k, k)

    def _check_inputs(self, q: Tensor, k: Tensor) -> None:
        for name, x in (("q", q), ("k", k)):
            if x.dim() != 4 or x.shape[3] != self.head_dim:
                raise ValueError(
                    f"{name}.shape={tuple(x.shape)} must be [batch, heads, length, {self.head_dim}], as "
                    f"rotary.head_dim={self.head_dim} says"
                )
        if q.shape[2] != k.shape[2]:
            raise ValueError(
                f"q.shape={tuple(q.shape)} and k.shape={tuple(k.shape)} must have one length: rotary turns "
                "queries and keys of the same positions; keys from before come from a cache"
            )
        if self.frequencies is not None and self.frequencies.device != q.device:
            raise ValueError(
                f"rotary.frequencies.device={self.frequencies.device} must be that of the queries, "
                f"{q.device}; use .to(device)"
            )

    def extra_repr(self) -> str:
        base = f"theta={self.theta:g}" if self.frequencies is None else "frequencies=given"
        partial = "" if self.rotary_dim == self.head_dim else f", rotary_dim={self.rotary_dim}"
        return f"{self.head_dim}, {base}, style={self.style!r}{partial}"


def _as_positions(positions: int | Tensor | None, x: Tensor) -> Tensor:
    """Positions of x [batch, heads, length, head_dim], as ints [length] or [batch, length]."""
    batch, _, length, _ = x.shape
    if isinstance(positions, Tensor):
        if positions.is_floating_point() or positions.is_complex() or positions.dtype == torch.bool:
            raise ValueError(f"positions.dtype={positions.dtype} must be an integer type")
        if positions.shape not in ((length,), (1, length), (batch, length)):
            raise ValueError(
                f"positions.shape={tuple(positions.shape)} must be [length] = [{length}] or "
                f"[batch, length] = [{batch}, {length}]"
            )
        if positions.device != x.device:
            raise ValueError(
                f"positions.device={positions.device} must be that of the queries, {x.device}; "
                "use .to(device)"
            )
        return positions
    if positions is not None and (
        isinstance(positions, bool) or not isinstance(positions, int | torch.SymInt)
    ):
        raise ValueError(f"{positions=} must be None, an int or a tensor of ints")
    return torch.arange(length, device=x.device) + (positions or 0)


def _check_frequencies(frequencies: Tensor, rotary_dim: int) -> None:
    if not isinstance(frequencies, Tensor) or frequencies.dtype not in (torch.float32, torch.float64):
        given = frequencies.dtype if isinstance(frequencies, Tensor) else type(frequencies).__name__
        raise ValueError(f"frequencies are {given}, and must be a tensor of torch.float32 or torch.float64")
    if frequencies.shape != (rotary_dim // 2,):
        raise ValueError(
            f"frequencies.shape={tuple(frequencies.shape)} must be [rotary_dim / 2] = [{rotary_dim // 2}]"
        )
    if frequencies.requires_grad:
        raise ValueError("frequencies.requires_grad=True must be False: they are not trained; give .detach()")
