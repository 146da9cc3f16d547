"""Planted bugs in what stands between Transformers and tilewise, and in what looks at a model."""

from __future__ import annotations

from .mutation import Mutation, tests

ATTENTION = "kernels/tilewise/integrations/transformers/attention.py"
DOCTOR = "kernels/tilewise/tools/doctor/model.py"
KNOWN = "kernels/tilewise/integrations/transformers/known.py"
MASKS = "kernels/tilewise/integrations/transformers/masks.py"

# fmt: off
MUTATIONS = (
    Mutation("transformers: a window of one key too many", KNOWN,
             "windows=((given[0] - 1, None),)", "windows=((given[0], None),)",
             tests("transformers_masks", "same_pairs[window-square]")),
    Mutation("transformers: packed sequences run together", KNOWN,
             "Pattern(documents=(given[0],))", "Pattern()",
             tests("transformers_masks", "same_pairs[packed, causal-square]")),
    Mutation("transformers: remapped positions taken for those of one sequence", KNOWN,
             "if not found.documents or remapped.chunks", "if remapped.chunks",
             tests("transformers_masks", "remapped_positions_alone_are_not_taken_for_a_causal_mask")),
    Mutation("transformers: what is not recognised is left out", KNOWN,
             "Tagged):\n        return Pattern(unknown=(function,))", "Tagged):\n        return Pattern()",
             tests("transformers_masks", "an_unknown_function_becomes_a_tensor_and_says_so")),
    Mutation("transformers: the first key of a window's cache taken for key 0", MASKS,
             "shift = where.q_offset - where.kv_offset", "shift = where.q_offset",
             tests("transformers_masks", "same_pairs[causal-a cache of a window]")),
    Mutation("transformers: a buffer's end taken for the last key seen", MASKS,
             'return "bottom_right" if shift == where.kv_len - where.q_len else shift',
             'return "bottom_right"',
             tests("transformers_masks", "same_pairs[causal-a static cache]")),
    Mutation("transformers: chunks that start at the padding", MASKS,
             "(rows - first) // size * size + first", "rows // size * size",
             tests("transformers_masks", "same_pairs[chunks-square]")),
    Mutation("transformers: holes in the padding closed", MASKS,
             "(holes, torn)) if needed", "(holes, False)) if needed",
             tests("transformers_masks", "same_pairs[causal-square]")),
    Mutation("transformers: padding of other keys", MASKS,
             "attention_mask[:, where.kv_offset : where.kv_offset + where.kv_len]",
             "attention_mask[:, : where.kv_len]",
             tests("transformers_masks", "same_pairs[causal-a cache of a window]")),
    Mutation("transformers: the cap on what a bias has added", ATTENTION,
             "scores.append(Bias(position_bias))", "scores.insert(0, Bias(position_bias))",
             tests("transformers_calls", "scores")),
    Mutation("transformers: no sinks", ATTENTION,
             "sink=s_aux", "sink=None",
             tests("transformers", "logits_and_gradients[gpt-oss-torch]")),
    Mutation("transformers: a token that sees no cache", ATTENTION,
             'Causal("top_left") if causal and q_len > 1 else None', 'Causal("top_left") if causal else None',
             tests("transformers_calls", "masks_that_a_caller_made")),
    Mutation("transformers: keys packed as the queries are", ATTENTION,
             "kv_offsets=cu_seq_lens_k", "kv_offsets=None",
             tests("transformers_calls", "packed_sequences_by_their_offsets")),
    Mutation("transformers: an unknown argument is ignored", ATTENTION,
             "    if unknown:\n", "    if False:\n",
             tests("transformers_calls", "an_unknown_argument_to_the_model")),
    Mutation("doctor: calls of tilewise are not seen", "kernels/tilewise/api.py",
             "    for watch in watchers:\n        watch(request)\n    is_plain", "    is_plain",
             tests("doctor_model", "answered[tilewise's]")),
    Mutation("doctor: a call with weights is told of twice", DOCTOR,
             "        if frame.f_code in TOLD_OF:\n", "        if False:\n",
             tests("doctor_model", "multi_head_attention_beside_other_modes")),
    Mutation("doctor: dropout hides what is written out", DOCTOR,
             "(are_weights and given[0].numel() == result.numel())", "False",
             tests("doctor_model", "not_answered[written out]")),
    Mutation("doctor: other modes hide the attention of PyTorch's module",
             "kernels/tilewise/drop_in/answer.py",
             ", has_torch_function=none_has)", ")",
             tests("doctor_model", "multi_head_attention_beside_other_modes")),
)
# fmt: on
