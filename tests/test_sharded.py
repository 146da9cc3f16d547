"""DTensors: a call that is cut over several ranks gives what one device gives, forward and backward."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import tilewise
from harness.features import checkered_score, checkered_score_twin, dilated_keep, dilated_keep_twin
from harness.gluon import needs_interpreter
from harness.ranks import run
from tilewise.plan.shards import chunks, heads_taken, kept_dims

Tensor = torch.Tensor
BATCH, HEADS, WHOLE = Shard(0), Shard(1), Replicate()
SEED = torch.tensor([7])


def agree(found: Tensor, wanted: Tensor, name: str) -> None:
    """Sums over ranks come in another order: some roundings of the largest element."""
    limit = 64 * 2.0**-23 * max(1.0, wanted.abs().nan_to_num(posinf=0).max().item())
    torch.testing.assert_close(found, wanted, rtol=0, atol=limit, msg=lambda text: f"{name}: {text}")


# ---- Numbers alone: who has which heads


@pytest.mark.parametrize("counts", [(1,), (2,), (4,), (2, 2), (3, 2)])
def test_each_query_head_finds_its_key_head_on_its_rank(counts):
    for kv_heads, group in itertools.product((1, 2, 3, 4, 6), (1, 2, 3, 4)):
        q_heads = kv_heads * group
        kept = kept_dims(q_heads, kv_heads, counts)
        behind = torch.Size(counts[kept:]).numel()
        for rank, heads in enumerate(chunks(q_heads, counts)):
            have = chunks(kv_heads, counts[:kept])[rank // behind]
            taken = heads_taken(heads, group, have[0])
            count = heads[1] - heads[0]
            if count == 0:
                continue
            assert count % len(taken) == 0
            for i in range(count):
                head = taken[i // (count // len(taken))] + have[0]
                assert head == (heads[0] + i) // group and have[0] <= head < have[1]
        if kv_heads % torch.Size(counts).numel() == 0:
            assert kept == len(counts), "key heads stay where they are"


@pytest.mark.parametrize("size, counts", [(7, (3,)), (2, (4,)), (10, (3, 2)), (0, (2,))])
def test_heads_are_cut_as_pytorch_cuts_them(size, counts):
    parts, empty = [torch.arange(size)], torch.arange(0)
    for count in counts:
        parts = [x for part in parts for x in [*part.chunk(count), *[empty] * count][:count]]
    assert [list(range(*part)) for part in chunks(size, counts)] == [part.tolist() for part in parts]


# ---- Against one device


def inputs(batch: int, q_heads: int, kv_heads: int) -> dict[str, Tensor]:
    """Tensors of a call in which every sequence and every head has numbers of its own."""
    make = torch.Generator().manual_seed(3)

    def numbers(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=make)

    rows = 7
    return {
        "q": numbers(batch, q_heads, rows, 8),
        "k": numbers(batch, kv_heads, rows, 8),
        "v": numbers(batch, kv_heads, rows, 4),
        "slopes": numbers(batch, q_heads),
        "table": numbers(q_heads, 8),
        "bias": numbers(batch, q_heads, rows, rows),
        "sink": numbers(q_heads),
        "temperature": numbers(q_heads),
        "scale": torch.tensor(0.7),
    }


def attend(x: dict[str, Any], **options: Any) -> tuple[Any, Any]:
    found: tuple[Any, Any] = tilewise.attention(
        x["q"], x["k"], x["v"],
        mask=tilewise.Causal() & tilewise.UserMask(dilated_keep, (3,), twin=dilated_keep_twin),
        score=[tilewise.ALiBi(x["slopes"]), tilewise.RelativePosition(x["table"])], bias=x["bias"],
        sink=x["sink"], similarity=tilewise.Cosine(x["temperature"]), scale=x["scale"],
        dropout_p=0.3, dropout_seed=SEED, return_lse=True, **options,
    )  # fmt: skip
    return found


def differentiated(
    call: Callable[..., Any], x: dict[str, Any], whole: Callable[[Any], Tensor]
) -> dict[str, Tensor]:
    """out, lse and all gradients, through `whole` of each."""
    out, lse = (whole(each) for each in call(x))
    (out.square().sum() + lse.nan_to_num(neginf=0).sin().sum()).backward()
    grads = {f"d{name}": whole(each.grad).detach() for name, each in x.items()}
    return {"out": out.detach(), "lse": lse.detach(), **grads}


def on_ranks(
    mesh: DeviceMesh, sizes: tuple[int, ...], cuts: dict[str, tuple[Any, ...]], impl: str
) -> dict[str, Tensor]:
    everywhere = (WHOLE,) * mesh.ndim
    x = {
        name: distribute_tensor(each, mesh, cuts.get(name, everywhere)).requires_grad_()
        for name, each in inputs(*sizes).items()
    }
    with tilewise.tiles.use(tilewise.tiles.Tile(16, 16)):
        seen: list[tuple[Any, ...]] = []
        found = differentiated(
            lambda x: attend(x, impl=impl), x, lambda each: seen.append(each.placements) or each.full_tensor()
        )
    given = zip(*[x[name].placements for name in "qkv"], strict=True)
    wanted = tuple([next((each for each in placements if each != WHOLE), WHOLE) for placements in given])
    assert seen[:2] == [wanted, wanted], "each rank computes what is its own alone"
    for name, each in x.items():
        kept = all(
            own.is_replicate() or own == given
            for own, given in zip(each.grad.placements, each.placements, strict=True)
        )
        assert kept, f"d{name} came as {each.grad.placements}, {name} was {each.placements}"
    return found


def check(shape: tuple[int, ...], sizes: tuple[int, ...], cuts: dict[str, Any], impl: str = "torch") -> None:
    x = {name: each.requires_grad_() for name, each in inputs(*sizes).items()}
    wanted = differentiated(lambda x: attend(x, impl="torch"), x, lambda each: each)
    for found in run(shape, on_ranks, sizes, cuts, impl):
        for name, each in wanted.items():
            agree(found[name], each, name)


def alike(*placements: Any) -> dict[str, tuple[Any, ...]]:
    return dict.fromkeys("qkv", placements)


CUTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "heads": ((2,), (2, 4, 2), alike(HEADS)),
    "heads, keys on all ranks": ((2,), (2, 4, 2), {"q": (HEADS,)}),
    "heads, of keys alone": ((2,), (2, 4, 2), {"k": (HEADS,), "v": (HEADS,)}),
    "heads, parameters too": (
        (2,),
        (2, 4, 2),
        alike(HEADS)
        | {"sink": (Shard(0),), "temperature": (Shard(0),), "bias": (Shard(1),), "slopes": (Shard(1),)},
    ),
    "fewer key heads than ranks": ((4,), (1, 4, 2), {"q": (HEADS,), "k": (HEADS,)}),
    "heads in chunks that do not meet, a rank without": ((4,), (1, 6, 2), alike(HEADS)),
    "a rank's heads share key heads unevenly": ((3,), (1, 8, 2), alike(HEADS)),
    "sequences, not as many on each rank": ((2,), (3, 4, 2), alike(BATCH)),
    "fewer sequences than ranks": ((2,), (1, 2, 1), alike(BATCH)),
    "sequences of keys, heads of values": ((2,), (2, 4, 4), {"k": (BATCH,), "v": (HEADS,)}),
    "sequences and heads": ((2, 2), (2, 4, 2), alike(BATCH, HEADS)),
    "heads twice, key heads once": ((2, 2), (1, 4, 2), alike(HEADS, HEADS)),
    "the same on some ranks": ((2, 2), (1, 4, 2), alike(WHOLE, HEADS)),
    "nothing cut": ((2,), (1, 2, 1), {}),
    "one rank": ((1,), (2, 4, 2), alike(HEADS)),
}


@pytest.mark.parametrize("name", CUTS)
def test_a_call_that_is_cut_gives_what_one_device_gives(name):
    check(*CUTS[name])


@needs_interpreter
@pytest.mark.parametrize("name", ["heads in chunks that do not meet, a rank without", "sequences and heads"])
def test_so_do_the_kernels(name):
    check(*CUTS[name], impl="portable")


# ---- Masks and scores whose tensors are DTensors, of the whole call


def of_sequences(d: Callable[[Tensor], Any]) -> dict[str, dict[str, Any]]:
    """Arguments with something for each sequence; d: what is done with tensors."""
    rows, lens = torch.arange(7), torch.tensor([3, 6])
    pairs = torch.rand(2, 4, 7, 7, generator=torch.Generator().manual_seed(5))
    return {
        "Causal": dict(mask=tilewise.Causal(d(torch.tensor([0, 2])))),
        "Window": dict(mask=tilewise.Window(2, 1, d(torch.tensor([0, 2])))),
        "Prefix": dict(mask=tilewise.Prefix(d(lens))),
        "Padding": dict(mask=tilewise.Padding(d(lens)) & tilewise.Causal("top_left")),
        "Documents": dict(mask=tilewise.Documents(d(torch.stack((rows // 3, rows // 5))))),
        "offsets": dict(mask=tilewise.Documents.from_offsets(d(torch.tensor([0, 2, 7])), q_len=7)),
        "Intervals": dict(mask=tilewise.Intervals(d(rows - 2), d((rows + lens[:, None])[:, None]))),
        "a bool tensor": dict(mask=d(pairs > 0.4)),
        "UserMask": dict(mask=tilewise.UserMask(dilated_keep, (3,), twin=dilated_keep_twin)),
        "ALiBi": dict(score=tilewise.ALiBi(d(pairs[:, :, 0, 0]), d(lens))),
        "UserScore": dict(
            score=tilewise.UserScore(
                checkered_score, (d(pairs[0, :, 0, 1]), 2.0), twin=checkered_score_twin
            )
        ),
        "nested tuples": dict(
            score=tilewise.UserScore(nested_score, ((d(pairs[0, :, 0, 2]), 1), 3), twin=nested_twin)
        ),
        "bias": dict(bias=d(pairs)),
        "Softcap": dict(score=tilewise.Softcap(2.0)),
    }  # fmt: skip


@triton.jit
def nested_score(s, batch, head, q_idx, kv_idx, args):
    return s + tl.load(args[0][0] + head) * args[1]


def nested_twin(s, batch, head, q_idx, kv_idx, numbers, factor):
    return s + numbers[0][head] * factor


def masked_on_ranks(mesh: DeviceMesh, cut: tuple[Any, ...], impl: str) -> dict[str, Tensor]:
    x = inputs(2, 4, 2)
    q, k, v = (distribute_tensor(x[name], mesh, cut) for name in "qkv")
    found = {}
    with tilewise.tiles.use(tilewise.tiles.Tile(16, 16)):
        for name, arguments in of_sequences(
            lambda x: distribute_tensor(x, mesh, [WHOLE] * mesh.ndim)
        ).items():
            found[name] = tilewise.attention(q, k, v, **arguments, impl=impl).full_tensor()
    return found


@pytest.mark.parametrize("impl", ["torch", pytest.param("portable", marks=needs_interpreter)])
@pytest.mark.parametrize("cut", [(BATCH,), (HEADS,)], ids=["sequences", "heads"])
def test_masks_and_scores_are_those_of_the_whole_call(cut, impl):
    x = inputs(2, 4, 2)
    found = run((2,), masked_on_ranks, cut, impl)
    for name, arguments in of_sequences(lambda x: x).items():
        wanted = tilewise.attention(x["q"], x["k"], x["v"], **arguments, impl="torch")
        for each in found:
            agree(each[name], wanted, name)


# ---- Packed sequences, and caches


def packed_inputs() -> dict[str, Tensor]:
    x = inputs(3, 4, 2)
    rows = {name: x[name].transpose(1, 2).flatten(0, 1)[:19] for name in "qkv"}
    return {**rows, "slopes": x["slopes"]}


def packed(x: dict[str, Any]) -> tuple[Any, Any]:
    found: tuple[Any, Any] = tilewise.packed_attention(
        x["q"], x["k"], x["v"], q_offsets=torch.tensor([0, 7, 9, 18]), mask=tilewise.Causal(),
        score=tilewise.ALiBi(x["slopes"]), dropout_p=0.4, dropout_seed=SEED, return_lse=True, impl="torch",
    )  # fmt: skip
    return found


def packed_on_ranks(mesh: DeviceMesh) -> dict[str, Tensor]:
    x = {
        name: distribute_tensor(each, mesh, [WHOLE if name == "slopes" else Shard(1)]).requires_grad_()
        for name, each in packed_inputs().items()
    }
    out, lse = packed(x)
    assert (out.placements, lse.placements) == ((Shard(1),), (Shard(0),))
    return differentiated(packed, x, DTensor.full_tensor)


def test_packed_heads_give_what_one_device_gives():
    wanted = differentiated(packed, {n: x.requires_grad_() for n, x in packed_inputs().items()}, lambda x: x)
    for found in run((4,), packed_on_ranks):
        for name, each in wanted.items():
            agree(found[name], each, name)


# what is cut: q, caches, new_k and new_v; key heads; in pages; how queries come
CACHES: dict[str, tuple[Any, Any, Any, int, bool, bool]] = {
    "heads": (HEADS, HEADS, HEADS, 2, False, False),
    "sequences": (BATCH, BATCH, BATCH, 2, False, False),
    "one key head, on all ranks": (HEADS, WHOLE, WHOLE, 1, False, False),
    "queries on all ranks, the cache cut": (WHOLE, HEADS, WHOLE, 2, False, False),
    "a whole cache, its new rows cut": (BATCH, WHOLE, HEADS, 2, False, False),
    "pages, heads": (HEADS, Shard(2), HEADS, 2, True, False),
    "pages on all ranks, sequences": (BATCH, WHOLE, BATCH, 2, True, False),
    "pages, heads, packed": (Shard(1), Shard(2), Shard(1), 2, True, True),
}


def cached(name: str, impl: str, mesh: DeviceMesh | None) -> list[Tensor]:
    """out, lse and the caches after a call; of the whole, from ranks too, each of which checks its shards."""
    cut_q, cut_cache, cut_new, kv_heads, is_paged, is_packed = CACHES[name]
    x, new = inputs(3, 4, kv_heads), inputs(4, 4, kv_heads)
    k, v = x["k"], x["v"]
    arguments: dict[str, Any] = dict(rotary=tilewise.nn.Rotary(8).table(16))
    if is_paged:
        pool = torch.arange(1.0, 33).reshape(8, 4, 1, 1)
        k, v = (
            pool.sin().expand(8, 4, kv_heads, each.shape[3]) + each[0, :, 0][None, None, :1]
            for each in (k, v)
        )
        arguments["pages"] = torch.tensor([[5, 0], [1, 4], [7, 2]])
    else:
        k, v = (torch.cat((each, each.flip(2)), 2) for each in (k, v))
    q, new_k, new_v = new["q"][:3, :, :2], new["k"][1:, :, :2], new["v"][1:, :, :2]
    if is_packed:
        q, new_k, new_v = (each.transpose(1, 2).flatten(0, 1) for each in (q, new_k, new_v))
        arguments["q_offsets"] = torch.tensor([0, 3, 3, 6])

    def placed(x: Tensor, cut: Any) -> Any:
        return x.clone() if mesh is None else distribute_tensor(x, mesh, [cut])

    caches = placed(k, cut_cache), placed(v, cut_cache)
    out, lse = tilewise.cached_attention(
        placed(q, cut_q), *caches, new_k=placed(new_k, cut_new), new_v=placed(new_v, cut_new),
        kv_lens=torch.tensor([5, 0, 2]), mask=tilewise.Causal(), sink=x["sink"],
        score=tilewise.ALiBi(x["slopes"]), return_lse=True, impl=impl, **arguments,
    )  # fmt: skip
    if mesh is None:
        return [out, lse, *caches]
    assert all([each.placements == (cut_cache,) for each in caches])
    every = [DTensor.from_local(each.to_local(), mesh, [WHOLE], run_check=False) for each in caches]
    own = [each.to_local() for each in (every if cut_cache == WHOLE else caches)]
    return [out.full_tensor(), lse.full_tensor(), *[each.full_tensor() for each in caches], *own]


def cached_on_ranks(mesh: DeviceMesh, name: str, impl: str) -> list[Tensor]:
    with tilewise.tiles.use(tilewise.tiles.Tile(16, 16)):
        return cached(name, impl, mesh)


@pytest.mark.parametrize("impl", ["torch", pytest.param("portable", marks=needs_interpreter)])
@pytest.mark.parametrize("name", CACHES)
def test_new_rows_land_in_the_shards_of_a_cache_and_are_attended_to(name, impl):
    wanted = cached(name, "torch", None)
    for found in run((2,), cached_on_ranks, name, impl):
        for what, each, exactly in zip(("out", "lse", "cache_k", "cache_v"), found, wanted, strict=False):
            agree(each, exactly, what)
        if CACHES[name][1] == WHOLE:
            agree(found[4], wanted[2], "this rank's own copy of cache_k")
            agree(found[5], wanted[3], "this rank's own copy of cache_v")


# ---- Dropout, memory, torch.compile


def dropped_on_ranks(mesh: DeviceMesh) -> tuple[Tensor, Tensor]:
    torch.manual_seed(mesh.get_rank())
    ones = torch.ones(1, 2, 4, 8)
    whole = [distribute_tensor(ones, mesh, [WHOLE]) for _ in range(3)]
    cut = [distribute_tensor(ones, mesh, [HEADS]) for _ in range(3)]
    first, other = (tilewise.attention(*x, dropout_p=0.5) for x in (whole, cut))
    before = torch.get_rng_state()
    tilewise.why_not(*whole, dropout_p=0.5)
    assert torch.equal(before, torch.get_rng_state()), "looking at a call draws nothing"
    return first.to_local(), other.full_tensor()


def test_ranks_agree_on_the_seed_that_they_draw():
    (a, heads), (b, others) = run((2,), dropped_on_ranks)
    assert torch.equal(a, b) and torch.equal(heads, others)
    assert not torch.equal(heads[:, 0], heads[:, 1]), "each head drops pairs of its own"


def counted_on_ranks(mesh: DeviceMesh, cut: Any) -> int:
    x = [distribute_tensor(inputs(2, 4, 2)[name], mesh, [cut]).requires_grad_() for name in "qkv"]
    with CommDebugMode() as counted:
        out = tilewise.attention(*x, mask=tilewise.Causal())
        out.backward(torch.ones_like(out))
    assert [each.grad.placements for each in x] == [(cut,)] * 3
    return int(counted.get_total_counts())


@pytest.mark.parametrize("cut", [BATCH, HEADS, WHOLE], ids=["sequences", "heads", "whole"])
def test_nothing_is_sent_where_each_rank_has_what_it_needs(cut):
    assert run((2,), counted_on_ranks, cut) == [0, 0]


def biased_on_ranks(mesh: DeviceMesh, cut: Any, one: int, impl: str) -> tuple[Tensor, Tensor, int]:
    x = inputs(2, 4, 2)
    q, k, v = (distribute_tensor(x[name], mesh, [cut]) for name in "qkv")
    bias = x["bias"] if one < 0 else x["bias"].narrow(one, 0, 1)
    bias = bias.squeeze(0)  # [heads, ...] where there is one for all sequences
    own = [Shard(cut.dim - 4 + bias.dim())] if bias.dim() == 4 or cut == HEADS else [WHOLE]
    own = own if own[0] == WHOLE or bias.shape[own[0].dim] > 1 else [WHOLE]
    bias = distribute_tensor(bias, mesh, own).requires_grad_()
    with CommDebugMode() as counted, tilewise.tiles.use(tilewise.tiles.Tile(16, 16)):
        out = tilewise.attention(q, k, v, bias=bias, impl=impl)
        out.backward(torch.ones_like(out))
    assert bias.grad.placements == tuple(own)
    sent = 0 if own == [WHOLE] else counted.get_total_counts()
    return out.full_tensor(), bias.grad.full_tensor(), sent


@pytest.mark.parametrize("impl", ["torch", pytest.param("portable", marks=needs_interpreter)])
def test_a_bias_stays_in_parts(impl):
    x = inputs(2, 4, 2)
    for cut, one in itertools.product((BATCH, HEADS), (-1, 0, 1, 2, 3)):
        bias = x["bias"] if one < 0 else x["bias"].narrow(one, 0, 1)
        bias = bias.squeeze(0).clone().requires_grad_()
        wanted = tilewise.attention(x["q"], x["k"], x["v"], bias=bias, impl="torch")
        wanted.backward(torch.ones_like(wanted))
        for out, grad, sent in run((2,), biased_on_ranks, cut, one, impl):
            agree(out, wanted, f"out, {cut}, one along {one}")
            agree(grad, bias.grad, f"dbias, {cut}, one along {one}")
            assert sent == 0


def derived_twice(x: dict[str, Any]) -> tuple[Any, ...]:
    q, k, v = (x[name] for name in "qkv")
    out = tilewise.attention(q, k, v, mask=tilewise.Causal(), impl="portable")
    first = torch.autograd.grad(out.square().sum(), (q, k, v), create_graph=True)
    return torch.autograd.grad(sum(each.square().sum() for each in first), (q, k, v))


def derived_twice_on_ranks(mesh: DeviceMesh, cut: Any) -> list[Tensor]:
    x = {
        name: distribute_tensor(each, mesh, [cut]) for name, each in inputs(2, 4, 2).items() if name in "qkv"
    }
    return [each.full_tensor() for each in derived_twice({name: x[name].requires_grad_() for name in x})]


@needs_interpreter
def test_second_derivatives_are_those_of_one_device():
    wanted = derived_twice(
        {name: each.requires_grad_() for name, each in inputs(2, 4, 2).items() if name in "qkv"}
    )
    for found in run((2,), derived_twice_on_ranks, HEADS):
        for each, whole, name in zip(found, wanted, "qkv", strict=True):
            agree(each, whole, f"second d{name}")


def strides_on_ranks(mesh: DeviceMesh) -> list[tuple[Any, ...]]:
    x = inputs(2, 4, 2)
    q, k, v = (distribute_tensor(x[name].transpose(1, 2).contiguous(), mesh, [Shard(2)]) for name in "qkv")
    out, lse = tilewise.attention(*(each.transpose(1, 2) for each in (q, k, v)), return_lse=True)
    return [(x.shape, x.stride(), x.dtype, x.is_contiguous()) for x in (out, lse, out.to_local())]


def test_out_has_the_order_of_memory_that_q_has():
    x = {name: each.transpose(1, 2).contiguous() for name, each in inputs(2, 4, 2).items() if name in "qkv"}
    out, lse = tilewise.attention(*(x[name].transpose(1, 2) for name in "qkv"), return_lse=True)
    for found in run((2,), strides_on_ranks):
        assert found[:2] == [(x.shape, x.stride(), x.dtype, x.is_contiguous()) for x in (out, lse)]
        assert found[2][1] == (7 * 2 * 4, 4, 2 * 4, 1)


def with_slopes(x: dict[str, Any]) -> tuple[Any, Any]:
    found: tuple[Any, Any] = tilewise.attention(
        x["q"], x["k"], x["v"], mask=tilewise.Causal(), score=tilewise.ALiBi(x["slopes"]), return_lse=True
    )
    return found


def compiled_on_ranks(mesh: DeviceMesh) -> dict[str, Tensor]:
    x = {
        name: distribute_tensor(each, mesh, [WHOLE if name == "slopes" else HEADS]).requires_grad_()
        for name, each in inputs(1, 4, 2).items()
        if name in ("q", "k", "v", "slopes")
    }
    call = torch.compile(with_slopes, fullgraph=True, backend="aot_eager")
    return differentiated(call, x, DTensor.full_tensor)


def test_torch_compile_makes_one_graph_of_it():
    own = ("q", "k", "v", "slopes")
    x = {name: each.requires_grad_() for name, each in inputs(1, 4, 2).items() if name in own}
    wanted = differentiated(with_slopes, x, lambda each: each)
    for found in run((2,), compiled_on_ranks):
        for name, each in wanted.items():
            agree(found[name], each, name)


# ---- What cannot be: the same words from the call and from `why_not`


@pytest.fixture(scope="module")
def meshes() -> Iterator[tuple[DeviceMesh, DeviceMesh]]:
    """Of four ranks, of which there is one: nothing can be sent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        yield init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    finally:
        dist.destroy_process_group()


