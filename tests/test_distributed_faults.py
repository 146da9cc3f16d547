"""What goes wrong between ranks is an error on every one of them that names the cause: never a hang, never a
wrong number."""

import os
import re
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from harness import ranks
from tilewise import Causal, Documents, Padding, Softcap
from tilewise.distributed import agree, context_parallel_attention, join
from tilewise.distributed.agree import agreed, digest, word
from tilewise.distributed.exchange import Channel
from tilewise.distributed.faults import blaming
from tilewise.distributed.group import Group, rank_in
from tilewise.distributed.hosts import host_group

CPU = torch.device("cpu")
IDS = torch.tensor([0, 0, 1, 1])

# What the ranks are given, and what rank 2 is; how the error calls the one and the other.
DIFFERENT = {
    "dtype": (torch.zeros(2), torch.zeros(2).bfloat16(), r"torch.float32\[2\] .*", r"torch.bfloat16\[2\] .*"),
    "shape": (torch.zeros(2), torch.zeros(1, 3), r"torch.float32\[2\] .*", r"torch.float32\[1, 3\] .*"),
    "numbers": (torch.zeros(2), torch.ones(2), r"torch.float32\[2\] .*", r"torch.float32\[2\] .*"),
    "name": ("ring", "heads", "'ring'", "'heads'"),
    "mask": (Causal(), None, r"Causal\(\)", "None"),
    "lengths": (
        Padding(torch.tensor([3])),
        Padding(torch.tensor([2])),
        r"Padding\(tensor\[1\]\) of torch.int64\[1\] \(digest \w+\)",
        r"Padding.*",
    ),
    "documents": (
        Documents(IDS) & Causal(),
        Documents(IDS.flip(0)) & Causal(),
        r"\(Documents\(tensor\[4\]\) of torch.int64\[4\] \(digest \w+\), Causal\(\)\)",
        r"\(Documents.*, Causal\(\)\)",
    ),
    "score": ((Softcap(9.0),), (Softcap(8.0),), r"\(Softcap\(9.0\)\)", r"\(Softcap\(8.0\)\)"),
}


def differ(mesh, value, other):
    with agreed(host_group(mesh), "attention") as given:
        given["the same"] = word(Causal())
        given["argument"] = word(other if rank_in(mesh) == 2 else value, contents=True)


@pytest.mark.parametrize("shape", [(4,), (2, 2)], ids=str)
@pytest.mark.parametrize("what", DIFFERENT)
def test_ranks_that_differ(what, shape):
    value, other, its_words, other_words = DIFFERENT[what]
    found = ranks.errors(shape, differ, value, other)
    assert {type(error) for error in found} == {ValueError} and len(set(map(str, found))) == 1
    differs = rf"argument: {its_words} on ranks 0-1, 3; {other_words} on rank 2"
    assert re.fullmatch(rf"attention: all ranks must be given the same\n  {differs}", str(found[0]))
    ranks.run(shape, differ, value, value)  # and the processes go on


