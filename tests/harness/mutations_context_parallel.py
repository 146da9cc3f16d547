"""Planted bugs in calls on parts of a larger one, and in what ranks make of them."""

from __future__ import annotations

from .mutation import Mutation, tests

PARTS = "kernels/tilewise/parts/place.py"
DROPOUT = "kernels/tilewise/parts/dropout.py"
BLOCKS = "kernels/tilewise/distributed/blocks.py"
CALLS = "kernels/tilewise/distributed/calls.py"
ROWS = "kernels/tilewise/distributed/rows.py"
WALK = "kernels/tilewise/distributed/walk.py"
SHARE = "kernels/tilewise/distributed/share.py"
HEADS = "kernels/tilewise/distributed/heads.py"
KNOWN = "kernels/tilewise/distributed/known.py"
ATTENTION = "kernels/tilewise/distributed/attention.py"

SEEN = tests("distributed_blocks", "blocks_are_those_of_pairs")
RANKS = tests("context_parallel", "ranks_are_one_device")


def part(features: str) -> tuple[str, ...]:
    return tests("place", f"parts_are_the_whole[{features}-portable]")


# fmt: off
MUTATIONS = (
    Mutation("place: an interval that stays where the whole's keys are", PARTS,
             "return lo - origin[3], hi - origin[3], whole", "return lo, hi, whole",
             part("intervals-blocks-user_score")),
    Mutation("place: pairs asked for by the part's rows", PARTS,
             "q_idx + origin[2], kv_idx + origin[3], batch % origin[4] + origin[0]",
             "q_idx, kv_idx + origin[3], batch % origin[4] + origin[0]",
             part("user_interval-tensor_scale")),
    Mutation("place: a score that takes its head for the whole's", PARTS,
             "s, batch % origin[4] + origin[0], head + origin[1]", "s, batch % origin[4] + origin[0], head",
             part("window-alibi")),
    Mutation("place: buckets by the part's distances", PARTS,
             "off = place.first_row - place.first_key", "off = 0", part("prefix-relative_position")),
    Mutation("place: the gradient of a table in its first rows", PARTS,
             "x[place.first_head : place.first_head + part.q_heads]", "x[: part.q_heads]",
             part("prefix-relative_position")),
    Mutation("place: the gradient of a bias at its first rows and keys", PARTS,
             "view.narrow(axis, first, size)", "view.narrow(axis, 0, size)",
             part("scattered_documents-bias")),
    Mutation("dropout: a part drops as if it began the sequence", DROPOUT,
             "q_idx + origin[2], kv_start + origin[3]", "q_idx, kv_start",
             part("causal_from_a_position-dropout-sink")),
    Mutation("blocks: a chunk of which the last row alone sees keys is not seen", BLOCKS,
             "sees = lo < hi", "sees = lo < hi - 1", SEEN),
    Mutation("blocks: full where a mask goes pair by pair", BLOCKS,
             "whole = torch.zeros_like(whole)", "pass", SEEN),
    Mutation("calls: keys side by side in memory taken for neighbours in the sequence", CALLS,
             "not (anywhere or chunks[0]", "not (True or chunks[0]", RANKS),
    Mutation("rows: the sum of a piece forgotten", ROWS,
             "(self.unit * LOG2E) + sum_log2)", "(self.unit * LOG2E))",
             tests("context_parallel", "huge_scores_are_joined_exactly")),
    Mutation("rows: a sink counts in every piece", ROWS,
             "torch.full_like(sink, -torch.inf)", "sink", RANKS),
    Mutation("walk: of the gradients of a chunk the last one counts", WALK,
             "total.rows(chunk)] += theirs", "total.rows(chunk)] = theirs", RANKS),
    Mutation("share: masks of pieces in which all count still have their place among the tensors", SHARE,
             "return slots[: end - of_masks] + slots[end:]", "return slots", RANKS),
    Mutation("heads: a head of keys that several ranks have takes one gradient", HEADS,
             "total[:, head] += part[:, i]", "total[:, head] = part[:, i]", RANKS),
    Mutation("heads: rows in the order of ranks", HEADS,
             "sorted((chunk, rank) for rank", "list((chunk, rank) for rank", RANKS),
    Mutation("known: what a mask held before it was changed", KNOWN,
             "v == now for", "True for",
             tests("distributed_blocks", "blocks_are_known_until_a_mask_changes")),
    Mutation("context parallel: temperatures of the first heads on all ranks", ATTENTION,
             "similarity.temperature[heads]", "similarity.temperature[: len(q_heads[mine])]", RANKS),
)
# fmt: on
