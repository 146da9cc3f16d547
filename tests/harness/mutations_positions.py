"""Planted bugs in where queries stand among the keys; see `mutations`."""

from __future__ import annotations

from .mutation import Mutation, tests

ALIGNED = "kernels/tilewise/parts/aligned.py"
BOUNDS = "kernels/tilewise/parts/bounds.py"
DOCUMENTS = "kernels/tilewise/parts/masks/documents.py"
OPTIONS = "kernels/tilewise/plan/rules/options.py"
PLAIN = "kernels/tilewise/pytorch/plain.py"
SCORES = "reference/tilewise_reference/scores.py"
SEQUENCES = "kernels/tilewise/parts/sequences.py"

# fmt: off
MUTATIONS = (
    Mutation("positions: the first sequence's for all", SEQUENCES,
             "tl.load(shift_args[0] + batch.to(tl.int64) * shift_args[1])", "tl.load(shift_args[0])",
             tests("positions", "the_last_query_at_the_last_key_of_a_cache[causal-portable]")),
    Mutation("positions: far ones wrap around", SEQUENCES,
             "tl.minimum(tl.maximum(shift, -(1 << 29)), 1 << 29).to(tl.int32)", "shift.to(tl.int32)",
             tests("positions", "further_than_32_bits[window-1]", "further_than_32_bits[causal-1]")),
    Mutation("positions: table's gradient as if sequences stood alike", SCORES,
             "x.sum_to_size(of_pair.shape[0], *x.shape[1:])", "x.sum(dim=0, keepdim=True)",
             ("tests/reference/test_gradients.py::test_positions_of_each_sequence[table]",)),
    Mutation("positions: those of the host from the first row's", BOUNDS,
             "on_host(shift).clamp(-POSITIONS, POSITIONS)[..., None, None]",
             "on_host(shift).flatten()[0].clamp(-POSITIONS, POSITIONS)",
             tests("bounds", "bounds_are_those_of_the_device_function[causal]")),
    Mutation("positions: any number taken for the top left", PLAIN,
             "elif first != 0:", "elif first < 0:",
             tests("positions", "what_the_fused_kernel_of_pytorch_answers[1-None]")),
    Mutation("positions: a corner that is not clear remembered as clear", ALIGNED,
             "return super().looks(), self.follows_the_default()", "return super().looks()",
             tests("positions", "what_is_remembered_as_clear_is_told_from_what_is_not[clear0-unclear0]")),
    Mutation("positions: padding on the left refused too", OPTIONS,
             'mask.side == "right" and q_len != kv_len', "q_len != kv_len",
             tests("positions", "a_corner_beside_padding_must_be_said[Causal-tensor-3]")),
    Mutation("positions: keys of other documents taken for the same", OPTIONS,
             "isinstance(mask, Documents) and not mask.are_alike", "False",
             tests("positions", "documents_with_keys_of_other_lengths")),
    Mutation("documents: rows behind the last offset see one another", DOCUMENTS,
             "NO_DOCUMENT = (-1, -2)", "NO_DOCUMENT = (-1, -1)",
             tests("positions", "documents_from_offsets")),
)
# fmt: on
