"""Planted bugs of second derivatives, forward mode and vmap."""

from __future__ import annotations

from .mutation import Mutation, tests

COSINE = "kernels/tilewise/plan/cosine.py"
DERIVATIVES = "kernels/tilewise/plan/derivatives.py"
DISPATCH = "kernels/tilewise/pytorch/dispatch.py"
DROPOUT = "kernels/tilewise/parts/dropout.py"
FORWARD = "kernels/tilewise/kernels/tangents/forward.py"
FUNCTIONS = "kernels/tilewise/pytorch/derivatives.py"
KEYS = "kernels/tilewise/kernels/tangents/keys.py"
MAPPED = "kernels/tilewise/pytorch/mapped.py"
PARAMETERS = "kernels/tilewise/kernels/tangents/parameters.py"
PLACE = "kernels/tilewise/parts/place.py"
ROWS = "kernels/tilewise/kernels/tangents/rows.py"
SCORES = "kernels/tilewise/kernels/tangents/scores.py"
SIMILARITY = "kernels/tilewise/parts/similarity.py"
SUMS = "kernels/tilewise/kernels/tangents/sums.py"
SOFTCAP = "kernels/tilewise/parts/scores/softcap.py"
TANGENTS = "kernels/tilewise/parts/scores/tangents.py"

EAGER = tests("transforms", "second_order[eager]")
USERS = tests("transforms", "second_derivatives_of_a_users_score")
DROPPED = tests("second", "second_derivatives[dot other_scale bias_modifier dropout bool_mask]")
PACKED = tests("second", "second_derivatives[packed_rows sink relative_position softcap positive_scale]")
COSINES = tests(
    "second", "second_derivatives[cosine_with_temperature tensor_scale user_score prefix expanded_layout]"
)
UNSEEN = tests("second", "what_nobody_sees_has_no_part_in_it")
RANKS = tests("sharded", "second_derivatives_are_those_of_one_device")
ONE_CALL = tests("transforms", "calls_that_are_mapped_are_one")


def derived(way: str) -> tuple[str, ...]:
    return tests("transforms", f"derivatives_of_every_kind[{way}]")


