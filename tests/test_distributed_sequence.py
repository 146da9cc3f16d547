"""split, join and positions: the rows of a sequence on several ranks, in processes that talk over gloo."""

import pytest
import torch

from harness import ranks
from tilewise.distributed import join, positions, split
from tilewise.distributed.agree import agreed, word
from tilewise.distributed.exchange import Channel
from tilewise.distributed.group import check_mesh, group_along, rank_in
from tilewise.distributed.hosts import host_group
from tilewise.distributed.order import ORDERS

SHAPES = [(1,), (3,), (4,), (2, 2)]


def there_and_back(mesh, order, dim):
    """The part, its positions, the whole again, and the gradients of split and join."""
    whole = torch.arange(2.0 * 24 * 3).reshape(2, 24, 3).transpose(1, dim).requires_grad_()
    part = split(whole, mesh, dim=dim, order=order)
    again = join(part, mesh, dim=dim, order=order)
    weights = torch.rand(again.shape, generator=torch.Generator().manual_seed(mesh.get_rank()))
    by_join, by_split = torch.autograd.grad((again * weights).sum(), (part, whole))
    return part, positions(24, mesh, order=order), again, weights, by_join, by_split


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_join_undoes_split(shape, order):
    dim = 1 if order == "zigzag" else -1
    whole = torch.arange(2.0 * 24 * 3).reshape(2, 24, 3).transpose(1, dim)
    found = ranks.run(shape, there_and_back, order, dim)
    weights = sum(each[3] for each in found)
    for part, rows, again, _, by_join, by_split in found:
        assert rows.dtype == torch.int64 and torch.equal(part, whole.index_select(dim, rows))
        assert torch.equal(again, whole)
        torch.testing.assert_close(by_join, weights.index_select(dim, rows))  # the sum over the ranks
        assert torch.equal(by_split, torch.zeros_like(whole).index_copy(dim, rows, by_join))
    assert torch.cat([each[1] for each in found]).sort().values.tolist() == list(range(24))
    if order == "zigzag":  # as much work under a causal mask for each
        assert len({int(each[1].sum()) for each in found}) == 1


def within_a_line(mesh, name):
    """Rows that depend on the line: nothing may pass between lines."""
    part = mesh[name]
    across = mesh["inner" if name == "outer" else "outer"].get_local_rank()
    whole = (torch.arange(4.0) + 10 * across).requires_grad_()
    rows = split(whole, part, dim=0)
    again = join(rows, part, dim=0)
    (grad,) = torch.autograd.grad(again, rows, torch.ones_like(again))
    return rank_in(part), across, rows, again, grad


@pytest.mark.parametrize("name", ["outer", "inner"])
def test_a_dimension_of_a_larger_mesh(name):
    for rank, across, rows, again, grad in ranks.run((2, 2), within_a_line, name):
        first = 10 * across
        assert rows.tolist() == [first + rank, first + 3 - rank]
        assert again.tolist() == [first, first + 1, first + 2, first + 3] and grad.tolist() == [2.0, 2.0]


def sums_of_halves(mesh):
    x = torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.full((2 * mesh.size(),), [256.0, 1.0, 1.0, 1.0][rank_in(mesh)], dtype=torch.bfloat16)
    return torch.autograd.grad(join(x, mesh, dim=0), x, grad)[0]


@pytest.mark.parametrize("shape", [(4,), (2, 2)], ids=str)
def test_gradients_in_half_precision_are_summed_in_fp32(shape):
    """256 + 1 is 256 in bf16."""
    for found in ranks.run(shape, sums_of_halves):
        assert found.dtype == torch.bfloat16 and found.tolist() == [260.0, 260.0]  # of 259, the nearest


def turned(mesh):
    """A mesh of the same processes in another order: a rank is a place in the mesh, whatever PyTorch's group
    calls it."""
    other = type(mesh)("cpu", torch.tensor([2, 0, 3, 1]))
    whole = torch.arange(16.0, requires_grad=True)
    part = split(whole, other, dim=0)
    again = join(part, other, dim=0)
    assert torch.equal(again, whole)
    group = group_along(other, 0)
    received = torch.empty(1)
    messages = [((group.rank + 1) % 4, torch.tensor([float(group.rank)]))], [((group.rank - 1) % 4, received)]
    Channel(group, "ring", torch.device("cpu")).start(*messages, 1).wait()
    names = rank_in(other), host_group(other).rank, group.rank, group.world[group.rank]
    (grad,) = torch.autograd.grad(again, part, whole.detach() * (group.rank == 3))
    with (
        pytest.raises(ValueError, match="x: 0 on ranks 0-1, 3; 1 on rank 2"),
        agreed(host_group(other), "") as x,
    ):
        x["x"] = word(int(names[0] == 2))
    return names, part, grad, received.item()


