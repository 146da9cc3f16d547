"""Planted bugs in Hopper's backward: who waits for whom, whose turn it is, what is cleaned and summed."""

from __future__ import annotations

from .mutation import Mutation, tests

FOLDER = "kernels/tilewise/kernels/hopper/backward/"
CLEANING = f"{FOLDER}cleaning.py"
CONSUMER = f"{FOLDER}consumer.py"
KERNEL = f"{FOLDER}kernel.py"
LAUNCH = f"{FOLDER}launch.py"
PRODUCER = f"{FOLDER}producer.py"
REDUCER = f"{FOLDER}reducer.py"
STEP = f"{FOLDER}step.py"
WALK = f"{FOLDER}walk.py"
FINISH = "kernels/tilewise/kernels/finish.py"
HOPPER = "kernels/tilewise/plan/rules/hopper.py"
IMPLEMENTATION = "kernels/tilewise/plan/implementation.py"
INSTRUCTIONS = "kernels/tilewise/kernels/hopper/instructions.py"
PASSES = "kernels/tilewise/plan/passes.py"

ORDERS = tests("hopper_backward_protocol", "every_order_gives_the_same_bits")
MANY = tests("hopper_backward_protocol", "programs_add_to_the_same_rows_in_the_order_of_their_keys")
TICKETS = tests("hopper_backward_protocol", "tickets_not_the_hardware_say_who_comes_first")
UNORDERED = tests("hopper_backward_protocol", "without_turns_the_order_decides_and_nobody_counts")
GROUPED = tests("hopper_backward", "dimensions[24-16-64]")
WIDE = tests("hopper_backward", "dimensions[128-128-128]")
BETWEEN = tests("hopper_backward", "a_window_wider_than_a_tile_has_full_tiles_between_cut_ones")
NAN_KEYS = tests("hopper_backward", "nan_in_keys_that_no_row_sees_reaches_no_gradient")
NAN_ROWS = tests("hopper_backward", "nan_in_rows_that_see_no_key")
NOT_TAKEN = tests("hopper_backward", "what_it_does_not_take_the_portable_backward_does")
COMPILED = "hopper_backward_compiled"