# fmt: off
MUTATIONS = (
    # ---- Scores and their tangents
    Mutation("tangents: of the keys left out", SCORES,
             "t = product(a_dot, b, PRECISION) + product(a, b_dot, PRECISION)",
             "t = product(a_dot, b, PRECISION)",
             EAGER),
    Mutation("tangents: in the unit of the forward", SCORES,
             "    if unit is not None:\n        t = t * unit\n", "",
             tests("second", "second_derivatives[blocks inner_strided_layout documents]")),
    Mutation("tangents: a parameter's own derivative left out", TANGENTS,
             "if MOVING[j][2] is not None:", "if False:",
             EAGER),
    Mutation("tangents: a parameter's tangent beyond its tensor", TANGENTS,
             "at_distance, args, parameter.derivative)", "at_pair, args, parameter.derivative)",
             PACKED),
    Mutation("tangents: second derivatives of the input alone", TANGENTS,
             "other = b if a == of else a if b == of else None", "other = b if a == b == of else None",
             EAGER),
    Mutation("tangents: a pair of names in one order", TANGENTS,
             "other = b if a == of else a if b == of else None", "other = b if a == of else None",
             USERS),
    Mutation("tangents: another modifier's second derivatives", TANGENTS,
             "if SECONDS[j][0] == i:", "if SECONDS[j][0] >= i:",
             EAGER),
    Mutation("softcap: its second derivative of the other sign", SOFTCAP,
             "return -2.0 / args[0]", "return 2.0 / args[0]",
             EAGER),
    Mutation("scale: no second derivative by input and scale", SIMILARITY,
             "return {(STATE, name): None for name in self.tensors()}", "return {}",
             EAGER),
    # ---- Kernels
    Mutation("tangent: out without that of the values", FORWARD,
             "o = products(round_to(drop(p, keep, dropout), v[0].dtype), v_dot, o, PRECISION)", "pass",
             derived("pushed")),
    Mutation("tangent: a sink stands still", FORWARD,
             "mean += tl.load(mean_ptr + rows_ptr + row)", "mean += 0.0 * row",
             derived("pushed")),
    Mutation("tangent: masked scores in the mean", FORWARD,
             "t = tl.where(kept, t, 0.0)", "t = t",
             UNSEEN),
    Mutation("tangent: values that nobody sees", FORWARD,
             "v, v_dot = where_rows(seen, v), where_rows(seen, v_dot)", "v = where_rows(seen, v)",
             UNSEEN),
    Mutation("second: dropout forgotten in the tangent of dP", SCORES,
             "p * (drop(dp_dot, keep, dropout) - delta_dot)", "p * (dp_dot - delta_dot)",
             DROPPED),
    Mutation("second: dropout forgotten in dV", KEYS,
             "round_to(drop(pT_dot, keep, dropout), do[0].dtype)", "round_to(pT_dot, do[0].dtype)",
             DROPPED),
    Mutation("second: dQ without the tangent of K", ROWS,
             "            dq = products(round_to(ds, k[0].dtype), k_dot, dq, PRECISION)\n", "",
             EAGER),
    Mutation("second: dK without the tangent of Q", KEYS,
             "                dk = products(round_to(dsT, q[0].dtype), q_dot, dk, PRECISION)\n", "",
             EAGER),
    Mutation("second: keys of one head of a group", KEYS,
             "for member in range(group):", "for member in range(1):",
             EAGER),
    Mutation("second: a parameter's derivative stands still", PARAMETERS,
             "            dt += ds * change\n", "",
             EAGER),
    Mutation("second: delta of lse forgotten", SUMS,
             "    if dlse_ptr is not None:", "    if False:",
             DROPPED),
    Mutation("second: delta's tangent without that of P", SUMS,
             "p * ((t - mean[:, None]) * dp + dp_dot)", "p * dp_dot",
             EAGER),
    Mutation("second: a sink's weight stands still", DERIVATIVES,
             "return -(p_dot * second.delta + p * second.delta_dot).sum((0, 2))",
             "return -(p * second.delta_dot).sum((0, 2))",
             EAGER),
    Mutation("second: a part's own bias read where the whole call has it", DERIVATIVES,
             "first if n == full else 0 for n, first, full in zip(", "first for n, first, full in zip(",
             RANKS),
    Mutation("second: a part asks a parameter's derivative as the whole call", DERIVATIVES,
             "derivative = moved(ask_score, found.derivative)", "derivative = found.derivative",
             RANKS),
    # ---- The cosine
    Mutation("cosine: unit rows whose own derivative is left out", COSINE,
             "return torch.where(are_long, moved * inverse, 0.0)", "return moved * 0.0",
             COSINES),
    Mutation("cosine: factors in the order of the other tensors", COSINE,
             "places = [*range(first, first + len(own)), *range(first), *range(count - behind, count)]",
             "places = [*range(count)]",
             COSINES),
    # ---- PyTorch
    Mutation("derivatives: of what arrives left out", FUNCTIONS,
             "d_out, d_lse = out if needs_do else None, lse if needs_dlse else None",
             "d_out, d_lse = None, lse if needs_dlse else None",
             EAGER),
    Mutation("derivatives: the tangent of what arrives left out", FUNCTIONS,
             "if do_dot is not None or dlse_dot is not None:", "if False:",
             derived("pushed_gradient")),
    Mutation("derivatives: gradients of tangents in the place of those of x", FUNCTIONS,
             "return None, *of_x[:3], None, None, *of_x[3:], *of_u",
             "return None, *of_u[:3], None, None, *of_u[3:], *of_u",
             derived("gradient_of_pushed")),
    Mutation("dispatch: tangents not looked for", DISPATCH,
             "if not is_plain_eager(request) or has_tangents(request):", "if not is_plain_eager(request):",
             derived("dual")),
    Mutation("dispatch: tangents of other tensors lost", DISPATCH,
             "tensors = [*request.qkv().values(), *[tensor for _, tensor in request.other_tensors]]",
             "tensors = [*request.qkv().values()]",
             tests("transforms", "a_tangent_of_a_parameter_alone")),
    # ---- vmap
    Mutation("vmap: masks of other sequences", PLACE,
             "return *self.origin, self.period or self.batch", "return *self.origin, 1",
             ONE_CALL),
    Mutation("vmap: dropout of other sequences", DROPOUT,
             "batch, head = batch % origin[4] + origin[0]", "batch, head = batch + origin[0]",
             ONE_CALL),
    Mutation("vmap: gradients of parameters of all calls", MAPPED,
             "if any(needs[3:]) or not saved_can_fold(dims[3:], words, given[2:]):",
             "if not saved_can_fold(dims[3:], words, given[2:]):",
             tests("transforms", "vmap[gradients of each]")),
    Mutation("vmap: packed sequences folded", MAPPED,
             "return not any_mapped(other_dims) and one_of(qkv, dims, words, tensors).shape.is_dense",
             "return not any_mapped(other_dims)",
             tests("transforms", "packed_sequences_are_mapped_one_by_one")),
    Mutation("vmap: tensors that are not mapped, once for all", MAPPED,
             "x.unsqueeze(axis).expand(*x.shape[:axis], size, *x.shape[axis:])", "x.unsqueeze(axis)",
             tests("transforms", "vmap[q]")),
)
# fmt: on
