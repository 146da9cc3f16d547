"""Planted bugs in the planner of calls that several ranks share: `tilewise explain --ranks`."""

from __future__ import annotations

from .mutation import Mutation, tests

FOLDER = "kernels/tilewise/tools/explain/ranks"
ADVICE = f"{FOLDER}/advice.py"
CHUNKS = f"{FOLDER}/chunks.py"
FINDINGS = f"{FOLDER}/findings.py"
LINK = f"{FOLDER}/link.py"
MEMORY = f"{FOLDER}/memory.py"
METHODS = f"{FOLDER}/methods.py"
PIECES = f"{FOLDER}/pieces.py"
TRAFFIC = f"{FOLDER}/traffic.py"
WAITING = f"{FOLDER}/waiting.py"
WHOLE = f"{FOLDER}/whole.py"

ALONE = "blocks_that_are_counted_together_are_counted_as_each_alone"

# fmt: off
MUTATIONS = (
    Mutation("planner: a rank's own keys sent", TRAFFIC,
             "return needed - torch.diag(needed.diagonal())", "return needed",
             tests("explain_ranks", "two_ranks_by_hand")),
    Mutation("planner: gradients as narrow as keys", METHODS,
             "sums = by_ring(needed, sizes.keys(rows, sizes.sums, kv_heads))",
             "sums = by_ring(needed, sizes.keys(rows, sizes.element, kv_heads))",
             tests("explain_ranks", "two_ranks_by_hand")),
    Mutation("planner: lse does not travel", METHODS,
             "(within - 1) * (q + keys + out + lse)", "(within - 1) * (q + keys + out)",
             tests("explain_ranks", "divided_heads_by_hand")),
    Mutation("planner: sent and received taken for each other", METHODS,
             "found.append(Share(sent, received, compute.sum(1)",
             "found.append(Share(received, sent, compute.sum(1)",
             tests("explain_ranks", "two_ranks_by_hand")),
    Mutation("planner: blocks full where one row sees all", CHUNKS,
             "covered = (lo.amax(2) <= start)", "covered = (lo.amin(2) <= start)",
             tests("explain_ranks", f"{ALONE}[ragged]")),
    Mutation("planner: calls put together that scores keep apart", CHUNKS,
             "if is_free(whole.request) and exists[FULL]:", "if exists[FULL]:",
             tests("explain_ranks", "full_blocks_are_called_together_where_the_run_does")),
    Mutation("planner: blocks full in which a mask is asked", CHUNKS,
             "classes[covered & ~whole.any(2)] = ASKED", "classes[covered & ~whole.any(2)] = FULL",
             tests("explain_ranks", "full_blocks_are_called_together_where_the_run_does")),
    Mutation("planner: keys of all heads read by one", PIECES,
             "heads = shape.kv_heads if count is keys_that_are_seen else shape.q_heads",
             "heads = shape.q_heads",
             tests("explain_ranks", f"{ALONE}[documents]")),
    Mutation("planner: batches that are alike counted once", PIECES,
             "alike = self.shape.batch * self.count // each.shape[0] * (heads // each.shape[1])",
             "alike = heads // each.shape[1]",
             tests("explain_ranks", f"{ALONE}[causal]")),
    Mutation("planner: heads of every rank alike", WHOLE,
             "if part.rows.repeats[1] > 1 and self.heads is not None:", "if False:",
             tests("explain_ranks", "masks_that_tell_heads_apart_give_ranks_different_work")),
    Mutation("planner: the last chunk of a run left out", METHODS,
             "count = ends[:, 1] - begins[:, 1] + 1", "count = (ends[:, 1] - begins[:, 1]).clamp(min=1)",
             tests("explain_ranks", "the_ranks_share_what_one_device_would_do[causal]")),
    Mutation("planner: heads travel across", METHODS,
             "moved[name], ranks.link[-1])", "moved[name], ranks.link[0])",
             tests("explain_ranks", "of_a_mesh_each_dimension_has_its_link")),
    Mutation("planner: a link that brings all at once", WAITING,
             "self.inwards, self.outwards = torch.maximum(self.inwards, stop),",
             "self.inwards, self.outwards = self.inwards,",
             tests("explain_ranks", "a_link_carries_one_message_after_another")),
    Mutation("planner: a link that takes away all at once", WAITING,
             "torch.maximum(self.inwards, stop), torch.maximum(self.outwards, sent)",
             "torch.maximum(self.inwards, stop), self.outwards",
             tests("explain_ranks", "a_link_carries_one_message_after_another")),
    Mutation("planner: nobody waits for gradients", WAITING,
             "torch.maximum(torch.maximum(done, come), late), back", "torch.maximum(done, come), back",
             tests("explain_ranks", "gradients_come_home_before_the_step_after_the_next_one")),
    Mutation("planner: keys come before they are sent", WAITING,
             "links.carry(arriving[step + 1], begin, step + 1)",
             "links.carry(arriving[step + 1], begin - begin, step + 1)",
             tests("explain_ranks", "a_link_carries_one_message_after_another")),
    Mutation("planner: bits taken for bytes", LINK,
             '"bit/s": 0.125', '"bit/s": 1.0',
             tests("explain_ranks", "a_rate_is_read")),
    Mutation("planner: the slowest method taken", ADVICE,
             "least = min(method.seconds for method", "least = max(method.seconds for method",
             tests("explain_ranks",
                   "the_method_with_the_least_time_is_taken_and_of_like_ones_that_with_less_memory")),
    Mutation("planner: memory of both passes at once", MEMORY,
             "return max(sum(x.bytes for x in memory if x.kept in phase) for phase in PHASES)",
             "return sum(x.bytes for x in memory)",
             tests("explain_ranks", "memory_is_that_of_the_pass_that_needs_more")),
    Mutation("planner: a ring with one buffer", MEMORY,
             'yield Allocation("keys under way", 3 * keys, FORWARD)',
             'yield Allocation("keys under way", 2 * keys, FORWARD)',
             tests("explain_ranks", "messages_take_the_memory_that_was_planned[ring-none]")),
    Mutation("planner: the mean for the most", FINDINGS,
             "return max(self.pairs) * len(self.pairs) / total if total else 1.0",
             "return sum(self.pairs) / total if total else 1.0",
             tests("explain_ranks", "the_zigzag_balances_a_causal_mask_exactly")),
)
