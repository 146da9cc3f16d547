"""Planted bugs of float64, of what plain PyTorch keeps for the backward, and of PyTorch's own call."""

from __future__ import annotations

from .mutation import Mutation, tests

APPEND = "kernels/tilewise/pytorch/append.py"
DROPOUT = "kernels/tilewise/parts/dropout.py"
IMPLEMENTATION = "kernels/tilewise/plan/implementation.py"
OPS = "kernels/tilewise/pytorch/ops.py"
PLAIN = "kernels/tilewise/pytorch/plain.py"
REQUEST = "kernels/tilewise/plan/request.py"
RULES = "kernels/tilewise/plan/rules/implementations.py"
SDPA = "kernels/tilewise/scaled_dot_product.py"

# fmt: off
MUTATIONS = (
    Mutation("float64: computed in fp32", PLAIN,
             "return_lse=True, dtype=computed_in(q.dtype)", "return_lse=True, dtype=torch.float32",
             tests("float64", "every_feature[2-softcap]")),
    Mutation("float64: handed to the kernels", IMPLEMENTATION,
             "if request.q.dtype == torch.float64:", "if False:",
             tests("float64", "who_answers[True]")),
    Mutation("float64: cast by autocast", REQUEST,
             "x.dtype not in (torch.float64, FP8)", "x.dtype != FP8",
             tests("float64", "autocast_leaves_it_alone")),
    Mutation("float64: rows turned in fp32", APPEND,
             "turning.to(computed_in(x.dtype))", "turning.float()",
             tests("float64", "packed_jagged_and_cached")),
    Mutation("float64: lse of a graph in fp32", OPS,
             "lse = q.new_empty(q.shape[:3], dtype=computed_in(q.dtype))",
             "lse = q.new_empty(q.shape[:3], dtype=torch.float32)",
             tests("float64", "compiled[False]")),
    Mutation("plain: scores of every block kept", PLAIN,
             "if several and can_run_again(request)", "if False and can_run_again(request)",
             tests("plain_memory", "a_training_step_is_linear_in_length[score]")),
    Mutation("plain: scores of every sequence kept", PLAIN,
             "len(parts) > 1 or batch is not None", "len(parts) > 1",
             tests("plain_memory", "scores_of_one_sequence_at_a_time")),
    Mutation("plain: what lse alone does not use stays", PLAIN,
             "return Tied.apply(*(compute or run_block)(request, block))",
             "return (compute or run_block)(request, block)",
             tests("plain_memory", "a_training_step_is_linear_in_length[lse]")),
    Mutation("plain: changed tensors unnoticed", PLAIN,
             "x._version != version", "x._version < version",
             tests("plain_memory", "a_tensor_that_has_changed_since_is_noticed[bias]")),
    Mutation("plain: hooks that are forbidden", PLAIN,
             "return torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() is None",
             "return True",
             tests("plain_memory", "within_hooks_on_saved_tensors")),
    Mutation("strict: a graph of plain PyTorch let through", RULES,
             "torch.compiler.is_compiling() or (r.needs", "(r.needs",
             tests("strict", "plain_pytorch_is_refused_in_a_graph")),
    Mutation("dropout: an infinite factor where all is dropped", DROPOUT,
             "1.0 / (1.0 - self.p) if self.p < 1 else 0.0", "1.0 / (1.0 - self.p)",
             tests("dropout", "all_pairs_dropped")),
    Mutation("sdpa: a mask in autocast's dtype refused", SDPA,
             "if not casts and attn_mask", "if attn_mask",
             tests("sdpa_arguments", "both_answer[autocast, a mask in its dtype]")),
    Mutation("sdpa: jagged and causal, the mask forgotten", SDPA,
             'mask=Causal("top_left") if is_causal else None', "mask=None",
             tests("sdpa_arguments", "jagged_tensors")),
)
# fmt: on
