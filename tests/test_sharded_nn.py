"""The modules of tilewise.nn on several ranks, cut by heads and by FSDP, train as on one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import tilewise
from harness.ranks import errors, run
from tilewise.nn import CrossAttention, KVCache, Rotary, SelfAttention

Tensor = torch.Tensor
WIDTH, CONTEXT = 16, 12


def self_attention(**options: Any) -> SelfAttention:
    torch.manual_seed(0)
    module = SelfAttention(WIDTH, heads=4, head_dim=8, out_projection=True, **options)
    with torch.no_grad():  # as after some training: nothing is 0 or 1
        for each in module.core.parameters():
            each.add_(torch.randn_like(each) / 4)
    return module


def cosine(**options: Any) -> CrossAttention:
    torch.manual_seed(0)
    temperature = tilewise.Cosine(nn.Parameter(1 + torch.rand(4)))
    return CrossAttention(
        WIDTH, context_dim=CONTEXT, values_dim=8, heads=4, head_dim=8, out_projection=True,
        similarity=temperature, scale=nn.Parameter(torch.tensor(0.8)), **options,
    )  # fmt: skip


MODULES: dict[str, Callable[[], Any]] = {
    "plain": lambda: self_attention(kv_heads=2),
    "one key head": lambda: self_attention(kv_heads=1, bias=False),
    "all learned parts": lambda: self_attention(kv_heads=2, qk_norm="rms", rotary=Rotary(8), sink=True),
    "cross": lambda: cosine(kv_heads=1, qk_norm="layer"),
}


def inputs(module: nn.Module, batch: int = 2) -> tuple[list[Tensor], dict[str, Any]]:
    make = torch.Generator().manual_seed(2)
    x = torch.randn(batch, 6, WIDTH, generator=make)
    if isinstance(module, SelfAttention):
        score = tilewise.ALiBi(torch.rand(4, generator=make))
        positions = (
            {"positions": torch.tensor([[0], [3]])[:batch] + torch.arange(6)} if module.core.rotary else {}
        )
        return [x], {"mask": tilewise.Causal(), "score": score, **positions}
    context = torch.randn(batch, 5, CONTEXT, generator=make)
    return [x, context], {"values": torch.randn(batch, 5, 8, generator=make)}


def whole(x: Any) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def trained(module: nn.Module) -> dict[str, Tensor]:
    """The result and the losses of two steps of Adam, the gradients of the first, and all weights after both;
    and of the first input, which a model in front would be given."""
    found: dict[str, Tensor] = {}
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2, eps=1e-3)
    for step in range(2):
        (x, *rest), options = inputs(module)
        x.requires_grad_()
        out = whole(module(x, *rest, **options))
        loss = (out - 1).square().sum()
        loss.backward()
        if step == 0:
            found |= {"out": out.detach() + 0, "dx": x.grad}
            found |= {f"d{name}": whole(each.grad) + 0 for name, each in module.named_parameters()}
        found[f"loss {step}"] = loss.detach()
        optimizer.step()
        optimizer.zero_grad()
    return found | {name: whole(each) for name, each in module.state_dict().items()}


def agree(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Sums over ranks come in another order: some roundings of the largest element, through Adam."""
    assert found.keys() == wanted.keys()
    for name, each in wanted.items():
        off, limit = (
            (found[name] - each).abs().max().item(),
            256 * 2.0**-23 * max(1.0, each.abs().max().item()),
        )
        assert found[name].shape == each.shape and off <= limit, f"{name} is off by {off}"


# ---- By heads


def with_the_style(mesh: DeviceMesh, name: str) -> tuple[dict[str, Tensor], list[int]]:
    module = tilewise_distributed().tensor_parallel(MODULES[name](), mesh)
    held = [each.to_local().numel() for each in module.parameters()]
    return trained(module), held


def tilewise_distributed() -> Any:
    import tilewise.distributed

    return tilewise.distributed


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", MODULES)
def test_a_module_that_is_cut_by_heads_trains_as_on_one_device(name, ranks):
    module = MODULES[name]().split_projections()
    wanted = trained(copy.deepcopy(module))
    sizes = {n: each.numel() for n, each in module.named_parameters()}
    for found, held in run((ranks,), with_the_style, name):
        agree(found, wanted)
        assert sum(held) < sum(sizes.values()), "each rank holds a part"
        big = [
            n
            for n in sizes
            if (n.endswith("weight") and "norm" not in n) or n.endswith(("sink", "temperature"))
        ]
        kept = dict(zip(sizes, held, strict=True))
        assert all(kept[n] * ranks == sizes[n] for n in big)


def with_pytorchs_styles(mesh: DeviceMesh, name: str, use_local_output: bool) -> dict[str, Tensor]:
    cut = ColwiseParallel(use_local_output=use_local_output)
    plan = {"q": cut, "k": cut, "v": cut, "out": RowwiseParallel()}
    return trained(parallelize_module(MODULES[name]().split_projections(), mesh, plan))


