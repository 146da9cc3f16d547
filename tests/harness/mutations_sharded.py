"""Planted bugs in calls of DTensors, and in modules that are cut over devices."""

from __future__ import annotations

from .mutation import Mutation, tests

DOCUMENTS = "kernels/tilewise/parts/masks/documents.py"
DTENSORS = "kernels/tilewise/parts/dtensors.py"
OWN_BIAS = "kernels/tilewise/parts/scores/own_bias.py"
PLACE = "kernels/tilewise/parts/place.py"
REQUEST = "kernels/tilewise/plan/request.py"
RULES = "kernels/tilewise/plan/rules/sharding.py"
SHARDED = "kernels/tilewise/pytorch/sharded.py"
SHARDS = "kernels/tilewise/plan/shards.py"
CHECKS = "kernels/tilewise/plan/checks.py"
NN = "kernels/tilewise/nn/sharded.py"
PROJECTED = "kernels/tilewise/nn/projected.py"
PARALLEL = "kernels/tilewise/distributed/tensor_parallel.py"
WEIGHTS = "kernels/tilewise/nn/weights.py"


def cut(*names: str) -> tuple[str, ...]:
    return tests("sharded", *[f"a_call_that_is_cut_gives_what_one_device_gives[{name}]" for name in names])


def cached(*names: str) -> tuple[str, ...]:
    start = "new_rows_land_in_the_shards_of_a_cache_and_are_attended_to"
    return tests("sharded", *[f"{start}[{name}]" for name in names])


def refused(name: str) -> tuple[str, ...]:
    return tests("sharded", f"what_cannot_be_is_said_and_why_not_says_it_too[{name}]")


def module(name: str) -> tuple[str, ...]:
    return tests("sharded_nn", f"a_module_that_is_cut_by_heads_trains_as_on_one_device[{name}]")


WHOLE_MASKS = tests("sharded", "masks_and_scores_are_those_of_the_whole_call")

