"""Planted bugs in tilewise.distributed: groups, messages, agreement, the parts of a sequence."""

from __future__ import annotations

from .mutation import Mutation, tests

AGREE = "kernels/tilewise/distributed/agree.py"
EXCHANGE = "kernels/tilewise/distributed/exchange.py"
FAULTS = "kernels/tilewise/distributed/faults.py"
GROUP = "kernels/tilewise/distributed/group.py"
HOSTS = "kernels/tilewise/distributed/hosts.py"
SEQUENCE = "kernels/tilewise/distributed/sequence.py"

PLACE = tests("distributed_sequence", "a_rank_is_a_place_in_the_mesh")
MESSAGES = tests("distributed_sequence", "messages_arrive_and_are_counted")
GRID = tests("distributed_sequence", "join_undoes_split[(2, 2)-contiguous]")
BESIDE = tests("distributed_faults", "hosts_whose_groups_have_no_gloo_get_it_once")
READ = tests("distributed_faults", "a_tensor_is_read_once_until_it_changes")

# fmt: off
MUTATIONS = (
    Mutation("group: ranks of a mesh column by column", GROUP,
             "coordinate(mesh), strict=True)", "coordinate(mesh)[::-1], strict=True)", GRID),
    Mutation("group: the other dimension of the mesh", GROUP,
             "if d == dim else place[d]", "if d != dim else place[d]", GRID),
    Mutation("group: a place in the mesh taken for a number in PyTorch's group", GROUP,
             "dist.get_group_rank(handle, process) for process in world", "range(len(world))", PLACE),
    Mutation("hosts: their group has PyTorch's own time-out", HOSTS,
             "handle.size(), timeout)", "handle.size(), dist.default_pg_timeout)", BESIDE),
    Mutation("hosts: they meet where groups are numbered by each rank for itself", HOSTS,
             "dist.ProcessGroupGloo(store, handle.rank(), handle.size(), timeout)",
             "dist.new_group([*group.world], use_local_synchronization=True)._get_backend(CPU)", BESIDE),
    Mutation("hosts: the first dimension of the mesh is gathered first", HOSTS,
             "in reversed(self.lines):", "in self.lines:", BESIDE),
    Mutation("hosts: words by PyTorch's numbers of ranks", HOSTS,
             "[found[member] for member in group.members]", "found", PLACE),
    Mutation("exchange: received bytes counted as those sent", EXCHANGE,
             "self.received += bytes_of(receives)", "self.received += bytes_of(sends)", MESSAGES),
    Mutation("exchange: elements for bytes", EXCHANGE, "x.numel() * x.element_size()", "x.numel()", MESSAGES),
    Mutation("exchange: nothing to send is sent", EXCHANGE, "if operations:", "if True:", MESSAGES),
    Mutation("exchange: strides are not sent, and not looked at", EXCHANGE,
             "x.detach().contiguous()) for rank, x in sends", "x.detach()) for rank, x in sends", MESSAGES),
    Mutation("exchange: results are not waited for", EXCHANGE,
             "                work.wait()", "                pass",
             tests("distributed_faults", "a_rank_that_is_gone_in_the_middle_of_a_ring[leaves there]")),
    Mutation("exchange: any of the ranks is blamed", EXCHANGE,
             "[self.peers[number]] if len(works) == len(self.messages)", "self.peers if self.peers",
             tests("distributed_faults", "a_rank_that_is_gone_in_the_middle_of_a_ring[leaves there]")),
    Mutation("exchange: a message to oneself", EXCHANGE,
             "if rank == group.rank or not 0 <= rank", "if not 0 <= rank",
             tests("distributed_sequence", "what_does_not_fit_is_refused_on_every_rank[itself]")),
    Mutation("faults: the next rank is blamed", FAULTS,
             "sorted({peer for peer in peers if", "sorted({peer + 1 for peer in peers if",
             tests("distributed_faults", "a_rank_that_never_calls[dies]")),
    Mutation("agree: a rank with an error of its own stays away", AGREE,
             "        own = error", "        raise",
             tests("distributed_faults", "a_rank_that_never_calls[leaves]")),
    Mutation("agree: the error of another rank hides one's own", AGREE,
             "            raise own from unanswered", "            raise",
             tests("distributed_faults", "a_rank_that_never_calls[dies]")),
    Mutation("agree: lengths are compared, and no words", AGREE,
             "if all(each == head for", "if all(each[DIGEST:] == head[DIGEST:] for",
             tests("distributed_faults", "ranks_that_differ[numbers-(4,)]")),
    Mutation("agree: errors of several kinds are of the first", AGREE,
             "if len(kinds) == 1 else", "if kinds else",
             tests("distributed_faults", "the_error_of_one_is_that_of_all")),
    Mutation("agree: masks that are combined have no contents", AGREE,
             "if isinstance(value, Mask) and value.parts() != (value,):", "if False:",
             tests("distributed_faults", "ranks_that_differ[documents-(4,)]")),
    Mutation("agree: contents of masks not compared", AGREE,
             "dict.fromkeys(word(x, contents=contents) for x", "dict.fromkeys(word(x) for x",
             tests("distributed_faults", "ranks_that_differ[lengths-(4,)]")),
    Mutation("agree: a tensor changed in place is not read again", AGREE,
             "stamp = (tensor._version, tensor.data_ptr())", "stamp = (0, tensor.data_ptr())", READ),
    Mutation("agree: a digest without a shape", AGREE,
             "{plain.dtype}{list(plain.shape)}", "{plain.dtype}", READ),
    Mutation("agree: memory read in another order than its elements'", AGREE,
             "tensor.detach().cpu().contiguous()", "tensor.detach().cpu()", READ),
    Mutation("agree: what a mask has worked out is read too", AGREE,
             "return own or list(tensors.values())", "return list(tensors.values())",
             tests("distributed_faults", "what_a_mask_has_worked_out_is_not_compared")),
    Mutation("join: the first dimension of the mesh is gathered first", SEQUENCE,
             "for group in reversed(groups):", "for group in groups:", GRID),
    Mutation("join: parts in the order of PyTorch's group", SEQUENCE,
             "[found[member] for member in group.members]", "found", PLACE),
    Mutation("join: gradients to ranks of PyTorch's group", SEQUENCE,
             "to_members[member] = sends[rank]", "to_members[rank] = sends[rank]", PLACE),
    Mutation("join: gradients of the own whole alone", SEQUENCE,
             "total += found[member]", "total = found[member]",
             tests("distributed_sequence", "join_undoes_split[(3,)-zigzag]")),
    Mutation("join: half precision summed in itself", SEQUENCE,
             "dtype=torch.promote_types(parts.dtype, torch.float32)", "dtype=parts.dtype",
             tests("distributed_sequence", "gradients_in_half_precision_are_summed_in_fp32")),
    Mutation("join: gradients along the last dimension of the mesh first", SEQUENCE,
             "for group in ctx.groups:", "for group in reversed(ctx.groups):", GRID),
    Mutation("split: the rows of the first rank", SEQUENCE,
             "for start, stop in chunks.rows(rank_in(mesh))]", "for start, stop in chunks.rows(0)]", GRID),
    Mutation("split: a wrong dimension counts around", SEQUENCE,
             "if not -x.dim() <= dim < x.dim():", "if x.dim() == 0:",
             tests("distributed_sequence", "what_does_not_fit_is_refused_on_every_rank[dim]")),
    Mutation("positions: those of another order", SEQUENCE,
             "rows = order_of(length, mesh.size(), order)", "rows = order_of(length, mesh.size())", GRID),
)
# fmt: on