def whole_of(mesh: DeviceMesh, placements: Any, *sizes: int) -> Any:
    """A DTensor of these sizes; nobody's numbers are right."""
    return torch.distributed.tensor.zeros(*sizes, device_mesh=mesh, placements=placements)


def partial(mesh: DeviceMesh, *sizes: int) -> Any:
    return DTensor.from_local(torch.zeros(*sizes), mesh, [Partial()], run_check=False)


Q, KV = (2, 8, 8, 16), (2, 4, 8, 16)
REFUSED: dict[str, tuple[Callable[[Any, Any], dict[str, Any]], tuple[str, ...]]] = {
    "queries in parts": (
        lambda line, square: dict(q=whole_of(line, [Shard(2)], *Q)),
        ("q is Shard(2) along dimension 0", "a part of the queries", "context_parallel_attention"),
    ),
    "keys in parts": (
        lambda line, square: dict(k=whole_of(line, [Shard(2)], *KV)),
        ("k is Shard(2)", "a part of the keys", "redistribute it along heads or batch"),
    ),
    "value_dim in parts": (
        lambda line, square: dict(v=whole_of(line, [Shard(3)], *KV)),
        ("v is Shard(3)", "a part of value_dim", "redistribute it"),
    ),
    "head_dim in parts": (
        lambda line, square: dict(k=whole_of(line, [Shard(3)], *KV)), ("k is Shard(3)", "a part of head_dim"),
    ),
    "a sum": (
        lambda line, square: dict(v=partial(line, *KV)), ("v is Partial", "still to be made", "Replicate()"),
    ),
    "a plain tensor among them": (
        lambda line, square: dict(k=torch.zeros(KV)),
        ("q, v came as DTensor and k as a plain tensor", "distribute_tensor(k, q.device_mesh"),
    ),
    "two meshes": (
        lambda line, square: dict(k=whole_of(square, [HEADS, WHOLE], *KV)),
        ("k lies on DeviceMesh", "all must lie on one mesh"),
    ),
    "a sink on another mesh": (
        lambda line, square: dict(sink=whole_of(square, [WHOLE, WHOLE], 8)), ("sink lies on", "one mesh"),
    ),
    "a plain parameter": (
        lambda line, square: dict(sink=torch.zeros(8, requires_grad=True)),
        ("sink requires a gradient and is a plain tensor", "distribute_tensor(sink, q.device_mesh"),
    ),
    "plain slopes that are trained": (
        lambda line, square: dict(score=tilewise.ALiBi(torch.zeros(8, requires_grad=True))),
        ("ALiBi.slopes requires a gradient", "distribute_tensor(slopes, "),
    ),
    "a DTensor beside plain ones": (
        lambda line, square: dict(
            q=torch.zeros(Q), k=torch.zeros(KV), v=torch.zeros(KV), sink=whole_of(line, [WHOLE], 8)
        ),
        ("sink is a DTensor, and q, k, v are not", "sink.full_tensor()"),
    ),
    "sizes of the whole call": (
        lambda line, square: dict(sink=torch.zeros(2)), ("sink=(2,) must be a tensor [8]",),
    ),
    "Hopper's kernel, with a head's numbers": (
        lambda line, square: dict(sink=torch.zeros(8), score=tilewise.ALiBi(torch.zeros(8)), impl="hopper"),
        ("impl='hopper'",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_said_and_why_not_says_it_too(meshes, name):
    change, words = REFUSED[name]
    cut = {"q": [HEADS], "k": [HEADS], "v": [HEADS]}
    given: dict[str, Any] = {
        each: whole_of(meshes[0], cut[each], *(Q if each == "q" else KV)) for each in "qkv"
    } | change(*meshes)
    reasons = tilewise.why_not(**given)
    with pytest.raises(ValueError) as raised:
        tilewise.attention(**given)
    assert str(raised.value) in reasons
    assert all(word in " ".join(reasons) for word in words), reasons


def test_a_call_that_was_right_does_not_vouch_for_one_with_other_placements(meshes):
    k = whole_of(meshes[0], [WHOLE], *KV)
    tilewise.attention(whole_of(meshes[0], [HEADS], *Q), k, k)
    with pytest.raises(ValueError, match="q is Shard"):
        tilewise.attention(whole_of(meshes[0], [Shard(2)], *Q), k, k)


def test_a_rank_outside_of_the_mesh_is_told_so(meshes):
    others = DeviceMesh("cpu", [1, 2])
    q, k = whole_of(others, [HEADS], *Q), whole_of(others, [HEADS], *KV)
    reasons = tilewise.why_not(q, k, k)
    with pytest.raises(ValueError, match="this rank is none of DeviceMesh") as raised:
        tilewise.attention(q, k, k)
    assert [str(raised.value)] == reasons


def test_packed_tokens_in_parts_are_refused_in_the_dimensions_that_were_given(meshes):
    q, k = whole_of(meshes[0], [Shard(0)], 8, 8, 16), whole_of(meshes[0], [Shard(1)], 8, 4, 16)
    offsets = torch.tensor([0, 8])
    reasons = tilewise.why_not(q, k, k, q_offsets=offsets)
    with pytest.raises(
        ValueError, match=r"q is Shard\(0\) along dimension 0 of its mesh, a part of the queries"
    ) as raised:
        tilewise.packed_attention(q, k, k, q_offsets=offsets)
    assert [str(raised.value)] == reasons


REFUSED_CACHES: dict[str, tuple[Any, Any, Any, int, bool, str]] = {
    "another rank's heads": (
        [HEADS],
        [HEADS],
        [HEADS],
        2,
        False,
        "would need what another has: redistribute",
    ),
    "rows in parts": ([HEADS], [Shard(2)], [HEADS], 4, False, "cache_k is Shard(2)"),
    "pages in parts": ([HEADS], [Shard(0)], [HEADS], 4, True, "a part of the pages: shard it along heads"),
    "rows of pages in parts": ([HEADS], [Shard(1)], [HEADS], 4, True, "cache_k is Shard(1)"),
    "plain new rows": ([HEADS], [HEADS], None, 4, False, "new_k is a plain tensor, and the cache a DTensor"),
    "new rows in parts": ([HEADS], [HEADS], [Shard(2)], 4, False, "new_k is Shard(2)"),
}


@pytest.mark.parametrize("name", REFUSED_CACHES)
def test_a_cache_that_cannot_stay_where_it_is_is_refused(meshes, name):
    cut_q, cut_cache, cut_new, heads, is_paged, words = REFUSED_CACHES[name]
    sizes = (8, 4, heads, 16) if is_paged else (2, heads, 8, 16)
    cache, new = whole_of(meshes[0], cut_cache, *sizes), torch.zeros(2, heads, 4, 16)
    if cut_new is not None:
        new = whole_of(meshes[0], cut_new, 2, heads, 4, 16)
    pages = dict(pages=torch.zeros(2, 2, dtype=torch.int32)) if is_paged else {}
    given = dict(kv_lens=torch.zeros(2, dtype=torch.int32), new_k=new, new_v=new, **pages)
    q = whole_of(meshes[0], cut_q, 2, 8, 4, 16)
    reasons = tilewise.why_not(q, cache, cache, **given)
    with pytest.raises(ValueError) as raised:
        tilewise.cached_attention(q, cache, cache, **given)
    assert str(raised.value) in reasons and words in str(raised.value), reasons