@pytest.mark.parametrize("name, local", [("plain", True), ("plain", False), ("one key head", True)])
def test_pytorchs_own_styles_do_where_nothing_is_learned_between_heads(name, local):
    wanted = trained(MODULES[name]().split_projections())
    for found in run((2,), with_pytorchs_styles, name, local):
        agree(found, wanted)


def with_parts_of_the_length(mesh: DeviceMesh) -> tuple[Any, ...]:
    """The module of a model whose rows lie on several ranks, as beside `SequenceParallel` norms."""
    style = tilewise_distributed().HeadParallel(input_layouts=Shard(1), output_layouts=Shard(1))
    module = parallelize_module(MODULES["plain"](), mesh, style)
    (x,), options = inputs(module)
    rows = x.chunk(2, dim=1)[mesh.get_local_rank()].requires_grad_()
    out = module(rows, **options)
    out.square().sum().backward()
    return out, rows.grad, *[whole(each.grad) for each in module.parameters()]


def test_rows_may_come_and_leave_in_parts():
    module = MODULES["plain"]().split_projections()
    (x,), options = inputs(module)
    out = module(x.requires_grad_(), **options)
    out.square().sum().backward()
    (a, da, *grads), (b, db, *_) = run((2,), with_parts_of_the_length)
    wanted = [out, x.grad, *[each.grad for each in module.parameters()]]
    found = [torch.cat((a, b), 1), torch.cat((da, db), 1), *grads]
    agree(dict(enumerate(found)), dict(enumerate(wanted)))  # type: ignore[arg-type]


def test_projections_split_and_fuse_without_a_change():
    for name, make in MODULES.items():
        module = make()
        before, ((x, *rest), options) = copy.deepcopy(module.state_dict()), inputs(module)
        module.out.bias is None or module.out.bias.requires_grad_(False)
        out = module(x, *rest, **options)
        split = module.split_projections()
        assert split is module and module.fused == ("q", "k", "v")
        torch.testing.assert_close(module(x, *rest, **options), out, rtol=0, atol=2e-6)
        assert len({each.untyped_storage().data_ptr() for each in module.parameters()}) == len(
            list(module.parameters())
        ), "no two share memory"
        after = module.fuse_projections().state_dict()
        assert before.keys() == after.keys(), name
        assert all(torch.equal(before[key], after[key]) for key in before)


def test_frozen_projections_stay_frozen():
    module = MODULES["plain"]()
    module.qkv.weight.requires_grad_(False)
    module.split_projections()
    assert not module.k.weight.requires_grad and module.k.bias.requires_grad
    module.q.weight.requires_grad_(False)
    assert not module.fuse_projections().qkv.weight.requires_grad


def turned_on_ranks(mesh: DeviceMesh) -> tuple[Tensor, Tensor]:
    x, positions = rotary_inputs()
    turned = Rotary(8)(*(distribute_tensor(each, mesh, [Shard(0)]) for each in x), positions)
    return whole(turned[0]), whole(turned[1])


def rotary_inputs() -> tuple[tuple[Tensor, Tensor], Tensor]:
    make = torch.Generator().manual_seed(4)
    q, k = (torch.randn(4, heads, 5, 8, generator=make) for heads in (4, 2))
    return (q, k), torch.tensor([[0], [3], [40], [7]]) + torch.arange(5)


def test_rotary_turns_the_sequences_that_a_rank_has():
    (q, k), positions = rotary_inputs()
    wanted = Rotary(8)(q, k, positions)
    for found in run((2,), turned_on_ranks):
        agree(dict(enumerate(found)), dict(enumerate(wanted)))  # type: ignore[arg-type]


def generated(mesh: DeviceMesh | None, cut: Any) -> list[Tensor]:
    """A context that is appended, then a row of a sequence after it; and what the cache holds."""

    def placed(x: Tensor) -> Any:
        return x if mesh is None else distribute_tensor(x, mesh, [cut])

    make = torch.Generator().manual_seed(6)
    cache = KVCache(2, 2, 8, 4)
    cache.k, cache.v = placed(torch.zeros_like(cache.k)), placed(torch.zeros_like(cache.v))
    cache.lens += torch.tensor([0, 2])
    for rows in (3, 1):
        new = [placed(torch.randn(2, 2, rows, 4, generator=make)) for _ in "kv"]
        if rows == 3:
            cache.append(*new)
    out = cache.attend(placed(torch.randn(2, 4, 1, 4, generator=make)), *new)
    return [whole(out), whole(cache.k), whole(cache.v), cache.lens]


@pytest.mark.parametrize("cut", [Shard(0), Shard(1)], ids=["sequences", "heads"])
def test_a_cache_may_lie_on_several_devices(cut):
    wanted = generated(None, cut)
    for found in run((2,), generated, cut):
        agree(dict(enumerate(found)), dict(enumerate(wanted)))  # type: ignore[arg-type]


# ---- What cannot be