def test_a_rank_is_a_place_in_the_mesh():
    for process, (names, part, grad, received) in enumerate(ranks.run((4,), turned)):
        place = [1, 3, 0, 2][process]
        assert names == (place, place, place, process)
        assert part.tolist() == [2.0 * place, 2 * place + 1, 14 - 2 * place, 15 - 2 * place]
        assert torch.equal(grad, part)  # which rank 3 has alone
        assert received == (place - 1) % 4


def messages(mesh):
    """Everything to everybody in two steps, the second without a message from rank 0."""
    group = group_along(mesh, 0)
    channel = Channel(group, "ring", torch.device("cpu"))
    others = [rank for rank in range(group.size) if rank != group.rank]
    buffers = {rank: (torch.empty(2, dtype=torch.bfloat16), torch.empty(3, 2)) for rank in others}
    mine = torch.full((2,), group.rank).bfloat16(), torch.full((2, 3), float(group.rank)).t()
    sends = [(rank, x) for rank in others for x in mine]
    first = channel.start(sends, [(rank, x) for rank in others for x in buffers[rank]], 1)
    right = [(rank, torch.empty(1)) for rank in others if rank]
    second = channel.start([(rank, torch.ones(1)) for rank in others if group.rank], right, 2)
    none = channel.start([(others[0], torch.empty(0))], [(others[0], torch.empty(0, 3))], 3)
    for pending in (none, second, first, first):
        pending.wait()
    return buffers, channel.sent, channel.received


def test_messages_arrive_and_are_counted():
    for rank, (buffers, sent, received) in enumerate(ranks.run((4,), messages)):
        for other, (half, single) in buffers.items():
            assert half.tolist() == [other, other] and (single == other).all()
        assert sent == 3 * (4 + 24 + 4 * (rank > 0))
        assert received == 3 * (4 + 24) + 4 * (3 - (rank > 0))


def checks(mesh, mistake):
    x = torch.zeros(1, 2, 24, 4)
    group = group_along(mesh, 0)
    calls = {
        "length": lambda: split(x[:, :, :20], mesh),
        "order": lambda: split(x, mesh, order="striped"),
        "dim": lambda: split(x, mesh, dim=4),
        "no tensor": lambda: split([1, 2], mesh),
        "no mesh": lambda: positions(24, "cuda"),
        "no length": lambda: positions(-6, mesh),
        "rows": lambda: join(x[:, :, :3], mesh),
        "itself": lambda: Channel(group, "ring", torch.device("cpu")).start([(group.rank, x)], [], 2),
        "strides": lambda: Channel(group, "ring", torch.device("cpu")).start(
            [], [((group.rank + 1) % 4, x.transpose(1, 2))], 2
        ),
        "three dimensions": lambda: check_mesh(_mesh(mesh, torch.arange(4).reshape(2, 2, 1))),
    }
    calls[mistake]()


def _mesh(mesh, ranks_of_it):
    return type(mesh)("cpu", ranks_of_it, mesh_dim_names=("data", "outer", "inner"))


MISTAKES = {
    "length": r"x.shape\[-2\]=20 must be a multiple of 8, two chunks a rank .*: pad the sequence to 24",
    "order": r"order='striped' must be one of",
    "dim": r"dim=4 is no dimension of x, whose shape is \(1, 2, 24, 4\)",
    "no tensor": r"x=\[1, 2\] must be a tensor",
    "no mesh": r"mesh='cuda' must be a torch.distributed.device_mesh.DeviceMesh, as init_device_mesh\(",
    "no length": r"length=-6 must be an int, at least 0",
    "rows": r"x.shape\[-2\] \* ranks=12 must be a multiple of 8",
    "itself": r"ring, step 2: no message between rank 0 of 4 and 0",
    "strides": r"the buffer \(1, 24, 2, 4\) for rank 1 must be contiguous",
    "three dimensions": r"has 3 dimensions and must have one or two: .* such as mesh\['inner'\]",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_does_not_fit_is_refused_on_every_rank(mistake):
    found = ranks.errors((4,), checks, mistake)
    assert all(type(error) is ValueError for error in found)
    with pytest.raises(ValueError, match=MISTAKES[mistake]):
        raise found[0]


def outside(mesh):
    """On four processes; the mesh has two of them."""
    part = type(mesh)("cpu", torch.arange(2))
    if mesh.get_rank() < 2:
        return split(torch.arange(4), part, dim=0)
    with pytest.raises(ValueError, match=r"has the processes \[0, 1\], and this one is [23]"):
        split(torch.arange(4), part, dim=0)


def test_a_process_that_is_not_in_the_mesh():
    assert [x.tolist() for x in ranks.run((4,), outside)[:2]] == [[0, 3], [1, 2]]


def distributed_tensor(mesh):
    from torch.distributed.tensor import DTensor, Replicate

    x = DTensor.from_local(torch.zeros(2, 4), mesh, [Replicate()])
    with pytest.raises(
        ValueError, match=r"x is a DTensor and must be a plain tensor: give x.full_tensor\(\)"
    ):
        split(x, mesh)


def test_a_dtensor_is_told_what_to_be():
    ranks.run((1,), distributed_tensor)
