"""Planted bugs behind PyTorch's own call."""

from __future__ import annotations

from .mutation import Mutation, tests

ANSWER = "kernels/tilewise/drop_in/answer.py"
MODULES = "kernels/tilewise/drop_in/modules.py"
REBOUND = "kernels/tilewise/drop_in/rebound.py"
REPORT = "kernels/tilewise/drop_in/report.py"
SWITCH = "kernels/tilewise/drop_in/switch.py"
TEXT = "kernels/tilewise/drop_in/text.py"

# fmt: off
MUTATIONS = (
    Mutation("switch: nested regions answer twice", SWITCH,
             "return not any([isinstance(mode, Region)", "return True or any([isinstance(mode, Region)",
             tests("sdpa_switch", "nested_regions_answer_once")),
    Mutation("switch: a checkpoint repeats with PyTorch's attention", SWITCH,
             "if func is METHOD or func is BACKWARD or func is GRAD:", "if func is METHOD or func is GRAD:",
             tests("sdpa_switch", "a_checkpoint_repeats_what_it_did[False-function]")),
    Mutation("switch: a graph of the mode's own frame", SWITCH,
             "skip_code(Region.__torch_function__.__code__)", "pass",
             tests("sdpa_switch_compile", "the_modes_own_frame_is_no_graph")),
    Mutation("switch: enabled on top of what another mode will pop", SWITCH,
             "restack([*stack[:height], Enabled(), *stack[height:]])", "restack([*stack, Enabled()])",
             tests("sdpa_switch", "enabled_inside_another_mode")),
    Mutation("switch: enabled below the default device", SWITCH,
             "height = 1 if stack and is_default_device(stack[0]) else 0", "height = 0",
             tests("sdpa_switch", "the_default_device_stays_below")),
    Mutation("switch: disable ends the regions around", SWITCH,
             "if not isinstance(mode, Enabled)])", "if not isinstance(mode, Region)])",
             tests("sdpa_switch", "enable_and_disable")),
    Mutation("switch: enabled once more at each call", SWITCH,
             "if not any([isinstance(mode, Enabled) for mode in stack]):", "if True:",
             tests("sdpa_switch", "a_region_is_entered_once_by_enable")),
    Mutation("switch: subclasses taken for tensors", ANSWER,
             "if type(x) not in KNOWN and", "if not isinstance(x, KNOWN) and",
             tests("sdpa_switch", "all_else_is_answered_by_pytorch[a subclass]")),
    Mutation("switch: the math backend not left to PyTorch", ANSWER,
             "if only_math_is_allowed():", "if False:",
             tests("sdpa_switch", "the_math_backend_is_pytorchs_where_it_is_asked_for")),
    Mutation("switch: a seed drawn for a call that is passed on", ANSWER,
             "**without_drawing(call.q, arguments))\n", "**arguments)\n",
             tests("sdpa_switch", "a_refused_call_draws_what_pytorch_would_draw")),
    Mutation("switch: the stand-in for a seed used", ANSWER,
             "if request.dropout is not None:", "if False:",
             tests("sdpa_switch", "what_tilewise_supports_has_its_bits[dropout]")),
    Mutation("switch: the first reason alone", ANSWER,
             "tuple([str(violation) for violation in violations(request)]) or (str(error),)", "(str(error),)",
             tests("sdpa_switch", "every_reason_is_given")),
    Mutation("switch: heads of jagged sequences grouped unasked", ANSWER,
             "call.q.shape[1] != call.k.shape[1] and not given.enable_gqa", "False",
             tests("sdpa_switch", "jagged_heads_are_grouped_where_it_is_asked_for")),
    Mutation("switch: PyTorch's modules with PyTorch's attention", ANSWER,
             "rebound(MULTI_HEAD, scaled_dot_product_attention=attend, ", "rebound(MULTI_HEAD, ",
             tests("sdpa_switch_modules", "in_place_of_the_fast_paths[False-multi_head]")),
    Mutation("switch: weights counted as attention", REBOUND,
             "return bool(args[NEED_WEIGHTS] if", "return bool(None if",
             tests("sdpa_switch_modules", "weights_by_position")),
    Mutation("report: traced calls without their module", MODULES,
             "[*running_modules(), *traced[::-1]]", "running_modules()",
             tests("sdpa_switch_compile", "pytorchs_modules_and_their_paths[True]")),
    Mutation("report: names of modules that are gone", MODULES,
             "if found is None or found[0]() is not inner:", "if id(outer) not in map(id, _names):",
             tests("sdpa_report", "a_module_that_came_later")),
    Mutation("report: models kept alive", MODULES,
             "weakref.WeakKeyDictionary()", "{}  # type: ignore[assignment]",
             tests("sdpa_report", "models_are_not_kept_alive")),
    Mutation("report: entries without end", REPORT,
             "len(_calls) >= LIMIT", "False",
             tests("sdpa_report", "no_more_sizes_than_can_be_kept")),
    Mutation("report: modules of other models in one line", TEXT,
             'entry._replace(module=module, calls=0)', 'entry._replace(module=None, calls=0)',
             tests("sdpa_report", "the_table_keeps_models_apart")),
)
# fmt: on