def fused_and_cut(mesh: DeviceMesh, use_local_output: bool = True) -> None:
    module, cut = MODULES["plain"](), ColwiseParallel(use_local_output=use_local_output)
    parallelize_module(module, mesh, {"qkv": cut, "out": RowwiseParallel()})
    (x,), options = inputs(module)
    module(x, **options)


def fused_and_cut_without_a_plain_tensor(mesh: DeviceMesh) -> None:
    fused_and_cut(mesh, False)


def plain_norms(mesh: DeviceMesh) -> None:
    with_pytorchs_styles(mesh, "all learned parts", True)


def plain_sink(mesh: DeviceMesh) -> None:
    cut = ColwiseParallel()
    module = self_attention(sink=True).split_projections()
    parallelize_module(module, mesh, {"q": cut, "k": cut, "v": cut, "out": RowwiseParallel()})
    module(inputs(module)[0][0])


def heads_between_ranks(mesh: DeviceMesh) -> None:
    tilewise_distributed().tensor_parallel(SelfAttention(12, heads=3), mesh)


def heads_between_ranks_by_pytorch(mesh: DeviceMesh) -> None:
    cut = ColwiseParallel()
    module = SelfAttention(12, heads=3).split_projections()
    parallelize_module(module, mesh, {"q": cut, "k": cut, "v": cut})(torch.zeros(1, 4, 12))


def no_attention(mesh: DeviceMesh) -> None:
    tilewise_distributed().tensor_parallel(nn.Linear(4, 4), mesh)


def two_dimensions(mesh: DeviceMesh) -> None:
    tilewise_distributed().tensor_parallel(MODULES["plain"](), mesh)


def fused_again(mesh: DeviceMesh) -> None:
    tilewise_distributed().tensor_parallel(MODULES["plain"](), mesh).fuse_projections()


REFUSED = {
    fused_and_cut: ((2,), "qkv.weight is cut.* q and k and v one behind the other.*split_projections"),
    fused_and_cut_without_a_plain_tensor: ((2,), "qkv.weight is cut along its rows"),
    plain_norms: ((2,), "q_norm and k_norm are plain tensors.*tensor_parallel"),
    plain_sink: ((2,), "sink requires a gradient and is a plain tensor"),
    heads_between_ranks: ((2,), "heads=3 must be a multiple of the 2 devices"),
    heads_between_ranks_by_pytorch: ((2,), "heads=3 must be a multiple of the 2 devices"),
    no_attention: ((2,), "module is a Linear, and must be a tilewise.nn.SelfAttention"),
    two_dimensions: ((2, 2), "must have one dimension"),
    fused_again: ((2,), "q.weight is a DTensor"),
}


@pytest.mark.parametrize("function", REFUSED, ids=lambda function: function.__name__)
def test_every_rank_says_what_cannot_be(function):
    shape, words = REFUSED[function]
    for error in errors(shape, function):
        assert isinstance(error, ValueError)
        with pytest.raises(ValueError, match=words):
            raise error


# ---- fully_shard


class Block(nn.Module):
    """Rows through attention and back into them."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), MODULES[name]().split_projections()

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        if self.attention.core.rotary is None:
            del options["positions"]
        return x + self.attention(self.norm(x), **options)


def steps(model: nn.Module, own: slice, share: float) -> dict[str, Tensor]:
    """Two steps with some of the sequences; losses, and the weights after. share: how much of the loss."""
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=1e-2, eps=1e-3), []
    for _ in range(2):
        (x,), options = inputs(model[0].attention)
        x, options["positions"] = x[own], options["positions"][own]
        for block in model:
            x = block(x, **options)
        loss = (x - 1).square().sum()
        (loss * share).backward()
        losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": torch.stack(losses), **{n: whole(x) for n, x in model.state_dict().items()}}


def blocks() -> nn.Sequential:
    return nn.Sequential(Block("all learned parts"), Block("plain"))


def with_fsdp(mesh: DeviceMesh) -> dict[str, Tensor]:
    data, heads = (mesh["outer"], mesh["inner"]) if mesh.ndim == 2 else (mesh, None)
    model = blocks()
    for block in model:
        if heads is not None:
            parallelize_module(block, heads, {"attention": tilewise_distributed().HeadParallel()})
        if heads is None:  # each projection by itself, too: its weight is whole while it computes alone
            for linear in (block.attention.q, block.attention.k, block.attention.v, block.attention.out):
                fully_shard(linear, mesh=data)
        fully_shard(block, mesh=data)
    fully_shard(model, mesh=data)
    rank = data.get_local_rank()
    return steps(model, slice(rank, rank + 1), 2.0)  # FSDP takes the mean over ranks


@pytest.mark.parametrize("shape", [(2,), (2, 2)], ids=["fully_shard", "fully_shard and heads"])
def test_fully_shard_trains_as_one_process(shape):
    wanted = steps(blocks(), slice(0, 2), 1.0)
    results = run(shape, with_fsdp)
    apart = results[0]["losses"] + results[-1]["losses"]
    for found in results:
        agree({**found, "losses": apart}, wanted)
