"""Planted bugs in what stands behind PyTorch's own flash attention ops, and in the copy for a Hub."""

from __future__ import annotations

from .mutation import Mutation, tests

FLASH_IMPL = "kernels/tilewise/drop_in/flash_impl.py"
MAKE = ".ci/hub/make.py"
FLASH_STATE = "kernels/tilewise/drop_in/flash_state.py"
PASSES = "kernels/tilewise/plan/passes.py"

# fmt: off
MUTATIONS = (
    Mutation("flash impl: a backward that draws other pairs", FLASH_IMPL,
             "Dropout(dropout_p, seed_of(rng_state))", "Dropout(dropout_p, seed_of(rng_state) + 1)",
             tests("flash_impl", "forward_and_backward_drop_the_pairs_of_the_state[False]")),
    Mutation("flash impl: a backward that has forgotten the window", FLASH_IMPL,
             "is_causal, scale, *window, dropout\n    )", "is_causal, scale, None, None, dropout\n    )",
             tests("flash_impl", "dense[window-(18, 5)]")),
    Mutation("flash impl: lse of the wrong base", FLASH_STATE,
             "lse * LOG2E.value", "lse",
             tests("flash_impl", "dense[plain-(18, 5)]")),
    Mutation("flash impl: an infinite logarithm left to the kernels", FLASH_STATE,
             "(lse * LOG2E.value).masked_fill_(is_empty, 0.0)", "(lse * LOG2E.value)",
             tests("flash_impl", "an_infinite_lse_of_either_sign_is_a_row_that_sees_nothing")),
    Mutation("flash impl: strides of the kernel's own choice", FLASH_STATE,
             "    return torch.empty_like(given).copy_(x)", "    return x",
             tests("flash_impl", "results_are_what_the_meta_functions_promise[rows-dim outermost]")),
    Mutation("flash impl: a gradient that leaves out the used keys", FLASH_IMPL,
             "if named and trained and torch.is_grad_enabled():", "if False:",
             tests("flash_impl", "no_gradient_where_the_backward_is_not_told[alibi_slopes]")),
    Mutation("flash impl: slopes of the next sequence", FLASH_IMPL,
             "alibi_slopes.repeat_interleave(2, 0)", "alibi_slopes.repeat(2, 1)",
             tests("flash_impl", "slopes[True-(4, 2)]")),
    Mutation("flash impl: keys split as suits the chip, whatever is asked", FLASH_IMPL,
             "ceil_div(capacity, 16 * num_splits)) if num_splits else None",
             "ceil_div(capacity, 16 * num_splits)) if False else None",
             tests("flash_impl", "one_split_walks_all_keys")),
    Mutation("flash impl: out left as it was", PASSES,
             "empty_in_order_of(q, shape.value_dim, request.out_dtype) if out is None else out",
             "empty_in_order_of(q, shape.value_dim, request.out_dtype)",
             tests("flash_impl", "the_op_that_fills_out")),
    Mutation("flash impl: kernels that stay as long as their handle", FLASH_IMPL,
             "self.library._destroy()", "pass",
             tests("flash_registry", "a_handle_that_is_kept_keeps_no_kernel")),
    Mutation("flash impl: active from the import on", FLASH_IMPL,
             "    register_flash_attention_impl(NAME, register_fn=activate)",
             "    register_flash_attention_impl(NAME, register_fn=activate); KEPT = activate()",
             tests("flash_registry", "importing_makes_the_name_known_and_no_more")),
    Mutation("hub: imports that start one folder too deep", MAKE,
             'path.count("/") + 1', 'path.count("/")',
             tests("hub_copy", "a_moved_module")),
    Mutation("hub: ops in the namespace of another copy", MAKE,
             "repr(str(node.value).replace(PACKAGE, name, 1))", "repr(str(node.value))",
             tests("hub_copy", "the_same_files_give_the_same_name_and_each_backend_its_own")),
    Mutation("hub: another copy reached when a function is called", MAKE,
             "if any(ours(head) for head in heads):",
             "if any(ours(head) for head in heads) and node not in set(deferred(tree)):",
             tests("hub_copy", "what_would_break_is_found")),
    Mutation("hub: a package that nobody brings", MAKE,
             "elif not heads <= BROUGHT and node not in set(deferred(tree)):", "elif False:",
             tests("hub_copy", "what_would_break_is_found")),
    Mutation("hub: a name that says nothing of the backend", MAKE,
             '{PACKAGE}_{backend}_{', '{PACKAGE}_{',
             tests("hub_copy", "the_same_files_give_the_same_name_and_each_backend_its_own")),
    Mutation("hub: a copy without the tile table", MAKE,
             'DATA = ("plan/tile_table.json",)', "DATA = ()",
             tests("hub_copy", "the_same_files_give_the_same_name_and_each_backend_its_own")),
)
# fmt: on