def given_otherwise(mesh, what):
    """A call of three ranks, of whom the last is given something else."""
    x, arguments = torch.zeros(1, 2, 4, 8), dict(mask=Documents(torch.arange(12) // 4), method="ring")
    if rank_in(mesh) == 2:
        if what == "q":
            x = x.double()
        elif what == "requires a gradient":
            x.requires_grad_()
        elif what == "mask":
            arguments["mask"] = Documents(torch.arange(12) // 3)
        else:
            arguments[what] = {"method": "all_gather", "order": "contiguous", "scale": 2.0}[what]
    context_parallel_attention(x, x, x, mesh=mesh, **arguments)


@pytest.mark.parametrize("what", ["q", "requires a gradient", "mask", "method", "order", "scale"])
def test_attention_of_ranks_that_differ(what):
    for error in ranks.errors((3,), given_otherwise, what):
        assert type(error) is ValueError
        assert re.search(rf"^  {what}: .* on ranks 0-1; .* on rank 2$", str(error), re.M), str(error)


def wrong_on_one(mesh):
    x = torch.zeros(1, 2, 3 + (rank_in(mesh) != 1), 8)
    context_parallel_attention(x, x, x, mesh=mesh)


def test_attention_that_one_rank_cannot_do():
    """An odd number of rows has no zig-zag."""
    found = ranks.errors((3,), wrong_on_one)
    assert all(type(error) is ValueError for error in found)
    assert "q_len=9 must be a multiple of 6" in str(found[1])
    assert {str(error) for error in found[::2]} == {
        f"context_parallel_attention: nothing is wrong on this rank, but rank 1: ValueError: {found[1]}"
    }


def different_calls(mesh):
    if rank_in(mesh):
        join(torch.zeros(1, 2, 4), mesh, order="contiguous")
    else:
        with agreed(host_group(mesh), "attention") as given:
            given["order"] = word("contiguous")


def test_ranks_that_call_different_functions():
    for error in ranks.errors((3,), different_calls):
        assert "call: attention on rank 0; join on ranks 1-2" in str(error)
        assert "x: not given on rank 0; torch.float32[1, 2, 4] on ranks 1-2" in str(error)
        assert "order:" not in str(error)


def unequal_join(mesh):
    join(torch.zeros(1, 2 if rank_in(mesh) else 4, 4), mesh)


def test_join_of_unequal_parts():
    for error in ranks.errors((3,), unequal_join):
        assert "x: torch.float32[1, 4, 4] on rank 0; torch.float32[1, 2, 4] on ranks 1-2" in str(error)


def fail(mesh, kinds):
    with agreed(host_group(mesh), "attention") as given:
        given["x"] = word(1)
        if kind := kinds[rank_in(mesh)]:
            raise kind(f"not with {rank_in(mesh)}")


@pytest.mark.parametrize(
    ("kinds", "kind", "said"),
    [
        (
            (None, ValueError, ValueError),
            ValueError,
            "ValueError: not with 1; rank 2: ValueError: not",
        ),
        ((None, NotImplementedError, None), NotImplementedError, "rank 1: NotImplementedError: not with 1"),
        ((None, MemoryError, None), RuntimeError, "rank 1: MemoryError: not with 1"),
        (
            (None, ValueError, TypeError),
            RuntimeError,
            "ValueError: not with 1; rank 2: TypeError: not",
        ),
    ],
    ids=str,
)
def test_the_error_of_one_is_that_of_all(kinds, kind, said):
    found = ranks.errors((3,), fail, kinds)
    for rank, (error, own) in enumerate(zip(found, kinds, strict=True)):
        assert type(error) is (own or kind)
        assert str(error) == f"not with {rank}" if own else said in str(error)


# ---- Ranks that are gone: in processes of their own


def hasty(mesh):
    """The same ranks in a group that waits for two seconds, however slow the machine is to start: they have
    just met."""
    dist.barrier(mesh.get_group(0))
    return type(mesh).from_group(dist.new_group(timeout=timedelta(seconds=2)), "cpu")


def attend(mesh, message, end):
    """A ring, there and back, of which rank 1 leaves before one of its messages, the 0th to the 5th."""
    x = torch.ones(1, 1, 2, 8, requires_grad=True)
    context_parallel_attention(x, x, x, mesh=mesh).sum().backward()
    mesh = hasty(mesh)
    if rank_in(mesh) == 1:
        count, start = iter(range(message)), Channel.start
        Channel.start = lambda *given: start(*given) if next(count, None) is not None else end(1)
    context_parallel_attention(x, x, x, mesh=mesh).sum().backward()


def run_out(_):
    raise MemoryError("no room for a message")


@pytest.mark.parametrize(
    ("message", "end"), [(0, run_out), (2, os._exit)], ids=["leaves there", "dies on the way back"]
)
def test_a_rank_that_is_gone_in_the_middle_of_a_ring(message, end):
    with ranks.Pool(3) as pool:
        found = pool.outcomes((3,), attend, message, end, limit=20)
    assert type(found[1][0]) is (MemoryError if end is run_out else ranks.RankError)
    for rank in (0, 2):
        error, text = found[rank]
        assert type(error) is RuntimeError, text
        said = rf"ring, step [12]: no answer to rank {rank} of 3 from (rank|one of ranks) .* after ([\d.]+) s"
        assert float(re.match(said, str(error))[2]) < 6
        assert "time-out of 2 s: it, or a rank that it waited for, died, left the call" in str(error)
        assert "direct cause of the following exception" in text  # PyTorch's own words
    if end is run_out:  # whoever waits for it; of one that dies, PyTorch may refuse all messages of a step
        assert "from rank 1 (of all processes: 1)" in str(found[2][0])


def never_there(mesh, end):
    mesh = hasty(mesh)
    if rank_in(mesh) == 0:
        return end(1)
    with agreed(host_group(mesh), "attention") as given:
        given["x"] = "1"
        if rank_in(mesh) == 2:
            raise ValueError("my own")


@pytest.mark.parametrize("end", [os._exit, bool], ids=["dies", "leaves"])
def test_a_rank_that_never_calls(end):
    with ranks.Pool(3) as pool:
        _, (error, _), (own, text) = pool.outcomes((3,), never_there, end, limit=20)
    assert (
        "attention, comparing what the ranks were given: no answer to rank 1 of 3 from one of ranks 0, 2"
        in str(error)
    )
    assert (type(own), str(own)) == (ValueError, "my own") and "no answer to rank 2" in text


def test_a_lack_of_memory_is_nobody_elses_fault():
    group = Group(None, 0, (0, 1), (0, 1), 2.0)
    with pytest.raises(torch.OutOfMemoryError, match=r"^so little$"), blaming(group, [1], "ring, step 1"):
        raise torch.OutOfMemoryError("so little")


# ---- Words


def test_a_tensor_is_read_once_until_it_changes(monkeypatch):
    reads = []
    string_at = agree.string_at
    monkeypatch.setattr(agree, "string_at", lambda *at: (reads.append(at), string_at(*at))[1])
    ids = torch.arange(6)
    first = digest(ids)
    assert digest(ids) == first and len(reads) == 1
    ids[5] = 4
    assert digest(ids) != first and len(reads) == 2
    ids[5] = 5
    assert (
        digest(ids)
        == first
        == digest(torch.arange(12)[:6])
        == digest(torch.arange(6).repeat_interleave(2)[::2])
    )
    others = [ids.int(), ids.reshape(2, 3), ids.flip(0), torch.arange(7), torch.arange(0)]
    assert len({first, *map(digest, others)}) == 6
    with torch.inference_mode():  # which counts no changes
        counted = torch.arange(3)
        before = digest(counted)
        counted[0] = 1
        assert digest(counted) != before


def test_what_a_mask_has_worked_out_is_not_compared():
    """Documents finds hulls of its ids: three numbers a row, which the ids say already."""
    assert (
        word(Documents(IDS), contents=True)
        == f"Documents(tensor[4]) of torch.int64[4] (digest {digest(IDS)})"
    )


def hosts_beside(mesh):
    """As where the mesh's groups carry tensors of GPUs alone."""
    dist.get_backend_config = lambda handle: "cuda:nccl"
    try:
        first, again = host_group(mesh), host_group(mesh)
        own = [group.handle._get_backend(CPU) for group, _ in first.lines]
        made = [gloo for _, gloo in first.lines]
        same = [gloo for _, gloo in again.lines]
        timeouts = [gloo.options._timeout.total_seconds() == group.timeout for group, gloo in first.lines]
        with pytest.raises(ValueError, match="x: 0 on ranks 0-1, 3; 1 on rank 2"), agreed(first, "") as x:
            x["x"] = word(int(rank_in(mesh) == 2))
        return made == same, any(a is b for a, b in zip(made, own, strict=True)), timeouts
    finally:
        dist.get_backend_config = get_backend_config


get_backend_config = dist.get_backend_config


@pytest.mark.parametrize("shape", [(4,), (2, 2)], ids=str)
def test_hosts_whose_groups_have_no_gloo_get_it_once(shape):
    """Also where the first process is in one group more than the others."""
    ranks.run((1,), host_group_of_one)
    assert ranks.run(shape, hosts_beside, limit=10) == 4 * [(True, False, [True for _ in shape])]


def host_group_of_one(mesh):
    assert host_group(mesh).gather(b"x", "") == [b"x"]