# fmt: off
MUTATIONS = (
    # ---- Who waits for whom
    Mutation("hopper backward: pieces of dQ too far apart", REDUCER,
             "column = warpgroup * plan.DQ_COLUMNS", "column = warpgroup * PIECE",
             tests("hopper_backward", "a_step_of_fewer_rows")),
    Mutation("hopper backward: dS read before the other warpgroup has written it", STEP,
             "    sync(plan.TOGETHER, BOTH)\n    dq_later", "    wait_for_role()\n    dq_later",
             ORDERS),
    Mutation("hopper backward: dS written without a fence", STEP,
             "place.stage * WARPGROUPS + WARPGROUP).store(ds_t)\n    fence_async_shared()\n",
             "place.stage * WARPGROUPS + WARPGROUP).store(ds_t)\n",
             GROUPED),
    Mutation("hopper backward: dQ written over what has not left", STEP,
             "    sync(plan.DQ_FREE + WARPGROUP, DQ_THREADS)\n",
             "    arrive(plan.DQ_FREE + WARPGROUP, DQ_THREADS)\n",
             ORDERS),
    Mutation("hopper backward: the reducer says too early that dQ has left", REDUCER,
             "            tma.store_wait(0)  # the copy engine has read them\n", "",
             ORDERS),
    Mutation("hopper backward: Q given back while dK is multiplied", STEP,
             "    dk = warpgroup_mma_wait(0, deps=[dk_later])\n    place = channels.q.release(place)\n",
             "    later = channels.q.release(place)\n    dk = warpgroup_mma_wait(0, deps=[dk_later])\n"
             "    place = later\n",
             ORDERS),
    Mutation("hopper backward: dO read before it has landed", STEP,
             "        channels.do.wait_full(place)\n    dp_later", "        pass\n    dp_later",
             ORDERS),
    Mutation("hopper backward: K read before it has landed", CONSUMER,
             "    mbarrier.wait(channels.landed.index(0), 0)\n", "",
             ORDERS),
    Mutation("hopper backward: K overwritten while the other warpgroup reads it", CONSUMER,
             "    sync(plan.TOGETHER, WARPGROUPS * WARPGROUP_THREADS)  # nobody multiplies by K any more\n",
             "",
             ORDERS),
    Mutation("hopper backward: the producer does not collect in the end", PRODUCER,
             "    channels.q.collect()\n", "",
             GROUPED),
    # ---- Whose turn it is
    Mutation("hopper backward: nobody waits for his turn", REDUCER,
             "    while had < rank:", "    while rank < 0:",
             MANY),
    Mutation("hopper backward: the turn passed on when dQ is read, not added", REDUCER,
             "    wait_added()\n    fence_async()\n    wait_for_role()",
             "    fence_async()\n    wait_for_role()",
             MANY),
    Mutation("hopper backward: the last turn is not passed on", REDUCER,
             "    if plan.IS_ORDERED:\n        pass_turn(before)\n", "",
             MANY),
    Mutation("hopper backward: the turn passed on without release", REDUCER,
             'gl.atomic_add(counter, 1, sem="release")', 'gl.atomic_add(counter, 1, sem="relaxed")',
             tests(COMPILED, "turns_are_passed_on_when_memory_has_the_sums")),
    Mutation("hopper backward: ranks from the first tile of all", REDUCER,
             "keys.kv_start // TILE_KV - start // TILE_KV", "keys.kv_start // TILE_KV",
             BETWEEN),
    Mutation("hopper backward: the hardware's numbers for tickets", KERNEL,
             "number = gl.atomic_add(tickets, 1)", "number = gl.program_id(0)",
             TICKETS),
    Mutation("hopper backward: always in turns", LAUNCH,
             "IS_ORDERED=deterministic,", "IS_ORDERED=True,",
             UNORDERED),
    Mutation("hopper backward: the first rows first", REDUCER,
             "            q_tile = last - 1 - step\n", "            q_tile = first + step\n",
             GROUPED),
    # ---- What is cleaned
    Mutation("hopper backward: rows that see none of the keys are not cleaned", CLEANING,
             "        copy_where(q, q, chunk, seen, LAYOUT)\n", "",
             NAN_ROWS),
    Mutation("hopper backward: their dO is not", CLEANING,
             "        copy_where(do, do, chunk, seen, LAYOUT)\n", "",
             NAN_ROWS),
    Mutation("hopper backward: keys before the range are not cleaned", CLEANING,
             "is_unclean = (keys.kv_start < start) | (", "is_unclean = (",
             NAN_KEYS),
    Mutation("hopper backward: keys behind the range are not cleaned", CLEANING,
             " | ((stop < kv_stop) & (stop < kv_len))", "",
             NAN_KEYS),
    Mutation("hopper backward: the product reads K as it came", STEP,
             "channels.k.index(which_k * WARPGROUPS + half)", "channels.k.index(half)",
             NAN_KEYS),
    Mutation("hopper backward: clean K overwritten while it is read", CLEANING,
             "    sync(plan.TOGETHER, BOTH)  # nobody reads the clean K of the last step any more\n", "",
             ORDERS + NAN_KEYS),
    # ---- What is summed
    Mutation("hopper backward: P of pairs that do not count", STEP,
             "        p_t = gl.where(kept, p_t, 0.0)\n", "        pass\n",
             GROUPED),
    Mutation("hopper backward: rows beyond the last count", STEP,
             " & (q_idx < q_len)[None, :]", "",
             tests("hopper_backward", "rows_beyond_the_last_have_no_part")),
    Mutation("hopper backward: no way back through the scores", STEP,
             "row[None, :], kv_row[:, None], plan.DERIVATIVES, score_args, 0",
             "row[None, :], kv_row[:, None], (), score_args, 0",
             tests("hopper_backward", "every_feature_that_is_taken[softcap]")),
    Mutation("hopper backward: the unit left out of dK", CONSUMER,
             "        dk = dk * unit[0]\n", "        pass\n",
             GROUPED),
    Mutation("hopper backward: the unit left out of dQ", FINISH,
             "        dq = scaled(dq, unit)\n", "        pass\n",
             GROUPED),
    Mutation("hopper backward: one query head of a group", CONSUMER,
             "    for member in range(group):\n", "    for member in range(1):\n",
             GROUPED),
    Mutation("hopper backward: cut tiles above the full ones left out", CONSUMER,
             "gl.where(part == 0, last, full_first)", "gl.where(part == 0, full_last, full_first)",
             BETWEEN),
    Mutation("hopper backward: both warpgroups make the same piece of dQ", STEP,
             "            k = k.slice(WARPGROUP * WIDTH, WIDTH, 1)", "            k = k.slice(0, WIDTH, 1)",
             WIDE),
    Mutation("hopper backward: pieces side by side that lie one below the other", REDUCER,
             "row += warpgroup * PIECE", "column = warpgroup * PIECE",
             GROUPED),
    # ---- Who answers
    Mutation("hopper backward: dimensions that do not fit are taken", HOPPER,
             "if max(dims) <= BACKWARD_COLUMNS:", "if max(dims) <= 2 * BACKWARD_COLUMNS:",
             NOT_TAKEN),
    Mutation("hopper backward: cosine similarity is taken", HOPPER,
             'if r.similarity != "cosine" and not isinstance(r.similarity, Cosine):', "if True:",
             NOT_TAKEN),
    Mutation("hopper backward: it answers without being asked for", IMPLEMENTATION,
             'if request.impl == "hopper" and not any(hopper_rules.backward_reasons(request)):',
             "if not any(hopper_rules.backward_reasons(request)):",
             NOT_TAKEN),
    Mutation("hopper backward: parameters get its own tile", PASSES,
             'square_tile(choose_tile(q, shape, "dkv") if in_hopper else tile, widest(shape))',
             "square_tile(tile, widest(shape))",
             tests("hopper_backward", "gradients_of_parameters_are_the_portable_kernels")),
    Mutation("hopper backward: dO is taken as it lies", LAUNCH,
             "descriptor(copyable(backward.do), tile.tile_q, columns)",
             "descriptor(backward.do, tile.tile_q, columns)",
             tests("hopper_backward", "a_gradient_that_is_broadcast_is_copied")),
)
# fmt: on