# fmt: off
MUTATIONS = (
    # ---- Who has which heads
    Mutation("shards: chunks as even as can be", SHARDS,
             "each = -(-(stop - start) // count)", "each = (stop - start) // count or 1",
             cut("sequences, not as many on each rank")),
    Mutation("shards: key heads stay cut where groups are", SHARDS,
             "a == b or (have[i // per][0] <= a and b <= have[i // per][1])", "True",
             tests("sharded", "each_query_head_finds_its_key_head_on_its_rank[counts2]")),
    Mutation("shards: key heads by their numbers in the whole", SHARDS,
             "return [head // group - first for head", "return [head // group for head",
             tests("sharded", "each_query_head_finds_its_key_head_on_its_rank[counts1]")),
    Mutation("shards: what q does not say, nobody says", SHARDS,
             "zip(q.placements, k.placements, v.placements, strict=True)", "zip(q.placements)",
             cut("heads, of keys alone")),
    Mutation("shards: each rank keeps the seed that it drew", REQUEST,
             "return agreed(seed, q.device_mesh) if is_dtensor(q) else seed", "return seed",
             tests("sharded", "ranks_agree_on_the_seed_that_they_draw")),
    # ---- A rank's part
    Mutation("sharded: what several ranks have keeps its own gradient", SHARDED,
             "Partial() if kept.is_replicate() and axis is not None else kept", "kept",
             cut("heads", "heads, keys on all ranks")),
    Mutation("sharded: ranks that compute the same add up", SHARDED,
             "Partial() if kept.is_replicate() and axis is not None else kept",
             "Partial() if kept.is_replicate() else kept",
             cut("the same on some ranks")),
    Mutation("sharded: the part's place is not told", SHARDED,
             "if not asks_where(request) or", "if True or", cut("heads")),
    Mutation("sharded: the place of its heads alone", SHARDED,
             "first_batch=batch[0], first_head", "first_head", cut("sequences, not as many on each rank")),
    Mutation("shards: dropout asks for no place", SHARDS,
             "return request.dropout is not None or not all(alike)", "return not all(alike)",
             tests("sharded", "ranks_agree_on_the_seed_that_they_draw")),
    Mutation("shards: a corner for each sequence asks for no place", SHARDS,
             "type(leaf) in ALIKE and not leaf.tensors()", "type(leaf) in ALIKE", WHOLE_MASKS),
    Mutation("sharded: a sink that is plain, from its first head", SHARDED,
             "return x[slice(*heads)] if isinstance(x, Tensor) else x",
             "return x[: heads[1] - heads[0]] if isinstance(x, Tensor) else x",
             cached("heads-torch")),
    Mutation("sharded: a sink that is a DTensor, whole on each rank", SHARDED,
             "return placed(x, shards, {HEADS: 0})", "return placed(x, shards, {})", cut("heads")),
    Mutation("sharded: taken key heads from behind", SHARDED,
             "return x.index_select(1, torch.tensor(taken, device=x.device))",
             "return x.index_select(1, torch.tensor(taken[::-1], device=x.device))",
             cut("a rank's heads share key heads unevenly")),
    Mutation("sharded: tensors in tuples stay DTensors", SHARDED,
             "if isinstance(value, tuple):", "if False:", WHOLE_MASKS),
    Mutation("sharded: all of a bias on each rank", SHARDED,
             "if dim >= 0 and sizes[dim] > 1}", "if False}",
             tests("sharded", "a_bias_stays_in_parts[torch]")),
    Mutation("own bias: a part is read as if it were the whole", OWN_BIAS,
             "batch - args[1], head - args[2]", "batch, head",
             tests("sharded", "a_bias_stays_in_parts[portable]")),
    Mutation("sharded: a rank without heads takes no part in gradients", SHARDED,
             "out = part.q.new_zeros(*part.q.shape[:3], part.v.shape[3]) + zero",
             "out = part.q.new_zeros(*part.q.shape[:3], part.v.shape[3]) + 0 * part.q.sum()",
             cut("fewer sequences than ranks", "heads in chunks that do not meet, a rank without")),
    Mutation("dtensors: out in the order of its dimensions", DTENSORS,
             "key=lambda d: (x.stride(d), -d)", "key=lambda d: -d",
             tests("sharded", "out_has_the_order_of_memory_that_q_has")),
    Mutation("documents: ids stay with their ranks", DOCUMENTS,
             "ids = whole_of(ids)\n        kv_ids", "kv_ids", WHOLE_MASKS),
    # ---- Caches
    Mutation("sharded: lengths of the first sequences", SHARDED,
             "whole_of(cache.kv_lens)[each]", "whole_of(cache.kv_lens)[: batch[1] - batch[0]]",
             cached("sequences-torch", "a whole cache, its new rows cut-torch")),
    Mutation("sharded: pages of the first sequences", SHARDED,
             "whole_of(pages.table)[each]", "whole_of(pages.table)[: batch[1] - batch[0]]",
             cached("pages on all ranks, sequences-torch")),
    Mutation("sharded: pages cut as if they were sequences", SHARDED,
             "kv_dims = {HEADS: 1} if is_paged else ROWS", "kv_dims = ROWS",
             cached("pages on all ranks, sequences-torch")),
    Mutation("sharded: new rows as they came, and not as the cache lies", SHARDED,
             "new = [x.redistribute(placements=placements).to_local()", "new = [x.to_local()",
             cached("queries on all ranks, the cache cut-torch")),
    Mutation("sharded: new rows are not counted", SHARDED,
             "return replace(everybody, cache=everybody.cache._replace(kv_lens=lens))", "return everybody",
             cached("heads-torch")),
    Mutation("sharded: queries are not turned", SHARDED,
             "part = turn(part, table)", "pass", cached("heads-torch")),
    Mutation("place: a part's lengths for those of the whole", PLACE,
             "if cache is not None and part.batch != self.batch:", "if False:",
             cached("sequences-portable")),
    # ---- What is refused
    Mutation("sharding: parts of queries pass", RULES,
             "or dim in (BATCH, HEADS):", "or dim in (BATCH, HEADS, SEQUENCE):",
             refused("queries in parts")),
    Mutation("sharding: packed dimensions as they are inside", RULES,
             "return (0, 1, 0, 2)[dim] if r.packing is not None else dim", "return dim",
             tests("sharded", "packed_tokens_in_parts_are_refused_in_the_dimensions_that_were_given")),
    Mutation("sharding: plain parameters pass", RULES,
             "elif x.requires_grad and torch.is_grad_enabled():", "elif False:",
             refused("plain slopes that are trained")),
    Mutation("sharding: any mesh will do", RULES,
             "if x.device_mesh != mesh]", "if False]", refused("two meshes")),
    Mutation("sharding: a cache may be where another rank needs it", RULES,
             "elif dim is not None and dim != has:", "elif False:",
             tests("sharded", "a_cache_that_cannot_stay_where_it_is_is_refused[another rank's heads]")),
    Mutation("checks: a call vouches for others with other placements", CHECKS,
             "r.place, sharding.looks(r),", "r.place,",
             tests("sharded", "a_call_that_was_right_does_not_vouch_for_one_with_other_placements")),
    # ---- Modules
    Mutation("nn: few key heads stay cut", NN,
             "    if heads % ranks == 0:\n        return found", "    if True:\n        return found",
             module("one key head-4")),
    Mutation("nn: a projection that is cut across q, k and v passes", NN,
             "    if is_cut:\n        raise ValueError(\n            f\"{parts}.weight is cut",
             "    if False:\n        raise ValueError(\n            f\"{parts}.weight is cut",
             tests("sharded_nn", "every_rank_says_what_cannot_be[fused_and_cut_without_a_plain_tensor]")),
    Mutation("nn: positions of all sequences on each rank", NN,
             "rows = [Shard(0) if dim_of(each) == 0 else Replicate() for each in x.placements]",
             "rows = everywhere",
             tests("sharded_nn", "rotary_turns_the_sequences_that_a_rank_has")),
    Mutation("nn: split projections share memory", WEIGHTS,
             "make_linear(weight.clone(), None if bias is None else bias.clone())",
             "make_linear(weight, bias)",
             tests("sharded_nn", "projections_split_and_fuse_without_a_change")),
    Mutation("nn: fused again in another order", PROJECTED,
             "linears = {part: getattr(self, part) for part in parts}",
             "linears = {part: getattr(self, part) for part in reversed(parts)}",
             tests("sharded_nn", "projections_split_and_fuse_without_a_change")),
    Mutation("tensor_parallel: a sink on every device", PARALLEL,
             "Shard(0) if x.dim() else Replicate()", "Replicate()", module("cross-2")),
    Mutation("tensor_parallel: heads that do not divide", PARALLEL,
             "if module.heads % mesh.size():", "if False:",
             tests("sharded_nn", "every_rank_says_what_cannot_be[heads_between_ranks]")),
    Mutation("tensor_parallel: rows that come in parts are taken for all", PARALLEL,
             "input_layouts=(self.input_layouts,) * count,", "input_layouts=(Replicate(),) * count,",
             tests("sharded_nn", "rows_may_come_and_leave_in_parts")),
)
# fmt: on
